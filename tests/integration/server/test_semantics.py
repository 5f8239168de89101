"""What a handler can rely on: messages whole and in order both ways, and an end for each reason that there is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked
from websockets.frames import Frame, Opcode

from fixtures.handlers import echo
from tricorn import Disconnected, Settings, WebSocket

Served = Callable[..., AbstractAsyncContextManager[Any]]

LARGE = 5 * 2**20
ROOMY = Settings(max_message_bytes=LARGE)


async def sleep(ws: WebSocket) -> None:
    await trio.sleep_forever()


# Messages


async def test_a_message_of_each_kind_and_size(hosted: Served) -> None:
    messages = ["text", b"\0\xff", "", b"", "x" * 125, "x" * 126, b"x" * 65535, b"x" * 65536, "é" * 100_000]
    async with hosted(echo) as server, server.connect() as client:
        for message in messages:
            await client.send(message)
            assert await client.receive() == message


@pytest.mark.parametrize("begun", [False, True])
async def test_a_handler_may_limit_messages_and_raise_the_limit_again(hosted: Served, begun: bool) -> None:
    async def handler(ws: WebSocket) -> None:
        ws.limit_messages(10)
        await ws.send(await ws.receive())
        ws.limit_messages(100)
        async for message in ws:
            await ws.send(message)
            if begun:
                ws.limit_messages(10)

    async with hosted(handler) as server, server.connect() as client:
        for size in (10, 100):
            await client.send("x" * size)
            assert await client.receive() == "x" * size
        await client.send("x" * (11 if begun else 101))
        assert (await client.closed())[0] == 1009


async def test_large_messages_both_ways_at_once(hosted: Served) -> None:
    messages = ["é" * (LARGE // 2), bytes(range(256)) * (LARGE // 256)]
    async with hosted(echo, settings=ROOMY) as server, server.connect() as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.send, *messages)
        for message in messages:
            assert await client.receive() == message


async def test_many_messages_in_one_write_are_answered_in_order(hosted: Served) -> None:
    messages = [str(number) for number in range(5000)]
    async with hosted(echo) as server, server.connect() as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.send, *messages)
        assert [await client.receive() for _ in messages] == messages


@pytest.mark.not_asgi("it gets 400: tests/e2e/test_hypercorn.py")
async def test_frames_in_the_segment_of_the_request_head(hosted: Served) -> None:
    async with hosted(echo) as server, server.open() as stream:
        client = server.client(stream)
        early = [Frame(Opcode.TEXT, text).serialize(mask=True) for text in (b"one", b"two")]
        await stream.send_all(client.request() + b"".join(early)[:-1])
        await client.handshake()
        assert await client.receive() == "one"
        await stream.send_all(early[-1][-1:])
        assert await client.receive() == "two"


@pytest.mark.not_asgi("it gets 400: tests/e2e/test_hypercorn.py")
async def test_a_close_frame_in_the_segment_of_the_request_head(hosted: Served) -> None:
    async with hosted(echo) as server, server.open() as stream:
        client = server.client(stream)
        close = [Frame(Opcode.TEXT, b"bye"), Frame(Opcode.CLOSE, b"\x10\xe1")]
        await stream.send_all(client.request() + b"".join(each.serialize(mask=True) for each in close))
        await client.handshake()
        assert await client.receive() == "bye"
        assert await client.closed(answer=False) == (4321, "")


async def test_pings_are_answered_between_fragments(hosted: Served) -> None:
    async with hosted(echo) as server, server.connect() as client:
        client.protocol.send_text("half é".encode()[:-1], fin=False)
        client.protocol.send_ping(b"between")
        await client.flush()
        assert await client.frame() == Frame(Opcode.PONG, b"between")
        client.protocol.send_continuation("é".encode()[1:] + b" and", fin=False)
        client.protocol.send_continuation(b"", fin=False)
        client.protocol.send_continuation(b" half", fin=True)
        await client.flush()
        assert await client.receive() == "half é and half"


async def test_pings_are_answered_while_the_handler_is_busy(hosted: Served) -> None:
    async with hosted(sleep) as server, server.connect() as client:
        client.protocol.send_ping(b"1")
        client.protocol.send_text(b"unread")
        client.protocol.send_ping(b"2")
        await client.flush()
        assert [await client.frame() for _ in range(2)] == [Frame(Opcode.PONG, data) for data in (b"1", b"2")]


async def test_bytes_come_one_by_one(hosted: Served) -> None:
    frames = Frame(Opcode.TEXT, b"slow").serialize(mask=True) + Frame(Opcode.BINARY, bytes(200)).serialize(mask=True)
    async with hosted(echo) as server, server.connect() as client:
        for byte in frames:
            await client.stream.send_all(bytes([byte]))
        assert await client.receive() == "slow"
        assert await client.receive() == bytes(200)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_what_is_like_bytes_is_binary(hosted: Served, kind: Callable[[bytes], Any]) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send(kind(b"\1\2"))

    async with hosted(handler) as server, server.connect() as client:
        assert await client.receive() == b"\1\2"
        assert await client.closed() == (1000, "")


async def test_encoded_texts_go_out_each_as_one_message(hosted: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send_texts(text.encode() for text in ("é", "", "b"))

    async with hosted(handler) as server, server.connect() as client:
        assert [await client.receive() for _ in range(3)] == ["é", "", "b"]
        assert await client.closed() == (1000, "")


async def test_nothing_else_can_be_sent(hosted: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        for wrong in (None, 1, object()):
            with pytest.raises(TypeError, match="a message is str or bytes, or an iterable of either, not"):
                await ws.send(wrong)  # type: ignore[arg-type]
        with pytest.raises(UnicodeEncodeError):
            await ws.send("\ud800")

    async with hosted(handler) as server, server.connect() as client:
        assert await client.closed() == (1000, "")


@pytest.mark.parametrize("before", [0, 1])
async def test_only_one_task_receives(hosted: Served, before: int) -> None:
    async def handler(ws: WebSocket) -> None:
        for _ in range(before):
            await ws.receive()
        ws.nursery.start_soon(ws.receive)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await ws.receive()
        await ws.send("busy")
        await trio.sleep_forever()

    async with hosted(handler) as server, server.connect() as client:
        await client.send(*["before"] * before)
        assert await client.receive() == "busy"


@pytest.mark.parametrize("before", [0, 1])
async def test_a_cancelled_receive_loses_nothing(hosted: Served, before: int) -> None:
    async def handler(ws: WebSocket) -> None:
        for _ in range(before):
            await ws.receive()
        with trio.CancelScope() as scope:
            ws.nursery.start_soon(cancel_later, scope)
            await ws.receive()
        assert scope.cancelled_caught
        await ws.send("cancelled")
        with trio.CancelScope() as scope:
            scope.cancel()
            await ws.receive()
        assert scope.cancelled_caught
        await echo(ws)

    async def cancel_later(scope: trio.CancelScope) -> None:
        await wait_all_tasks_blocked()
        scope.cancel()

    async with hosted(handler) as server, server.connect() as client:
        await client.send(*["before"] * before)
        assert await client.receive() == "cancelled"
        await client.send("one", "two")
        assert [await client.receive() for _ in range(2)] == ["one", "two"]


async def test_receiving_checks_for_cancellation_where_a_message_waits(hosted: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        assert await ws.receive() == "one"
        with trio.CancelScope() as scope:
            scope.cancel()
            await ws.receive()
        assert scope.cancelled_caught
        assert await ws.receive() == "two"

    async with hosted(handler) as server, server.connect() as client:
        await client.send("one", "two")
        assert await client.closed() == (1000, "")


# How a handler ends


async def test_a_handler_that_returns_closes_with_1000(hosted: Served) -> None:
    ended = trio.Event()

    async def child() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async def handler(ws: WebSocket) -> None:
        ws.nursery.start_soon(child)
        await ws.receive()

    async with hosted(handler) as server, server.connect() as client:
        await client.send("go")
        assert await client.closed() == (1000, "")
        assert ended.is_set()


async def fail(ws: WebSocket) -> None:
    await ws.receive()
    raise RuntimeError("a secret of the handler's")


async def fail_in_a_task(ws: WebSocket) -> None:
    ws.nursery.start_soon(fail, ws)
    await trio.sleep_forever()


async def fail_twice(ws: WebSocket) -> None:
    async def fail_too() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("another")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail_too)
        nursery.start_soon(fail, ws)


@pytest.mark.parametrize("handler", [fail, fail_in_a_task, fail_twice])
async def test_a_handler_that_raises_closes_with_1011_and_disturbs_nobody(
    hosted: Served, records: Any, handler: Any
) -> None:
    async def route(ws: WebSocket) -> None:
        await (echo if ws.request.path == "/echo" else handler)(ws)

    async with hosted(route) as server, server.connect("/echo") as other, server.connect() as client:
        await client.send("go")
        code, error_id = await client.closed()
        [record] = records.read("ERROR")
        assert code == 1011
        assert error_id == record["error_id"] != ""
        assert "RuntimeError: a secret of the handler's" in record["stack_trace"]
        assert ("ValueError: another" in record["stack_trace"]) == (handler is fail_twice)
        assert (record["path"], record["phase"]) == ("/", "open")
        assert record.get("peer") == (client.address and list(client.address))
        await other.send("still here")
        assert await other.receive() == "still here"


async def test_what_the_end_of_another_connection_raises_is_an_error_like_any(hosted: Served, records: Any) -> None:
    async def handler(ws: WebSocket) -> None:
        raise Disconnected(1000, "somebody else's")

    async with hosted(handler) as server, server.connect() as client:
        code, error_id = await client.closed()
        [record] = records.read("ERROR")
        assert (code, error_id) == (1011, record["error_id"])


# Closing


async def test_close_does_not_return_inside_the_connection(hosted: Served) -> None:
    went_on: list[str] = []

    async def handler(ws: WebSocket) -> None:
        ws.nursery.start_soon(sleep, ws)
        try:
            await ws.close(4000, "enough é")
            went_on.append("returned")
        finally:
            with pytest.raises(trio.Cancelled):
                await ws.send("too late")

    async with hosted(handler) as server, server.connect() as client:
        assert await client.closed() == (4000, "enough é")
    assert went_on == []


async def test_close_from_outside_returns_when_the_connection_is_closed(hosted: Served) -> None:
    sockets: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        sockets.append(ws)
        await ws.send("hello")
        await ws.receive()

    async with hosted(handler) as server, server.connect() as client:
        assert await client.receive() == "hello"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sockets[0].close, 3000, "from outside")
            await wait_all_tasks_blocked()
            nursery.start_soon(sockets[0].close, 3001, "later")
            assert await client.closed() == (3000, "from outside")
        await sockets[0].close(3002)  # over is over
        for operation in (sockets[0].receive, sockets[0].send):
            with pytest.raises(Disconnected) as caught:
                await operation(*["x"] * (operation == sockets[0].send))
            assert (caught.value.code, caught.value.reason) == (3000, "from outside")
        assert str(caught.value) == "3000 from outside"
        peer = f"127.0.0.1:{client.address[1]}" if client.address else "a Unix socket"
        assert repr(sockets[0]).endswith(f"{peer}, closed>")


async def test_somebody_outside_who_receives_gets_to_know(hosted: Served) -> None:
    arrived: list[WebSocket] = []
    release = trio.Event()

    async def handler(ws: WebSocket) -> None:
        arrived.append(ws)
        await ws.send("hello")
        await release.wait()

    async def receive_outside() -> None:
        assert await arrived[0].receive() == "first"
        with pytest.raises(Disconnected, match="1000"):
            await arrived[0].receive()

    async with hosted(handler) as server, server.connect() as client, trio.open_nursery() as nursery:
        assert await client.receive() == "hello"
        nursery.start_soon(receive_outside)
        await client.send("first")
        await wait_all_tasks_blocked()
        release.set()
        assert await client.closed() == (1000, "")


@pytest.mark.parametrize("code", [-1, 0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000])
async def test_codes_that_may_not_be_sent(hosted: Served, code: int) -> None:
    async def handler(ws: WebSocket) -> None:
        with pytest.raises(ValueError, match=f"close code {code} may not be sent"):
            await ws.close(code)
        await ws.send("still open")

    async with hosted(handler) as server, server.connect() as client:
        assert await client.receive() == "still open"


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1014, 3000, 4999])
async def test_codes_that_may_be_sent(hosted: Served, code: int) -> None:
    async def handler(ws: WebSocket) -> None:
        with pytest.raises(ValueError, match="at most 123 bytes"):
            await ws.close(code, "é" * 62)
        await ws.close(code, "x" + "é" * 61)

    async with hosted(handler) as server, server.connect() as client:
        assert await client.closed() == (code, "x" + "é" * 61)


async def test_a_handler_that_cancels_its_own_nursery_has_ended(hosted: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        ws.nursery.cancel_scope.cancel()
        await trio.sleep_forever()

    async with hosted(handler) as server, server.connect() as client:
        assert await client.closed() == (1000, "")
