"""Who does not keep up is waited for, without memory, without half a frame, and not for ever."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.frames import Frame, Opcode

from tricorn import Disconnected, Settings, WebSocket

Served = Callable[..., AbstractAsyncContextManager[Any]]

BIG = bytes(range(1, 256)) * 2**16  # more than the kernel holds for a client that does not read
SETTINGS = Settings(close_timeout=3, stall_timeout=8, ping_interval=1000, ping_timeout=1000)


# A peer that does not read


async def test_a_send_waits_until_the_peer_has_read(hosted: Served) -> None:
    sent: list[bytes | str] = []

    async def handler(ws: WebSocket) -> None:
        for message in (BIG, "next", "last"):
            await ws.send(message)
            sent.append(message)

    async with hosted(handler) as server, server.connect() as client:
        await wait_all_tasks_blocked()
        assert sent == [BIG]
        assert [await client.receive() for _ in range(3)] == [BIG, "next", "last"]
        assert await client.closed() == (1000, "")


async def test_of_a_cancelled_send_nothing_is_sent(hosted: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send(BIG)
        with trio.CancelScope() as scope:
            ws.nursery.start_soon(cancel_when_blocked, scope)
            await ws.send("cancelled while it waits")
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await ws.send_texts([b"cancelled", b"before it begins"])
        assert scope.cancelled_caught
        await ws.send("after")

    async def cancel_when_blocked(scope: trio.CancelScope) -> None:
        await wait_all_tasks_blocked()
        scope.cancel()
        cancelled.set()

    cancelled = trio.Event()
    async with hosted(handler) as server, server.connect() as client:
        await cancelled.wait()
        assert [await client.receive() for _ in range(2)] == [BIG, "after"]
        assert await client.closed() == (1000, "")


async def test_a_frame_that_cannot_be_finished_is_the_last_thing_on_the_stream(
    hosted: Served, patient_clock: MockClock
) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.receive()
        await ws.send(BIG)
        await ws.send("never")

    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        await client.send("go")
        await wait_all_tasks_blocked()
        server.scope.cancel()
        await server.over.wait()
        stream = b""
        with suppress(trio.BrokenResourceError):
            while data := await client.stream.receive_some():
                stream += data
        frame = Frame(Opcode.BINARY, BIG).serialize(mask=False)
        assert 0 < len(stream) < len(frame)
        assert frame.startswith(stream)


async def test_who_reads_nothing_is_given_up_after_the_stall_timeout(
    hosted: Served, patient_clock: MockClock, records: Any
) -> None:
    ends: list[object] = []

    async def handler(ws: WebSocket) -> None:
        sockets.append(ws)
        await ws.send(BIG)
        try:
            await ws.send("waits")
        except Disconnected as end:
            ends.append(end.code)
            raise

    sockets: list[WebSocket] = []
    # A buffer that does not grow: the kernel would take more a moment later, when the clock has jumped already.
    async with hosted(handler, settings=SETTINGS) as server, server.connect(receive_buffer=4096):
        await wait_all_tasks_blocked()
        with pytest.raises(Disconnected, match="4001"):
            await sockets[0].send("waits outside")
        assert 8 <= trio.current_time() <= 12
    assert ends == [4001]
    [record] = records.read("INFO")
    assert (record["code"], record["reason"]) == (4001, "the peer stopped reading")


async def test_who_was_given_up_is_not_read_any_more(hosted: Served, patient_clock: MockClock) -> None:
    sockets: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        sockets.append(ws)
        await ws.send(BIG)
        await trio.sleep_forever()

    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        await client.send("unread")
        await wait_all_tasks_blocked()
        await sockets[0].send("waits outside")  # until it is given up; no error yet, for there is something to receive
        assert trio.current_time() >= 8
        await client.send("late")
        await wait_all_tasks_blocked()
        assert list(sockets[0]._connection.inbox) == ["unread"]


async def test_who_reads_slowly_is_not_given_up(hosted: Served, patient_clock: MockClock) -> None:
    async def handler(ws: WebSocket) -> None:
        for _ in range(2):
            await ws.send(BIG)
        await ws.receive()

    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        for _ in range(2):
            for _ in range(3):
                await trio.sleep(7)
                for _ in range(64):
                    client.protocol.receive_data(await client.stream.receive_some(2**16))
            assert await client.receive() == BIG
        assert trio.current_time() == 42


@pytest.mark.not_asgi("pings are answered one by one")
async def test_of_the_pings_of_who_does_not_read_the_last_is_answered(hosted: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send(BIG)
        await ws.receive()
        await ws.receive()

    async with hosted(handler) as server, server.connect() as client:
        await wait_all_tasks_blocked()
        for text in (b"1", b"2", b"3"):
            client.protocol.send_ping(text)
            await client.flush()
            await wait_all_tasks_blocked()
        await client.send("a message")
        assert await client.receive() == BIG
        assert await client.frame() == Frame(Opcode.PONG, b"3")
        await client.send("another")
        assert await client.closed() == (1000, "")


# Several who send


async def test_the_messages_of_many_tasks_are_whole_and_each_tasks_in_order(hosted: Served) -> None:
    tasks, count = 10, 20

    async def handler(ws: WebSocket) -> None:
        async with trio.open_nursery() as nursery:
            for task in range(tasks):
                nursery.start_soon(send_many, ws, task)

    async def send_many(ws: WebSocket, task: int) -> None:
        for number in range(count):
            await ws.send(f"{task} {number} " + "x" * (task * number * 3000))

    async with hosted(handler) as server, server.connect() as client:
        await wait_all_tasks_blocked()
        numbers: dict[int, list[int]] = {task: [] for task in range(tasks)}
        for _ in range(tasks * count):
            task, number, rest = (await client.receive()).split(" ")
            numbers[int(task)].append(int(number))
            assert len(rest) == int(task) * int(number) * 3000
        assert numbers == {task: list(range(count)) for task in range(tasks)}
        assert await client.closed() == (1000, "")


@pytest.mark.parametrize("cancelled", [set(), {0}, {1, 2}, {3}, {0, 1, 2}])
@pytest.mark.parametrize("unread", [[], ["unread"]])
async def test_who_waits_longest_sends_first_and_nobody_is_forgotten(
    hosted: Served, cancelled: set[int], unread: list[str]
) -> None:
    """Also where answers are put off because there is something to receive, and where some of those before gave up."""
    ready = trio.Event()

    async def handler(ws: WebSocket) -> None:
        assert await ws.receive() == "go"
        await ws.send(BIG)
        scopes = [trio.CancelScope() for _ in range(4)]
        for number, scope in enumerate(scopes):
            ws.nursery.start_soon(send, ws, number, scope)
            await wait_all_tasks_blocked()
        for number in cancelled:
            scopes[number].cancel()
        await wait_all_tasks_blocked()
        ready.set()
        await trio.sleep_forever()

    async def send(ws: WebSocket, number: int, scope: trio.CancelScope) -> None:
        with scope:
            await ws.send(f"{number}")

    async with hosted(handler) as server, server.connect() as client:
        await client.send("go", *unread)
        await ready.wait()
        assert await client.receive() == BIG
        expected = [f"{number}" for number in range(4) if number not in cancelled]
        assert [await client.receive() for _ in expected] == expected


@pytest.mark.not_asgi("a close frame is answered only behind what is on its way, and its code is not told")
async def test_who_waits_to_send_gets_to_know_of_the_end(hosted: Served) -> None:
    sockets: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        sockets.append(ws)
        await ws.send(BIG)
        await ws.receive()

    async def send_outside(text: str) -> None:
        with pytest.raises(Disconnected, match="4321"):
            await sockets[0].send(text)

    async with hosted(handler) as server, server.connect() as client, trio.open_nursery() as nursery:
        await wait_all_tasks_blocked()
        for text in ("one", "two"):
            nursery.start_soon(send_outside, text)
        await wait_all_tasks_blocked()
        await client.close(4321)
        await wait_all_tasks_blocked()
        assert await client.receive() == BIG
        assert await client.closed() == (4321, "")


# A handler that does not receive


async def test_a_handler_that_does_not_receive_is_backpressure_and_no_memory(hosted: Served) -> None:
    messages = [bytes(1000)] * 20_000
    sockets: list[WebSocket] = []
    resume, sent = trio.Event(), trio.Event()
    received: list[object] = []

    async def handler(ws: WebSocket) -> None:
        sockets.append(ws)
        await resume.wait()
        received.extend([message async for message in ws])

    async def send(client: Any) -> None:
        await client.send(*messages)
        sent.set()

    async with hosted(handler) as server, server.connect() as client, trio.open_nursery() as nursery:
        nursery.start_soon(send, client)
        await wait_all_tasks_blocked()
        assert not sent.is_set()
        assert sum(map(len, sockets[0]._connection.inbox)) <= 2 * 65536
        resume.set()
        await sent.wait()
        await client.close()
        assert await client.closed() == (1000, "")
        assert received == messages


async def test_a_handler_that_only_sends_ends_when_there_is_nobody_left_to_send_to(
    hosted: Served, patient_clock: MockClock
) -> None:
    """Also where reading is paused, because of all that it does not receive."""
    ended = trio.Event()

    async def handler(ws: WebSocket) -> None:
        try:
            while True:
                await ws.send("tick")
                await trio.sleep(0.1)
        finally:
            ended.set()

    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        for count in (70, 10):
            await client.send(*[bytes(1000)] * count)
            await wait_all_tasks_blocked()
        client.reset()
        with trio.fail_after(5):
            await ended.wait()
