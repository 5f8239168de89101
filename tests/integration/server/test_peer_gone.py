"""The peer goes, in whatever way: all that it sent before is received, and then the handler is told, or cancelled.

Where the clock is `patient_clock`, time passes only when nothing else can happen: what takes no time did not wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.frames import Frame, Opcode

from fixtures.clock import seconds
from fixtures.handlers import MORE_THAN_SOCKETS_HOLD, echo, greet_and_sleep
from tricorn import Disconnected, Settings, WebSocket

Served = Callable[..., AbstractAsyncContextManager[Any]]

SETTINGS = Settings(close_timeout=3, drain_timeout=10, stall_timeout=1000, ping_interval=1000, handshake_timeout=1000)


async def close_with_reason(client: Any) -> None:
    await client.close(4321, "bye")


async def close_without_code(client: Any) -> None:
    await client.stream.send_all(Frame(Opcode.CLOSE, b"").serialize(mask=True))


async def end_stream(client: Any) -> None:
    await client.stream.send_eof()


async def reset(client: Any) -> None:
    client.reset()


async def break_protocol(client: Any) -> None:
    await client.stream.send_all(Frame(Opcode.TEXT, b"unmasked").serialize(mask=False))


WAYS = pytest.mark.parametrize(
    ("go", "code", "reason"),
    [
        (close_with_reason, 4321, "bye"),
        (close_without_code, 1005, ""),
        (end_stream, 1006, "no close frame"),
        (reset, 1006, "[Errno 104] Connection reset by peer"),
        (break_protocol, 1002, "a frame from a client must be masked"),
    ],
)


@WAYS
async def test_a_handler_that_sleeps_is_cancelled_at_once(
    hosted: Served, hides_codes: bool, patient_clock: MockClock, records: Any, go: Any, code: int, reason: str
) -> None:
    if hides_codes:
        code, reason = 1006, ""
    ended = trio.Event()

    async def handler(ws: WebSocket) -> None:
        try:
            await greet_and_sleep(ws)
        finally:
            ended.set()

    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        assert await client.receive() == "hello"
        async with seconds(0):
            await go(client)
            await ended.wait()
        await wait_all_tasks_blocked()
    [record] = records.read("WARNING" if code == 1002 else "INFO")
    assert (record["message"], record["code"], record["reason"]) == ("connection closed", code, reason)
    assert (record["messages_received"], record["messages_sent"]) == (0, 1)


@WAYS
async def test_everything_that_was_sent_before_is_received_first(
    hosted: Served, hides_codes: bool, patient_clock: MockClock, go: Any, code: int, reason: str
) -> None:
    if hides_codes:
        code, reason = 1006, ""
    received: list[object] = []
    look = trio.Event()
    ended = trio.Event()

    async def handler(ws: WebSocket) -> None:
        await look.wait()
        try:
            while True:
                received.append(await ws.receive())
        except Disconnected as end:
            received.append((end.code, end.reason))
        try:
            await trio.sleep_forever()  # it was told, and has the close timeout from then on
        finally:
            ended.set()

    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        await client.send("one", b"two", "three")
        await go(client)
        await wait_all_tasks_blocked()
        async with seconds(3):
            look.set()
            await ended.wait()
    assert received == ["one", b"two", "three", (code, reason)]


@WAYS
async def test_a_handler_that_waits_for_a_message_gets_to_know(
    hosted: Served, hides_codes: bool, patient_clock: MockClock, go: Any, code: int, reason: str
) -> None:
    if hides_codes:
        code, reason = 1006, ""
    ends: list[tuple[int, str]] = []

    async def handler(ws: WebSocket) -> None:
        await ws.send("hello")
        try:
            await ws.receive()
        except Disconnected as end:
            ends.append((end.code, end.reason))
            raise  # and that is no error

    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        assert await client.receive() == "hello"
        await go(client)
        await wait_all_tasks_blocked()
        assert ends == [(code, reason)]


@WAYS
async def test_iteration_ends_with_the_connection(hosted: Served, go: Any, code: int, reason: str) -> None:
    received: list[object] = []
    ended = trio.Event()

    async def handler(ws: WebSocket) -> None:
        received.extend([message async for message in ws])
        ended.set()

    async with hosted(handler) as server, server.connect() as client:
        await client.send("one", "two")
        await go(client)
        await ended.wait()
        assert received == ["one", "two"]


@WAYS
async def test_a_handler_that_does_not_receive_what_is_there_has_the_close_timeout(
    hosted: Served, patient_clock: MockClock, go: Any, code: int, reason: str
) -> None:
    ended = trio.Event()

    async def handler(ws: WebSocket) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        await client.send("unread")
        await go(client)
        async with seconds(3):
            await ended.wait()


async def test_an_error_of_a_handler_that_saw_the_end_is_reported_but_not_told(hosted: Served, records: Any) -> None:
    async def handler(ws: WebSocket) -> None:
        async for _ in ws:
            pass
        raise RuntimeError("cleaning up failed")

    async with hosted(handler) as server, server.connect() as client:
        await client.close(4321, "bye")
        assert await client.closed() == (4321, "bye")
        await wait_all_tasks_blocked()
        [record] = records.read("ERROR")
        assert "cleaning up failed" in record["stack_trace"]


@pytest.mark.not_asgi("the peer's close frame is answered before the handler has")
async def test_answers_to_the_last_messages_go_out_before_the_close_frame(hosted: Served) -> None:
    async with hosted(echo) as server, server.connect() as client:
        client.protocol.send_text(b"one")
        client.protocol.send_text(b"two")
        await client.close(4321, "bye")
        assert [await client.receive() for _ in range(2)] == ["one", "two"]
        assert await client.closed() == (4321, "bye")


@pytest.mark.not_asgi("half a stream that ended is a whole one")
async def test_answers_to_the_last_messages_reach_who_ended_only_its_half_of_the_stream(hosted: Served) -> None:
    async with hosted(echo) as server, server.connect() as client:
        await client.send("one", "two")
        await client.stream.send_eof()
        assert [await client.receive() for _ in range(2)] == ["one", "two"]
        assert await client.frame() is None


@pytest.mark.not_asgi("half a stream that ended is a whole one")
async def test_a_large_answer_reaches_who_ended_only_its_half_of_the_stream(
    hosted: Served, patient_clock: MockClock
) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.receive()
        await ws.send(bytes(MORE_THAN_SOCKETS_HOLD))
        await trio.sleep_forever()

    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        await client.send("large", "unread")
        await client.stream.send_eof()
        assert await client.receive() == bytes(MORE_THAN_SOCKETS_HOLD)


@pytest.mark.not_asgi("half a stream that ended is a whole one")
async def test_a_last_large_answer_reaches_who_ended_only_its_half_of_the_stream(
    hosted: Served, patient_clock: MockClock
) -> None:
    ended = trio.Event()

    async def handler(ws: WebSocket) -> None:
        await ended.wait()
        await ws.receive()
        await ws.send(bytes(MORE_THAN_SOCKETS_HOLD))

    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        await client.send("large")
        await client.stream.send_eof()
        await wait_all_tasks_blocked()
        ended.set()
        assert await client.receive() == bytes(MORE_THAN_SOCKETS_HOLD)
        assert await client.frame() is None


async def test_an_answer_that_is_put_off_goes_out_though_the_handler_stops_receiving(hosted: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send(await ws.receive())
        await trio.sleep_forever()

    async with hosted(handler) as server, server.connect() as client:
        await client.send("one", "two")
        assert await client.receive() == "one"


AHEAD = [bytes(1000)] * 70  # enough for reading to pause
REST = [b"x" * 1000] * 10  # little enough to be in the kernel of the server and not of the client


async def send_until_paused(client: Any) -> None:
    await client.send(*AHEAD)
    await wait_all_tasks_blocked()
    await client.send(*REST)
    await wait_all_tasks_blocked()


@pytest.mark.parametrize("go", [close_with_reason, end_stream, reset])
async def test_what_came_before_the_end_is_received_after_a_pause(hosted: Served, go: Any) -> None:
    resume, ended = trio.Event(), trio.Event()
    received: list[object] = []

    async def handler(ws: WebSocket) -> None:
        await resume.wait()
        received.extend([message async for message in ws])
        ended.set()

    async with hosted(handler) as server, server.connect() as client:
        await send_until_paused(client)
        await go(client)
        await client.stream.aclose()
        await wait_all_tasks_blocked()
        resume.set()
        await ended.wait()
        assert received == AHEAD + REST


@pytest.mark.parametrize("go", [close_with_reason, end_stream, reset])
async def test_who_goes_while_reading_is_paused_is_missed(
    hosted: Served, misses_hang_ups: bool, patient_clock: MockClock, go: Any
) -> None:
    if misses_hang_ups:
        pytest.skip("nothing tells of it without epoll")
    ended = trio.Event()

    async def handler(ws: WebSocket) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        await send_until_paused(client)
        await go(client)
        await client.stream.aclose()
        async with seconds(3):
            await ended.wait()


# What is not the protocol


@pytest.mark.parametrize(
    ("frames", "code", "reason"),
    [
        ([Frame(Opcode.CONT, b"x")], 1002, "a continuation frame without a message to continue"),
        ([Frame(Opcode.CLOSE, b"\x03\xed")], 1002, "close code 1005 must not be sent"),
        ([Frame(Opcode.CLOSE, b"x")], 1002, "a close frame has a payload of one byte"),
        ([Frame(Opcode.TEXT, b"\xff")], 1007, "not UTF-8: invalid start byte"),
        ([Frame(Opcode.TEXT, b"\xc3")], 1007, "not UTF-8: unexpected end of data"),
        ([Frame(Opcode.CLOSE, b"\x03\xe8\xff")], 1007, "not UTF-8: invalid start byte"),
        ([Frame(Opcode.BINARY, bytes(101))], 1009, "a message may have at most 100 bytes"),
        ([Frame(Opcode.TEXT, b"x" * 60, fin=False), Frame(Opcode.CONT, b"x" * 41)], 1009, None),
    ],
)
@pytest.mark.not_asgi("whose codec says nothing then")
async def test_a_violation_is_answered_with_its_code_and_the_end_of_the_stream(
    hosted: Served, patient_clock: MockClock, frames: list[Frame], code: int, reason: str | None
) -> None:
    async with (
        hosted(echo, settings=Settings(max_message_bytes=100)) as server,
        server.connect() as client,
        seconds(0),
    ):
        await client.send("before")
        await client.stream.send_all(b"".join(each.serialize(mask=True) for each in frames) + b"whatever follows")
        assert await client.receive() == "before"
        assert await client.closed(answer=False) == (code, reason or "a message may have at most 100 bytes")
