"""What is trio-websocket's own: TLS, requests that are refused, and a program around the handler."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import trio
import trustme
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked
from trio_websocket import WebSocketRequest, serve_websocket, wrap_server_stream
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode

from fixtures.handlers import echo, flood, greet_and_sleep
from tricorn import SettingError, Settings, WebSocket
from tricorn.trio_websocket import adapt

Served = Callable[..., AbstractAsyncContextManager[Any]]

SETTINGS = Settings(close_timeout=3, stall_timeout=8, ping_interval=1000, ping_timeout=1000)

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


async def embedding(
    handler: Any, *, task_status: trio.TaskStatus[int], ssl_context: ssl.SSLContext | None = None
) -> None:
    """A program that serves handlers of trio-websocket."""
    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve_websocket, handler, "127.0.0.1", 0, ssl_context)
        task_status.started(server.port)


@pytest.fixture
def embedded(running: Any) -> Served:
    """`async with embedded(a handler of trio-websocket, ssl_context=…) as server`."""
    return partial(running, embedding)


@pytest.fixture
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's."""
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(client)
    return server, client


@asynccontextmanager
async def secure(server: Any, context: ssl.SSLContext) -> AsyncGenerator[Any]:
    """A client over TLS, past its handshake."""
    async with server.open() as stream:
        client = server.client(trio.SSLStream(stream, context, server_hostname="127.0.0.1"))
        await client.stream.send_all(client.request())
        await client.handshake()
        yield client


# TLS


async def test_over_tls_it_is_the_same(embedded: Served, contexts: Any, records: Any) -> None:
    messages = ["text", b"", bytes(2**20)]
    async with embedded(adapt(echo), ssl_context=contexts[0]) as server, secure(server, contexts[1]) as client:
        for message in messages:
            await client.send(message)
            assert await client.receive() == message
        await client.close(4321, "bye")
        assert (await client.frame()).data == (4321).to_bytes(2, "big") + b"bye"
    [record] = records.read("INFO")
    assert (record["code"], record["close_received"], record["close_sent"]) == (4321, 4321, 4321)


async def test_over_tls_who_is_silent_is_told_of_the_end(embedded: Served, contexts: Any) -> None:
    async with (
        embedded(adapt(greet_and_sleep), ssl_context=contexts[0]) as server,
        secure(server, contexts[1]) as client,
    ):
        assert await client.receive() == "hello"
        server.scope.cancel()
        assert (await client.frame()).data == (1012).to_bytes(2, "big")


async def test_over_tls_who_does_not_read_is_given_up(
    embedded: Served, contexts: Any, patient_clock: MockClock, records: Any
) -> None:
    async with (
        embedded(adapt(flood, settings=SETTINGS), ssl_context=contexts[0]) as server,
        secure(server, contexts[1]),
    ):
        await trio.sleep(60)
        [record] = records.read("INFO")
        assert (record["code"], record["reason"]) == (4001, "the peer stopped reading")


# Settings


async def test_messages_are_compressed_if_the_settings_say_so(embedded: Served) -> None:
    settings = Settings(deflate="takeover")
    extensions = [ClientPerMessageDeflateFactory()]
    async with embedded(adapt(echo, settings=settings)) as server, server.connect(extensions=extensions) as client:
        [_] = client.protocol.extensions
        for message in ("text", bytes(100_000), "text"):
            await client.send(message)
            assert await client.receive() == message
    async with embedded(adapt(echo)) as server, server.connect(extensions=extensions) as client:
        assert client.protocol.extensions == []


@pytest.mark.parametrize("changed", [{"max_head_bytes": 100}, {"max_handshakes": 5}, {"peer_connections": 10}])
def test_a_setting_that_means_nothing_is_refused(changed: dict[str, Any]) -> None:
    [name] = changed
    with pytest.raises(SettingError, match=f"^{name}=.*: trio-websocket has no such setting"):
        adapt(echo, settings=Settings(**changed))


# The handshake


@pytest.mark.parametrize(
    ("path", "origin", "answer"),
    [
        ("/elsewhere", None, b"HTTP/1.1 404 "),
        ("/ws", "https://evil.example", b"HTTP/1.1 403 "),
        ("/ws", "https://good.example", b"HTTP/1.1 101 "),
        ("/ws", "itself", b"HTTP/1.1 101 "),
    ],
)
async def test_requests_are_checked_as_on_the_native_host(
    embedded: Served, path: str, origin: str | None, answer: bytes
) -> None:
    settings = Settings(origins=("https://good.example",))
    async with embedded(adapt({"/ws": echo}, settings=settings)) as server, server.open() as stream:
        if origin == "itself":
            origin = f"http://127.0.0.1:{server.port}"
        await stream.send_all(server.client(stream, path, origin=origin).request())
        assert (await stream.receive_some()).startswith(answer)


async def test_the_handler_sees_the_request(embedded: Served) -> None:
    seen: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        seen.append(ws)

    async with (
        embedded(adapt(handler, subprotocols=["b", "a"])) as server,
        server.connect("/a%20b?c=d", subprotocols=["x", "a", "b"]) as client,
    ):
        assert client.protocol.subprotocol == "a"
        assert await client.closed() == (1000, "")
        [ws] = seen
        assert (ws.request.path, ws.request.query, ws.subprotocol) == ("/a b", "c=d", "a")
        assert ws.request.headers["host"] == f"127.0.0.1:{server.port}"
        assert ws.request.peer == client.stream.socket.getsockname()


async def test_however_much_came_behind_the_head_is_not_lost(embedded: Served) -> None:
    async with embedded(adapt(echo)) as server, server.open() as stream:
        client = server.client(stream)
        early = [Frame(Opcode.BINARY, bytes([number]) * 10_000) for number in range(5)]
        await stream.send_all(client.request() + b"".join(each.serialize(mask=True) for each in early))
        await client.handshake()
        assert [await client.receive() for _ in early] == [each.data for each in early]


@pytest.mark.parametrize("origin", [None, "https://evil.example"])
async def test_who_goes_before_it_is_answered_disturbs_nobody(embedded: Served, origin: str | None) -> None:
    """Whether it is accepted or refused."""
    gone = trio.Event()
    adapted = adapt(echo)

    async def late(request: WebSocketRequest) -> None:
        if request.path == "/late":
            await gone.wait()
        await adapted(request)

    async with embedded(late) as server, server.connect() as other:
        async with server.open() as stream:
            client = server.client(stream, "/late", origin=origin)
            await stream.send_all(client.request())
            await wait_all_tasks_blocked()
            client.reset()
        await wait_all_tasks_blocked()
        gone.set()
        await wait_all_tasks_blocked()
        await other.send("undisturbed")
        assert await other.receive() == "undisturbed"


async def test_a_bug_ends_one_connection_and_nothing_else(
    embedded: Served, monkeypatch: pytest.MonkeyPatch, records: Any
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    async with embedded(adapt(echo)) as server, server.connect() as other:
        with monkeypatch.context() as broken, suppress(trio.BrokenResourceError):
            broken.setattr("tricorn.trio_websocket.check_upgrade", fail)
            async with server.open() as stream:
                await stream.send_all(UPGRADE)
                assert await stream.receive_some() == b""
        [record] = records.read("ERROR")
        assert record["path"] == "/"
        await other.send("undisturbed")
        assert await other.receive() == "undisturbed"


async def test_what_is_not_on_a_socket_is_refused(nursery: trio.Nursery) -> None:
    ours, theirs = memory_stream_pair()
    nursery.start_soon(ours.send_all, UPGRADE)
    request = await wrap_server_stream(nursery, theirs)
    with pytest.raises(TypeError, match="are on sockets, with TLS or without, not on a StapledStream"):
        await adapt(echo)(request)


# The program around it


async def test_a_deadline_around_the_handler_closes_with_1012(embedded: Served, patient_clock: MockClock) -> None:
    adapted = adapt(greet_and_sleep)

    async def for_a_minute(request: WebSocketRequest) -> None:
        with trio.move_on_after(60):
            await adapted(request)

    async with embedded(for_a_minute) as server, server.connect() as client:
        assert await client.receive() == "hello"
        while (frame := await client.frame()).opcode is Opcode.PING:
            pass
        assert frame.data == (1012).to_bytes(2, "big")
        assert trio.current_time() == 60
