"""`tricorn.broadcast`: one message to many, that waits for nobody."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from math import inf
from random import Random
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

import tricorn
from fixtures.handlers import MORE_THAN_SOCKETS_HOLD
from tricorn import Settings, WebSocket
from tricorn.protocol.deflate import Deflater
from tricorn.protocol.frames import frame
from tricorn.transport.flow_control import BROADCAST_MAX

Served = Callable[..., AbstractAsyncContextManager[Any]]

QUIET = Settings(ping_interval=inf, stall_timeout=inf, close_timeout=3)


class Room:
    """A handler that keeps its connections, the first first."""

    def __init__(self) -> None:
        self.members: list[WebSocket] = []

    async def __call__(self, ws: WebSocket) -> None:
        self.members.append(ws)
        async for message in ws:
            await ws.send(message)


async def enter(stack: AsyncExitStack, server: Any, room: Room, **options: Any) -> Any:
    client = await stack.enter_async_context(server.connect(**options))
    await client.send("here")
    assert await client.receive() == "here"
    return client


@pytest.mark.parametrize("message", ["é", "", b"\xff", bytearray(b"\xfe"), memoryview(b"\xfd"), "x" * 100_000])
async def test_each_member_gets_it(hosted: Served, message: Any) -> None:
    room = Room()
    async with hosted(room) as server, AsyncExitStack() as stack:
        clients = [await enter(stack, server, room) for _ in range(3)]
        assert tricorn.broadcast(room.members[:2], message) == []
        assert tricorn.broadcast([], message) == []
        expected = message if isinstance(message, str) else bytes(message)
        for client in clients[:2]:
            assert await client.receive() == expected
        await clients[2].send("nothing else")
        assert await clients[2].receive() == "nothing else"


@pytest.mark.parametrize("wrong", [None, 1, ["text"], object()])
def test_nothing_else_is_a_message(wrong: Any) -> None:
    with pytest.raises(TypeError, match="a message is str or bytes, not"):
        tricorn.broadcast([], wrong)


async def test_it_comes_in_the_order_of_sends(hosted: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        async for message in ws:  # with more to receive its answers are put off
            await ws.send(f"{message} before")
            assert tricorn.broadcast([ws], f"{message} between") == []
            await ws.send(f"{message} behind")

    async with hosted(handler) as server, server.connect() as client:
        names = [str(number) for number in range(50)]
        await client.send(*names)
        expected = [f"{name} {place}" for name in names for place in ("before", "between", "behind")]
        assert [await client.receive() for _ in expected] == expected


async def test_who_is_over_is_skipped(hosted: Served) -> None:
    room = Room()
    async with hosted(room) as server, AsyncExitStack() as stack:
        good = await enter(stack, server, room)
        gone, closed = await enter(stack, server, room), await enter(stack, server, room)
        await gone.close()
        await gone.stream.aclose()
        room.members[2].nursery.cancel_scope.cancel()
        await closed.frame()
        await wait_all_tasks_blocked()
        assert tricorn.broadcast(room.members, "hello") == []
        assert await good.receive() == "hello"


async def test_who_does_not_read_is_returned_and_not_waited_for(hosted: Served, patient_clock: MockClock) -> None:
    """It gets everything that it was not left out of, in order."""
    room = Room()
    async with hosted(room, settings=QUIET) as server, AsyncExitStack() as stack:
        slow = await enter(stack, server, room, receive_buffer=4096)
        good = await enter(stack, server, room)
        left_out: list[int] = []
        number, size = 0, 200_000
        while len(left_out) < 3:
            message = str(number).ljust(size)
            missed = tricorn.broadcast(room.members, message)
            assert missed in ([], room.members[:1])
            left_out += [number] if missed else []
            assert await good.receive() == message
            number += 1
            assert number * size < 20 * MORE_THAN_SOCKETS_HOLD
        for expected in range(number):
            if expected not in left_out:
                assert await slow.receive() == str(expected).ljust(size)
        assert tricorn.broadcast(room.members, "back") == []
        assert await slow.receive() == await good.receive() == "back"
        assert trio.current_time() == 0


async def test_what_waits_is_bounded(served: Served, patient_clock: MockClock) -> None:
    room = Room()
    async with served(room, settings=QUIET) as server, AsyncExitStack() as stack:
        await enter(stack, server, room, receive_buffer=4096)
        [slow] = room.members
        message = bytes(100_000)
        while not tricorn.broadcast([slow], message):
            await trio.lowlevel.checkpoint()
        transport = slow._connection.transport
        assert BROADCAST_MAX < len(transport._unsent) + transport._put_off_bytes < BROADCAST_MAX + len(message) + 100
        assert tricorn.broadcast([slow], message) == [slow]


async def test_a_message_larger_than_the_bound_goes_to_who_has_little_waiting(hosted: Served) -> None:
    room = Room()
    message = bytes(2 * BROADCAST_MAX)
    async with hosted(room) as server, AsyncExitStack() as stack:
        client = await enter(stack, server, room)
        assert tricorn.broadcast(room.members, message) == []
        assert tricorn.broadcast(room.members, message) == room.members
        assert await client.receive() == message


# Made once


async def test_it_is_framed_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []

    def counted(opcode: int, payload: bytes) -> bytes:
        made.append(payload)
        return frame(opcode, payload)

    room = Room()
    async with served(room) as server, AsyncExitStack() as stack:
        clients = [await enter(stack, server, room) for _ in range(3)]
        monkeypatch.setattr("tricorn.protocol.prepared.frame", counted)
        assert tricorn.broadcast(room.members, "hello") == []
        assert [await client.receive() for client in clients] == ["hello"] * 3
    assert made == [b"hello"]


@pytest.mark.parametrize(("deflate", "times"), [("takeover", 6), ("no-takeover", 2)])
async def test_it_is_compressed_once_if_nothing_is_remembered(
    served: Served, monkeypatch: pytest.MonkeyPatch, deflate: Any, times: int
) -> None:
    """For each size of window; and framed once for those that do not compress."""
    made: list[bytes] = []
    deflated = Deflater.frame

    def counted(self: Deflater, opcode: int, payload: bytes) -> bytes:
        made.append(payload)
        return deflated(self, opcode, payload)

    room = Room()
    async with served(room, settings=Settings(deflate=deflate)) as server, AsyncExitStack() as stack:
        clients = [await enter(stack, server, room) for _ in range(2)]
        for bits in (9, 12):
            extension = ClientPerMessageDeflateFactory(server_max_window_bits=bits)
            clients += [await enter(stack, server, room, extensions=[extension]) for _ in range(3)]
        monkeypatch.setattr(Deflater, "frame", counted)
        text = "again and again and again " * 100
        assert tricorn.broadcast(room.members, text) == []
        assert [await client.receive() for client in clients] == [text] * 8
        assert len(made) == times
        monkeypatch.undo()
        for client in clients:
            await client.send(text)
            assert await client.receive() == text


async def test_a_compressor_remembers_nothing_of_what_was_left_out(served: Served, patient_clock: MockClock) -> None:
    """Or what follows could not be inflated."""
    room = Room()
    settings = Settings(deflate="takeover", ping_interval=inf, stall_timeout=inf)
    random = Random(1)
    async with served(room, settings=settings) as server, AsyncExitStack() as stack:
        extension = ClientPerMessageDeflateFactory()
        client = await enter(stack, server, room, receive_buffer=4096, extensions=[extension])
        sent: list[bytes] = []
        left_out = 0
        while left_out < 3:
            message = random.randbytes(100_000)
            if tricorn.broadcast(room.members, message):
                left_out += 1
            else:
                sent.append(message)
            await trio.lowlevel.checkpoint()
        for expected in sent:
            assert await client.receive() == expected
        # This is like what was left out last.
        assert tricorn.broadcast(room.members, message[-1000:]) == []
        assert await client.receive() == message[-1000:]
