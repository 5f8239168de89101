"""What is particular to Tricorn as an application under plain Hypercorn. The rest is that of every host."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from trio.testing import MockClock, wait_all_tasks_blocked

from fixtures.handlers import echo, flood, greet_and_sleep
from fixtures.hosts import asgi, hypercorn
from tricorn import Disconnected, SettingError, Settings, WebSocket, asgi_app
from tricorn.application import LOOK, MARGIN
from tricorn.listening.asgi import AsgiWebSockets
from tricorn.listening.site import Site
from tricorn.transport.asgi import BUSY
from tricorn.transport.descriptors import Descriptors, Ends

Served = Callable[..., AbstractAsyncContextManager[Any]]

SETTINGS = Settings(close_timeout=3, drain_timeout=10, stall_timeout=1000)


@pytest.fixture
def application(running: Callable[..., AbstractAsyncContextManager[Any]]) -> Served:
    """`async with application(handler, **options) as server`."""
    return partial(running, asgi)


# How it ends


async def test_everybody_is_told_as_soon_as_the_worker_ends(application: Served, patient_clock: MockClock) -> None:
    drained = trio.Event()

    async def drain() -> None:
        drained.set()
        await trio.lowlevel.checkpoint()

    async with application(greet_and_sleep, settings=SETTINGS, drain=drain) as server, server.connect() as client:
        assert await client.receive() == "hello"
        began = trio.current_time()
        server.scope.cancel()
        assert await client.closed() == (1012, "")
        assert trio.current_time() - began <= LOOK
        assert drained.is_set()


async def test_a_drain_that_does_not_end_leaves_time_for_closing(application: Served, patient_clock: MockClock) -> None:
    options = {"settings": SETTINGS, "drain": trio.sleep_forever}
    async with application(greet_and_sleep, **options) as server, server.connect() as client:
        assert await client.receive() == "hello"
        began = trio.current_time()
        server.scope.cancel()
        assert await client.closed() == (1012, "")
        assert trio.current_time() - began == pytest.approx(10 - MARGIN - 3)


async def test_the_drain_timeout_holds_within_that_of_hypercorn(running: Any, patient_clock: MockClock) -> None:
    app = asgi_app(greet_and_sleep, settings=SETTINGS, drain=trio.sleep_forever)

    async def host(_: object, *, task_status: trio.TaskStatus[int]) -> None:
        await hypercorn(app, 100, task_status=task_status)

    async with running(host, None) as server, server.connect() as client:
        assert await client.receive() == "hello"
        began = trio.current_time()
        server.scope.cancel()
        assert await client.closed() == (1012, "")
        assert trio.current_time() - began <= 10 + LOOK - 3


async def test_a_drain_that_raises_is_reported_and_everybody_is_told(application: Served, records: Any) -> None:
    async def drain() -> None:
        raise RuntimeError("the drain is blocked")

    async with application(greet_and_sleep, settings=SETTINGS, drain=drain) as server, server.connect() as client:
        assert await client.receive() == "hello"
        server.scope.cancel()
        assert await client.closed() == (1012, "")
        [record] = records.read("ERROR")
        assert "the drain is blocked" in record["stack_trace"]


async def test_who_reads_nothing_is_cut_before_hypercorn_waits_for_it_for_ever(
    application: Served, patient_clock: MockClock
) -> None:
    """Where closing has less time than `close_timeout`."""
    settings = Settings(close_timeout=9.9, drain_timeout=10, stall_timeout=1000)
    async with application(flood, settings=settings) as server, server.connect(receive_buffer=4096):
        await wait_all_tasks_blocked()
        began = trio.current_time()
        server.scope.cancel()
        await server.over.wait()
        assert trio.current_time() - began < 10


async def test_nobody_is_let_in_while_it_ends() -> None:
    router = AsgiWebSockets(Site(echo, SETTINGS))
    await router.close()
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(event: dict[str, Any]) -> None:
        said.append(event)

    scope = {"path": "/", "query_string": b"", "http_version": "1.1", "headers": [(b"host", b"h")]}
    await router.serve({**scope, "extensions": {"websocket.http.response": {}}}, receive, send, lambda what: False)
    assert said[0]["status"] == 503


async def test_the_lifespan_of_the_app_inside(application: Served) -> None:
    seen: list[object] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        for _ in range(2):
            phase = (await receive())["type"]
            seen.append(phase)
            await send({"type": f"{phase}.complete"})

    async with application(greet_and_sleep, app=app, settings=SETTINGS) as server, server.connect() as client:
        assert await client.receive() == "hello"
        assert seen == ["lifespan.startup"]
        server.scope.cancel()
        await client.closed()
    assert seen == ["lifespan.startup", "lifespan.shutdown"]


async def test_an_app_that_does_not_start_up_ends_the_start() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    problem = pytest.RaisesExc(Exception, match="no database")
    with pytest.RaisesGroup(problem, flatten_subgroups=True, allow_unwrapped=True):
        await serve(asgi_app(echo, app=app), config)


# Who is let in


async def ask(app: Any, **scope: Any) -> list[dict[str, Any]]:
    """What an application says to a WebSocket that asks to be let in."""
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(event: dict[str, Any]) -> None:
        said.append(event)

    lifespan = trio.open_memory_channel[dict[str, Any]](1)
    async with trio.open_nursery() as nursery:
        await lifespan[0].send({"type": "lifespan.startup"})
        nursery.start_soon(app, {"type": "lifespan"}, lifespan[1].receive, _ignore)
        await wait_all_tasks_blocked()
        scope = {"type": "websocket", "http_version": "1.1", "query_string": b"", "client": None, **scope}
        await app(scope, receive, send)
        nursery.cancel_scope.cancel()
    return said


async def _ignore(event: object) -> None:
    await trio.lowlevel.checkpoint()


async def test_a_refusal_has_its_status_where_the_server_can_say_it() -> None:
    extensions = {"websocket.http.response": {}}
    app = asgi_app({"/ws": echo})
    start, body = await ask(app, path="/else", headers=[(b"Host", b"h")], extensions=extensions)
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 404)
    assert body["body"] == b"there is no WebSocket at /else\n"
    assert await ask(app, path="/else", headers=[(b"host", b"h")]) == [{"type": "websocket.close"}]


async def test_a_websocket_over_http_2_is_refused_and_told_what_to_set() -> None:
    extensions = {"websocket.http.response": {}}
    start, body = await ask(asgi_app(echo), path="/", http_version="2", headers=[], extensions=extensions)
    assert start["status"] == 501
    assert b"alpn_protocols" in body["body"]


@pytest.mark.parametrize(
    "changed", [{"deflate": "takeover"}, {"max_head_bytes": 100}, {"max_handshakes": 5}, {"peer_connections": 10}]
)
def test_a_setting_that_means_nothing_under_hypercorn_is_refused(changed: dict[str, Any]) -> None:
    [name] = changed
    with pytest.raises(SettingError, match=f"^{name}=.*: plain Hypercorn has no such setting"):
        asgi_app(echo, settings=Settings(**changed))


async def test_an_application_needs_its_lifespan() -> None:
    with pytest.raises(RuntimeError, match="without its lifespan"):
        await asgi_app(echo)({"type": "websocket"}, None, None)


async def test_there_is_no_room_past_max_connections(application: Served) -> None:
    async with application(greet_and_sleep, settings=Settings(max_connections=1)) as server, server.connect() as one:
        assert await one.receive() == "hello"
        async with server.open() as stream:
            await stream.send_all(server.client(stream).request())
            response = await stream.receive_some()
            assert response.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nretry-after: " in response


async def test_who_sends_too_fast(application: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        async for _ in ws:
            pass

    settings = Settings(messages_per_second=1)
    async with application(handler, settings=settings) as server, server.connect() as client:
        await client.send(*["again"] * 20)
        assert await client.closed() == (4003, "more than 1 messages per second")


async def test_a_message_that_is_too_long(application: Served, records: Any) -> None:
    received: list[object] = []

    async def handler(ws: WebSocket) -> None:
        async for message in ws:
            received.append(message)

    async with application(handler, settings=Settings(max_message_bytes=3)) as server, server.connect() as client:
        await client.send("ü.", "üü", "no more")
        assert await client.closed() == (1009, "a message may have at most 3 bytes")
    assert received == ["ü."]
    [record] = records.read("WARNING")
    assert (record["code"], record["messages_received"], record["bytes_received"]) == (1009, 1, 14)


async def test_requests_go_to_the_app_and_without_one_they_are_told(application: Served) -> None:
    async with application(echo) as server, server.open() as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        response = await stream.receive_some()
        assert response.startswith(b"HTTP/1.1 426 ")
        assert b"upgrade: websocket" in response


# Who reads


async def test_who_received_and_is_busy_is_cancelled_when_the_peer_is_gone(
    application: Served, patient_clock: MockClock
) -> None:
    ended = trio.Event()

    async def handler(ws: WebSocket) -> None:
        for _ in range(2):  # the second one by its own task
            await ws.receive()
        await ws.send("busy")
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with application(handler) as server, server.connect() as client:
        await client.send("one")
        await wait_all_tasks_blocked()
        await client.send("two")
        assert await client.receive() == "busy"
        client.reset()
        with trio.fail_after(1.5 * BUSY):
            await ended.wait()


async def test_messages_stay_in_order_whoever_reads_them(application: Served, patient_clock: MockClock) -> None:
    """The handler itself, or while it is busy the reading task."""
    received: list[str | bytes] = []

    async def handler(ws: WebSocket) -> None:
        for pause in (0, 0, 2 * BUSY, 0, BUSY / 2, 0, 2 * BUSY, 2 * BUSY, 0, 0, 0):
            await trio.sleep(pause)
            received.append(await ws.receive())

    async with application(handler) as server, server.connect() as client:
        for number in range(11):
            await client.send(f"{number}")
            await trio.sleep(BUSY / 3)
        assert await client.closed() == (1000, "")
    assert received == [f"{number}" for number in range(11)]


async def test_a_receive_of_the_server_that_fails_in_the_handler_is_told_there(records: Any) -> None:
    events = [{"type": "websocket.receive", "text": "one"}, {"type": "websocket.connect"}]
    ends: list[int] = []

    async def handler(ws: WebSocket) -> None:
        assert await ws.receive() == "one"
        try:
            await ws.receive()
        except Disconnected as end:
            ends.append(end.code)

    async def receive() -> dict[str, Any]:
        await wait_all_tasks_blocked()
        return events.pop()

    await converse(handler, receive, _ignore)
    assert ends == [1011]
    [record] = records.read("ERROR")
    assert "pop from empty list" in record["stack_trace"]


# Who is there


async def test_the_kernel_asks_whether_a_peer_is_still_there(application: Served, patient_clock: MockClock) -> None:
    seen: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        seen.append(ws)
        await trio.sleep_forever()

    settings = Settings(ping_interval=2, ping_timeout=3)
    async with application(handler, settings=settings) as server, server.connect():
        await trio.sleep(0.6)
        [ws] = seen
        reach = Descriptors().way(Ends(ws.request.peer, ("127.0.0.1", server.port)))
        options: list[int] = []

        def look(sock: socket.socket) -> None:
            options.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE))
            options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL))
            options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))

        assert reach(look)
        assert options == [1, 2, 1, 5000]


@asynccontextmanager
async def over_a_unix_socket(handler: Any, path: Path) -> AsyncGenerator[trio.SocketStream]:
    config = Config()
    config.bind = [f"unix:{path}"]
    config.errorlog = None
    async with trio.open_nursery() as nursery:
        told = trio.Event()
        app = asgi_app(handler)
        await nursery.start(partial(serve, app, config, shutdown_trigger=told.wait))
        async with await trio.open_unix_socket(str(path)) as stream:
            yield stream
        told.set()


async def test_over_a_unix_socket_the_peer_is_nobody_in_particular(tmp_path: Path) -> None:
    seen: list[object] = []

    async def handler(ws: WebSocket) -> None:
        seen.append(ws.request.peer)
        await ws.send(await ws.receive())

    async with over_a_unix_socket(handler, tmp_path / "socket") as stream:
        await stream.send_all(
            b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 101 ")
        await stream.send_all(b"\x81\x81\0\0\0\0x")
        answer = b""
        while b"\x81\x01x" not in answer:
            answer += await stream.receive_some()
    assert seen == [None]


# What Hypercorn 0.18 does


@pytest.mark.parametrize("said", [(4321, "bye"), None])
async def test_hypercorn_does_not_tell_why_the_peer_left(running: Any, said: tuple[int, str] | None) -> None:
    """Nor does what it keeps of a connection. When it does, what is marked `hides_codes` and `not_asgi` can go."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "websocket":
            raise NotImplementedError
        await receive()
        await send({"type": "websocket.accept"})
        seen.append(await receive())

    async with running(hypercorn, app, graceful_timeout=3) as server, server.connect() as client:
        if said:
            await client.close(*said)
            assert await client.closed() == said
        else:
            client.reset()
        await wait_all_tasks_blocked()
    assert seen == [{"type": "websocket.disconnect", "code": 1006}]


# What other ASGI servers may do


async def test_a_server_that_raises_when_the_peer_is_gone() -> None:
    """ASGI 3.0: `send` raises an OSError then."""
    ends: list[int] = []

    async def handler(ws: WebSocket) -> None:
        await ws.send("one")
        try:
            await ws.receive()
        except Disconnected as end:
            ends.append(end.code)

    events = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1001, "reason": "bye"}]

    async def receive() -> dict[str, Any]:
        await wait_all_tasks_blocked()
        return events.pop(0)

    async def send(event: dict[str, Any]) -> None:
        if event["type"] == "websocket.send":
            raise OSError

    await converse(handler, receive, send)
    assert ends == [1001]


async def test_a_server_that_fails_is_reported_and_ends_the_connection(records: Any) -> None:
    events = [{"type": "websocket.connect"}]

    async def receive() -> dict[str, Any]:
        if not events:
            await trio.sleep_forever()
        return events.pop()

    async def send(event: dict[str, Any]) -> None:
        if event["type"] == "websocket.send":
            raise RuntimeError("a bug of the server's")
        await trio.lowlevel.checkpoint()

    with trio.fail_after(10):
        await converse(greet_and_sleep, receive, send)
    assert any("a bug of the server's" in record["stack_trace"] for record in records.read("ERROR"))


async def converse(handler: Any, receive: Any, send: Any) -> None:
    app: Any = asgi_app(handler, settings=Settings(close_timeout=0.1))
    lifespan = trio.open_memory_channel[dict[str, Any]](1)
    async with trio.open_nursery() as nursery:
        await lifespan[0].send({"type": "lifespan.startup"})
        nursery.start_soon(app, {"type": "lifespan"}, lifespan[1].receive, _ignore)
        await wait_all_tasks_blocked()
        scope = {"type": "websocket", "http_version": "1.1", "query_string": b"", "path": "/", "client": None}
        await app({**scope, "headers": [(b"host", b"h")]}, receive, send)
        nursery.cancel_scope.cancel()


async def test_a_connection_may_end_before_it_is_accepted(records: Any) -> None:
    """It is looked after, closed and aborted like the others from then on."""
    site = Site(greet_and_sleep, SETTINGS)
    said: list[str] = []
    accepted = trio.Event()

    async def receive() -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"type": "websocket.disconnect", "code": 1006} if said else {"type": "websocket.connect"}

    async def send(event: dict[str, Any]) -> None:
        said.append(event["type"])
        await accepted.wait()

    scope = {"path": "/", "query_string": b"", "http_version": "1.1", "headers": [(b"host", b"h")]}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(AsgiWebSockets(site).serve, scope, receive, send, lambda what: False)
        await wait_all_tasks_blocked()
        [connection] = site.connections
        for now in (5, 10):
            connection.transport.keep_alive(now, 0)
        connection.cancel()
        connection.transport.abort()
        accepted.set()
    assert said == ["websocket.accept"]
    assert site.connections == {}
    [record] = records.read("INFO")
    assert (record["code"], record["reason"]) == (1006, "no close frame")
