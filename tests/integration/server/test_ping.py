"""`ws.ping()`: how long a peer's answer takes, on every host that shows it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from math import inf
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.frames import Frame, Opcode

from tricorn import Disconnected, Settings, WebSocket

Served = Callable[..., AbstractAsyncContextManager[Any]]

QUIET = Settings(ping_interval=inf, stall_timeout=inf, close_timeout=3)

pytestmark = pytest.mark.not_asgi("there are no pongs")


class Pinging:
    """A handler that pings when it is told to, each time in a task of its own."""

    def __init__(self) -> None:
        self.sockets: list[WebSocket] = []
        self.latencies: dict[str, float] = {}
        self.gone: list[Disconnected] = []

    async def __call__(self, ws: WebSocket) -> None:
        self.sockets.append(ws)
        async for name in ws:
            ws.nursery.start_soon(self.ping, str(name))

    async def ping(self, name: str) -> None:
        try:
            self.latencies[name] = await self.sockets[0].ping()
        except Disconnected as gone:
            self.gone.append(gone)


async def pings(client: Any, number: int) -> list[bytes]:
    """The payloads of the next frames, which must be so many pings. They are not answered."""
    frames = [await client.frame(answer=False) for _ in range(number)]
    assert [frame.opcode for frame in frames] == [Opcode.PING] * number
    client.protocol.data_to_send()  # the answers of its own
    return [bytes(frame.data) for frame in frames]


async def pong(client: Any, *payloads: bytes) -> None:
    for payload in payloads:
        client.protocol.send_pong(payload)
    await client.flush()
    await wait_all_tasks_blocked()


async def test_the_latency_is_what_the_answer_took(hosted: Served, patient_clock: MockClock) -> None:
    handler = Pinging()
    async with hosted(handler, settings=QUIET) as server, server.connect() as client:
        await client.send("one")
        [payload] = await pings(client, 1)
        await trio.sleep(1.5)
        assert handler.latencies == {}
        await pong(client, payload)
        assert handler.latencies == {"one": 1.5}


async def test_a_pong_answers_its_ping_and_all_before_it(hosted: Served, patient_clock: MockClock) -> None:
    """RFC 6455 §5.5.3."""
    handler = Pinging()
    async with hosted(handler, settings=QUIET) as server, server.connect() as client:
        payloads: list[bytes] = []
        for name in ("one", "two", "three", "four"):
            await client.send(name)
            payloads += await pings(client, 1)
            await trio.sleep(1)
        assert len(set(payloads)) == 4
        await pong(client, payloads[2])
        assert handler.latencies == {"one": 4, "two": 3, "three": 2}
        await trio.sleep(1)
        await pong(client, payloads[0], payloads[3])
        assert handler.latencies == {"one": 4, "two": 3, "three": 2, "four": 2}


async def test_other_pongs_answer_nothing(hosted: Served, patient_clock: MockClock) -> None:
    handler = Pinging()
    async with hosted(handler, settings=QUIET) as server, server.connect() as client:
        await client.send("one")
        [payload] = await pings(client, 1)
        await pong(client, b"", b"else", payload[:-1])
        assert handler.latencies == {}
        await pong(client, payload)
        assert list(handler.latencies) == ["one"]


async def test_pings_of_the_server_itself_are_no_answer_either(hosted: Served, patient_clock: MockClock) -> None:
    settings = Settings(ping_interval=4, ping_timeout=100)
    handler = Pinging()
    async with hosted(handler, settings=settings) as server, server.connect() as client:
        await client.send("one")
        [payload] = await pings(client, 1)
        [keepalive] = await pings(client, 1)
        assert (len(payload), keepalive) == (4, b"")
        await pong(client, keepalive)
        assert handler.latencies == {}


async def test_a_ping_that_was_cancelled_is_forgotten(hosted: Served, patient_clock: MockClock) -> None:
    tries: list[bool] = []

    async def handler(ws: WebSocket) -> None:
        with trio.move_on_after(1) as scope:
            await ws.ping()
        tries.append(scope.cancelled_caught)
        with trio.move_on_after(10) as scope:
            await ws.ping()
        tries.append(scope.cancelled_caught)
        await ws.send("over")

    async with hosted(handler, settings=QUIET) as server, server.connect() as client:
        [late] = await pings(client, 1)
        await trio.sleep(2)
        [good] = await pings(client, 1)
        await pong(client, late)
        assert tries == [True]
        await pong(client, good)
        assert await client.receive() == "over"
        assert tries == [True, False]


@pytest.mark.parametrize("end", ["close", "vanish", "handler returns"])
async def test_without_an_answer_it_ends_with_the_connection(
    hosted: Served, patient_clock: MockClock, end: str
) -> None:
    """For a task elsewhere too; those of the connection are cancelled."""
    sockets: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        sockets.append(ws)
        await ws.receive()

    async with hosted(handler, settings=QUIET) as server, server.connect() as client, trio.open_nursery() as nursery:
        await wait_all_tasks_blocked()

        async def ping(task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            with pytest.raises(Disconnected) as caught:
                await sockets[0].ping()
            gone.append(caught.value)

        gone: list[Disconnected] = []
        await nursery.start(ping)
        await pings(client, 1)
        if end == "close":
            await client.close(4321, "bye")
        elif end == "vanish":
            client.reset()
        else:
            await client.send("return")
            assert (await client.frame()).opcode is Opcode.CLOSE
        await wait_all_tasks_blocked()
        code = {"close": 4321, "vanish": 1006, "handler returns": 1000}[end]
        assert [each.code for each in gone] == [code]
        with pytest.raises(Disconnected) as caught:
            await sockets[0].ping()
        assert caught.value.code == code


async def test_what_waits_goes_out_before_it(hosted: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        async for message in ws:
            await ws.send(message)
            if message == "two":
                ws.nursery.start_soon(ws.ping)
                await trio.lowlevel.checkpoint()

    async with hosted(handler, settings=QUIET) as server, server.connect() as client:
        await client.send("one", "two", "three")
        frames = [await client.frame() for _ in range(4)]
        assert [bytes(frame.data) for frame in frames if frame.opcode is Opcode.TEXT] == [b"one", b"two", b"three"]
        kinds = [frame.opcode for frame in frames]
        assert kinds.index(Opcode.PING) >= 2
        assert isinstance(frames[0], Frame)
