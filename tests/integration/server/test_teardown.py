"""The server goes, or something in it fails: everybody is told, nothing is left, and it takes bounded time.

Where the clock is `patient_clock`, time passes only when nothing else can happen: what takes no time did not wait.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.frames import Frame, Opcode

from fixtures.clock import seconds
from fixtures.handlers import MORE_THAN_SOCKETS_HOLD, echo, flood, greet_and_sleep
from tricorn import Settings, WebSocket, serve
from tricorn.protocol.handshake import Head
from tricorn.transport.native import NativeTransport

Served = Callable[..., AbstractAsyncContextManager[Any]]

SETTINGS = Settings(close_timeout=3, drain_timeout=10, stall_timeout=1000, ping_interval=1000, handshake_timeout=1000)


# The server goes


async def cancel(server: Any) -> None:
    server.scope.cancel()


async def set_deadline(server: Any) -> None:
    server.scope.deadline = trio.current_time()


@pytest.mark.parametrize("end", [cancel, set_deadline])
async def test_everybody_is_told_when_the_server_ends(
    hosted: Served, sees_the_end_within: float, patient_clock: MockClock, end: Callable[[Any], Awaitable[None]]
) -> None:
    async with hosted(greet_and_sleep, settings=SETTINGS) as server, server.connect() as one, server.connect() as other:
        for client in (one, other):
            assert await client.receive() == "hello"
        async with seconds(0, sees_the_end_within):
            await end(server)
            for client in (one, other):
                assert await client.closed() == (1012, "")


async def test_who_does_not_answer_the_close_frame_has_the_close_timeout(
    hosted: Served, sees_the_end_within: float, patient_clock: MockClock
) -> None:
    async with (
        hosted(greet_and_sleep, settings=SETTINGS) as server,
        server.connect() as client,
        seconds(3, sees_the_end_within),
    ):
        assert await client.receive() == "hello"
        server.scope.cancel()
        assert await client.closed(answer=False) == (1012, "")


async def test_who_goes_on_sending_has_the_close_timeout(
    hosted: Served, sees_the_end_within: float, patient_clock: MockClock
) -> None:
    message = Frame(Opcode.TEXT, b"and another thing").serialize(mask=True)

    async def send_until_it_fails(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                await stream.send_all(message)
                await trio.sleep(0.5)

    async with (
        hosted(greet_and_sleep, settings=SETTINGS) as server,
        server.connect() as client,
        trio.open_nursery() as nursery,
    ):
        assert await client.receive() == "hello"
        nursery.start_soon(send_until_it_fails, client.stream)
        async with seconds(3, sees_the_end_within):
            server.scope.cancel()
            assert (await client.frame(answer=False)).opcode is Opcode.CLOSE
            await server.over.wait()


async def test_who_does_not_read_has_the_close_timeout(hosted: Served, patient_clock: MockClock, records: Any) -> None:
    async with hosted(flood, settings=SETTINGS) as server, server.connect(receive_buffer=4096) as client:
        await wait_all_tasks_blocked()
        async with seconds(3):
            server.scope.cancel()
            with pytest.raises(trio.BrokenResourceError):
                await everything(client)
    [record] = records.read("INFO")
    assert record["code"] == 1012


async def everything(client: Any) -> None:
    """Read, but only once the server has given up waiting for that."""
    await trio.sleep(3)
    while await client.frame():
        pass
    raise trio.BrokenResourceError  # the end of the stream may come instead of a reset


async def test_who_does_not_read_when_the_handler_returns_has_the_stall_timeout_and_that_of_closing(
    hosted: Served, patient_clock: MockClock, records: Any
) -> None:
    settings = replace(SETTINGS, stall_timeout=5)
    sockets: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        sockets.append(ws)
        await ws.send(bytes(MORE_THAN_SOCKETS_HOLD))

    async with hosted(handler, settings=settings) as server, server.connect(receive_buffer=4096):
        await wait_all_tasks_blocked()
        async with seconds(8, 0.5):
            await sockets[0].close()  # which returns when it is closed
        [record] = records.read("INFO")
        assert record["code"] == 1000


async def test_the_server_ends_in_time_whatever_its_parts_do(
    served: Served, patient_clock: MockClock, records: Any
) -> None:
    """A `drain` that hangs, a handler that does not hear, a client that does not read."""
    steps: list[float] = []

    async def drain() -> None:
        try:
            await trio.sleep_forever()
        finally:
            steps.append(trio.current_time())

    async def handler(ws: WebSocket) -> None:
        try:
            await flood(ws)
        finally:
            with trio.move_on_after(0.5, shield=True):
                await trio.sleep_forever()
            steps.append(trio.current_time())

    async with served(handler, settings=SETTINGS, drain=drain) as server, server.connect(receive_buffer=4096):
        await wait_all_tasks_blocked()
        server.scope.cancel()
        await server.over.wait()
        steps.append(trio.current_time())
    assert steps == [7, 7.5, 10.5]
    [record] = records.read("INFO")
    assert record["code"] == 1012


async def test_drain_is_awaited_when_accepting_has_stopped_and_before_anybody_is_closed(served: Served) -> None:
    drained = trio.Event()

    async def drain() -> None:
        with pytest.raises(OSError):  # noqa: PT011
            await trio.open_tcp_stream("127.0.0.1", server.port)
        await client.send("still here")
        assert await client.receive() == "still here"
        drained.set()

    async with served(echo, drain=drain) as server, server.connect() as client:
        server.scope.cancel()
        await drained.wait()
        assert await client.closed() == (1012, "")


async def test_a_drain_that_raises_is_reported_and_changes_nothing(served: Served, records: Any) -> None:
    async def drain() -> None:
        raise RuntimeError("cannot drain")

    async with served(echo, drain=drain) as server, server.connect() as client:
        server.scope.cancel()
        assert await client.closed() == (1012, "")
        [record] = records.read("ERROR")
        assert "cannot drain" in record["stack_trace"]


async def test_it_can_be_cancelled_at_any_step(served: Served) -> None:
    for steps in range(40):
        async with served(echo), trio.open_nursery() as nursery:
            nursery.start_soon(serve, echo, 0)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()


async def test_the_server_forgets_connections_that_ended(served: Served) -> None:
    async with served(greet_and_sleep) as server:
        async with server.connect() as client:
            assert await client.receive() == "hello"
            assert len(server.own.connections) == len(server.own._site.connections) == 1
            await client.close()
            assert await client.closed() == (1000, "")
        await wait_all_tasks_blocked()
        assert server.own.connections == frozenset()
        assert server.own._site.connections == {}


async def test_what_has_ended_is_freed_without_the_garbage_collector(served: Served) -> None:
    seen: list[weakref.ref[WebSocket]] = []

    async def answer(ws: WebSocket) -> None:
        seen.append(weakref.ref(ws))
        async for message in ws:
            await ws.send(message)

    gc.disable()
    try:
        async with served(answer) as server:
            async with server.connect() as client:
                await client.send("one")
                assert await client.receive() == "one"
                await client.close()
            async with server.connect() as client:
                await client.send("two")
                assert await client.receive() == "two"
                server.scope.cancel()
                assert await client.closed() == (1012, "")
        assert [reference() for reference in seen] == [None, None]
    finally:
        gc.enable()


# Something fails


@pytest.mark.parametrize("method", ["readable", "flush", "keep_alive"])
@pytest.mark.not_asgi("there is no readiness of ours")
async def test_a_bug_ends_one_connection_and_nothing_else(
    hosted: Served, patient_clock: MockClock, monkeypatch: pytest.MonkeyPatch, records: Any, method: str
) -> None:
    plain = getattr(NativeTransport, method)
    failures = [MemoryError("no memory")]

    def fail_once(transport: NativeTransport, *arguments: Any) -> None:
        if failures and transport._connection.request.path == "/bad":
            raise failures.pop()
        plain(transport, *arguments)

    async def answer_once(ws: WebSocket) -> None:
        await ws.send(await ws.receive())
        await trio.sleep_forever()

    async with (
        hosted(answer_once, settings=SETTINGS) as server,
        server.connect("/good") as good,
        server.connect("/bad") as bad,
    ):
        monkeypatch.setattr(NativeTransport, method, fail_once)
        await bad.send("one", "two")
        if method != "readable":
            assert await bad.receive() == "one"
        frame = await bad.frame(answer=False)
        [record] = records.read("ERROR")
        assert frame.data == (1011).to_bytes(2, "big") + record["error_id"].encode()
        assert "no memory" in record["stack_trace"]
        await good.send("undisturbed")
        assert await good.receive() == "undisturbed"


async def test_a_bug_before_the_handshake_ends_one_socket_and_nothing_else(
    served: Served, monkeypatch: pytest.MonkeyPatch, records: Any
) -> None:
    def fail(head: Head, data: bytes, peer: object) -> None:
        raise RuntimeError("a bug")

    async with served(echo) as server, server.connect() as good:
        with monkeypatch.context() as broken:
            broken.setattr(Head, "receive_data", fail)
            async with server.open() as stream:
                await stream.send_all(b"GET / HTTP/1.1")
                with suppress(trio.BrokenResourceError):
                    assert await stream.receive_some() == b""
        [record] = records.read("ERROR")
        assert record["peer"][0] == "127.0.0.1"
        await good.send("undisturbed")
        assert await good.receive() == "undisturbed"
