"""Behind real proxies: nginx, HAProxy and Caddy, with the configurations that docs/operations.md shows."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
import trio
from hypercorn.config import Config
from websockets.client import ClientProtocol
from websockets.frames import Close, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

import tricorn
from fixtures.client import Client
from fixtures.handlers import echo
from fixtures.hosts import native, server_context
from fixtures.proxies import Proxy, ProxyOf
from tricorn import Settings, WebSocket
from tricorn.chat import Chat

Served = Callable[..., AbstractAsyncContextManager[Any]]

SETTINGS = Settings(trusted_proxies=("unix",), ping_interval=inf)
WEBSOCKETS = "proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;"
OTHER = "127.0.0.2"  # an address of this machine that is not the proxy's


async def page(scope: Any, receive: Any, send: Any) -> None:
    """Tells what it knows about the client."""
    assert scope["type"] == "http"
    body = json.dumps([scope["client"], scope["root_path"], scope["path"]]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def tell(ws: WebSocket) -> None:
    """Sends what it knows about the client, and then what it gets."""
    await ws.send(json.dumps([ws.request.peer, ws.request.secure]))
    await echo(ws)


class Room:
    """Echoes, closes when it is told to, and knows how each connection ended."""

    def __init__(self) -> None:
        self.ended, self._endings = trio.open_memory_channel[tuple[int, str]](inf)[::-1]

    async def __call__(self, ws: WebSocket) -> None:
        async for message in ws:
            if message == "close":
                break
            await ws.send(message)
        else:
            assert ws.closed is not None
            self._endings.send_nowait((ws.closed.code, ws.closed.reason))


@pytest.fixture
def behind(running: Any) -> Served:
    """`async with behind(proxy_of, handler, **options) as proxy`: a server on a Unix socket, and a proxy of it.

    `proxy` has the options of the proxy.
    """

    @asynccontextmanager
    async def run(
        proxy_of: ProxyOf, handler: Any, *, proxy: dict[str, str] | None = None, **options: Any
    ) -> AsyncGenerator[Proxy]:
        options = {"settings": SETTINGS, "app": page, **options}
        with TemporaryDirectory() as directory:
            bind = [f"unix:{Path(directory, 's')}"]
            async with (
                running(native, handler, bind=bind, **options) as server,
                proxy_of(server.port, **(proxy or {})) as started,
            ):
                yield started

    return run


@asynccontextmanager
async def connect(proxy: Proxy, source: str = "127.0.0.1") -> AsyncGenerator[trio.SocketStream]:
    """A connection to a proxy from an address of this machine."""
    sock = trio.socket.socket()
    with sock:
        await sock.bind((source, 0))
        await sock.connect(("127.0.0.1", proxy.port))
        yield trio.SocketStream(sock)


async def ask(stream: trio.SocketStream, path: str = "/", host: str = "example.org") -> str:
    """Ask for a page; return its content."""
    await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    response = b""
    while b"\r\n\r\n" not in response:
        response += await _some(stream)
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), response
    [length] = [int(line[15:]) for line in head.splitlines() if line.lower().startswith(b"content-length:")]
    while len(body) < length:
        body += await _some(stream)
    return body.decode()


async def _some(stream: trio.SocketStream) -> bytes:
    data = await stream.receive_some()
    assert data
    return bytes(data)


async def upgrade(proxy: Proxy, stream: Any, path: str = "/", **headers: str) -> Client:
    """A client past its handshake."""
    uri = parse_uri(f"ws://127.0.0.1:{proxy.port}{path}")
    client = Client(stream, ClientProtocol(uri, max_size=None))
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    await stream.send_all(client.request()[:-2] + more.encode() + b"\r\n")
    await client.handshake()
    return client


@asynccontextmanager
async def visit(proxy: Proxy, path: str = "/", source: str = "127.0.0.1", **headers: str) -> AsyncGenerator[Client]:
    async with connect(proxy, source) as stream:
        yield await upgrade(proxy, stream, path, **headers)


# All of them


async def test_close_codes_pass_both_ways(behind: Served, proxy_of: ProxyOf) -> None:
    room = Room()
    async with behind(proxy_of, room) as proxy:
        async with connect(proxy) as stream:
            await ask(stream)
            client = await upgrade(proxy, stream)
            await client.send("hello")
            assert await client.receive() == "hello"
            await client.close(4321, "enough")
            assert await client.closed() == (4321, "enough")
            assert await room.ended.receive() == (4321, "enough")
        async with visit(proxy) as client:
            await client.send("close")
            assert await client.closed() == (1000, "")


async def test_a_violation_is_answered_with_its_close_frame(behind: Served, proxy_of: ProxyOf) -> None:
    room = Room()
    async with behind(proxy_of, room) as proxy, connect(proxy) as stream:
        await ask(stream)
        client = await upgrade(proxy, stream)
        await stream.send_all(b"\xf1\x80\0\0\0\0")  # reserved bits
        frame = await client.frame(answer=False)
        assert frame is not None
        assert Close.parse(frame.data).code == 1002
        assert (await room.ended.receive())[0] == 1002


async def test_large_messages(behind: Served, proxy_of: ProxyOf) -> None:
    size = 4 * 2**20
    settings = Settings(max_message_bytes=size, trusted_proxies=("unix",))
    async with behind(proxy_of, echo, settings=settings) as proxy, visit(proxy) as client:
        for message in (bytes(size), "x" * size):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send, message)
                assert await client.receive() == message


async def test_the_peer_is_the_client(behind: Served, proxy_of: ProxyOf) -> None:
    forged = {"X_Forwarded_For": "203.0.113.9", "Forwarded": "for=203.0.113.9", "X_Forwarded_Proto": "https"}
    async with behind(proxy_of, tell) as proxy:
        for source in ("127.0.0.1", OTHER):
            async with visit(proxy, source=source, **forged) as client:
                assert json.loads(str(await client.receive())) == [[source, 0], False]
            async with connect(proxy, source) as stream:
                assert json.loads(await ask(stream)) == [[source, 0], "", "/"]


async def test_a_page_of_the_proxys_host_may_connect(behind: Served, proxy_of: ProxyOf) -> None:
    async with behind(proxy_of, tell) as proxy:
        async with visit(proxy, Origin=f"http://127.0.0.1:{proxy.port}") as client:
            await client.receive()
        with pytest.raises(AssertionError, match="HTTP 403"):
            async with visit(proxy, Origin="http://evil.example"):
                raise NotImplementedError


async def test_sockets_are_counted_by_client(behind: Served, proxy_of: ProxyOf) -> None:
    settings = Settings(trusted_proxies=("unix",), peer_connections=2)
    async with behind(proxy_of, echo, settings=settings) as proxy, visit(proxy), visit(proxy):
        with pytest.raises(AssertionError, match="HTTP 503"):
            async with visit(proxy):
                raise NotImplementedError
        async with visit(proxy, source=OTHER), visit(proxy, source=OTHER):
            pass


async def test_one_user_that_does_not_answer_our_close_does_not_cut_the_others(
    behind: Served, proxy_of: ProxyOf
) -> None:
    settings = Settings(trusted_proxies=("unix",), close_timeout=0.5, ping_interval=inf)
    async with behind(proxy_of, Room(), settings=settings) as proxy, visit(proxy) as one, visit(proxy) as other:
        async with visit(proxy) as silent:
            await silent.send("close")
            assert await silent.closed(answer=False) == (1000, "")  # the end of the stream came after close_timeout
        for client in (one, other):
            await client.send("hello")
            assert await client.receive() == "hello"


@asynccontextmanager
async def without_a_key(running: Any, proxy_of: ProxyOf) -> AsyncGenerator[Proxy]:
    """The chat, behind a proxy whose address is of this machine, as the Host may be."""
    chats: list[Chat] = []

    async def session(ws: WebSocket) -> None:
        await chats[0].session(ws)

    async with (
        running(native, session, app=page) as server,
        proxy_of(server.port) as proxy,
        Chat(NotImplemented) as chat,
    ):
        chats.append(chat)
        yield proxy


async def test_without_a_key_nobody_comes_in(running: Any, proxy_of: ProxyOf) -> None:
    async with without_a_key(running, proxy_of) as proxy, visit(proxy) as client:
        code, reason = await client.closed()
        assert code == 4501
        assert reason.endswith("a server behind a proxy needs a key")


async def test_without_a_key_an_nginx_that_says_nothing(running: Any, nginx_of: ProxyOf) -> None:
    plain = "proxy_pass http://127.0.0.1:{upstream};"
    async with without_a_key(running, partial(nginx_of, passing=plain)) as proxy:
        with pytest.raises(AssertionError, match="HTTP 200"):  # it speaks HTTP/1.0, which has no WebSockets
            async with visit(proxy):
                raise NotImplementedError
    async with without_a_key(running, partial(nginx_of, passing=plain + WEBSOCKETS)) as proxy:
        with pytest.raises(AssertionError, match="HTTP 403"):
            async with visit(proxy, Origin="http://example.org"):
                raise NotImplementedError
        async with visit(proxy) as client:  # nothing tells it from a program on this machine: docs/security.md
            assert json.loads(str(await client.receive()))["user"] == "local"


# Long idle


@pytest.mark.parametrize(
    ("fixture", "options"),
    [("nginx_of", {"more": "proxy_read_timeout 1s;"}), ("haproxy_of", {"idle": "1s"})],
)
async def test_pings_keep_an_idle_connection_open(
    behind: Served, request: pytest.FixtureRequest, fixture: str, options: dict[str, str]
) -> None:
    proxy_of = request.getfixturevalue(fixture)
    settings = Settings(trusted_proxies=("unix",), ping_interval=0.25)
    async with behind(proxy_of, Room(), settings=settings, proxy=options) as proxy, visit(proxy) as client:
        start = trio.current_time()
        while trio.current_time() - start < 3:
            frame = await client.frame()
            assert frame is not None
            assert frame.opcode is Opcode.PING
        await client.send("hello")
        while (frame := await client.frame()) is not None and frame.opcode is Opcode.PING:
            pass
        assert frame is not None
        assert frame.data == b"hello"
    room = Room()
    async with behind(proxy_of, room, proxy=options) as proxy, visit(proxy) as client:  # or the proxy ends it
        assert await client.frame() is None
        assert (await room.ended.receive())[0] == 1006


# nginx


async def test_an_upgrade_on_a_kept_upstream_connection(running: Any, nginx_of: ProxyOf) -> None:
    settings = Settings(ping_interval=inf)  # the proxy is the peer
    async with (
        running(native, tell, settings=settings, app=page) as server,
        nginx_of(server.port) as proxy,
        connect(proxy) as first,
        connect(proxy) as second,
    ):
        upstream = json.loads(await ask(first))[0]
        client = await upgrade(proxy, second)
        assert json.loads(str(await client.receive()))[0] == upstream
        await client.close(4321)
        assert (await client.closed())[0] == 4321


async def test_open_connections_outlive_a_reload(behind: Served, nginx_of: ProxyOf) -> None:
    async with behind(nginx_of, Room()) as proxy, visit(proxy) as client:
        await proxy.reload(version=2)
        version = ""
        while version != "2":
            async with connect(proxy) as stream:
                version = await ask(stream, "/version")
        for message in ("hello", "again"):
            await client.send(message)
            assert await client.receive() == message
        async with visit(proxy) as new:
            await new.send("close")
            assert await new.closed() == (1000, "")
        await client.close(4321)
        assert (await client.closed())[0] == 4321


async def test_under_a_prefix(behind: Served, nginx_of: ProxyOf) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await page(scope, receive, send)
            return
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        told = [scope["client"], scope["root_path"], scope["path"]]
        await send({"type": "websocket.send", "text": json.dumps(told)})

    handler = tricorn.asgi_handler(app)
    config = Config.from_mapping(root_path="/app")
    options = {"location": "/app/", "path": "/"}
    async with behind(nginx_of, handler, app=None, config=config, proxy=options) as proxy:
        async with connect(proxy) as stream:
            assert json.loads(await ask(stream, "/app/x")) == [["127.0.0.1", 0], "/app", "/x"]
        async with visit(proxy, "/app/room") as client:
            assert json.loads(str(await client.receive())) == [["127.0.0.1", 0], "/app", "/room"]


# HAProxy


@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
@pytest.mark.parametrize("tls", ["", "ssl verify none alpn http/1.1"])
async def test_the_proxy_protocol(running: Any, haproxy_of: ProxyOf, version: str, tls: str) -> None:
    settings = Settings(trusted_proxies=("127.0.0.1",), proxy_protocol=True, ping_interval=inf)
    options: dict[str, Any] = {"settings": settings, "app": page}
    if tls:
        options["ssl_context"] = server_context()
    async with (
        running(native, tell, **options) as server,
        haproxy_of(server.port, server=f"{version} {tls}") as proxy,
    ):
        for source in (OTHER, "127.0.0.3"):
            async with connect(proxy, source) as stream:
                own = list(stream.socket.getsockname())
                assert json.loads(await ask(stream))[0] == own
                client = await upgrade(proxy, stream)
                assert json.loads(str(await client.receive())) == [own, bool(tls)]
                await client.close(4321)
                assert (await client.closed())[0] == 4321


async def test_the_proxy_protocol_on_a_unix_socket(behind: Served, haproxy_of: ProxyOf) -> None:
    settings = Settings(trusted_proxies=("unix",), proxy_protocol=True)
    async with (
        behind(haproxy_of, tell, settings=settings, proxy={"server": "send-proxy-v2"}) as proxy,
        connect(proxy, OTHER) as stream,
    ):
        client = await upgrade(proxy, stream)
        assert json.loads(str(await client.receive()))[0] == list(stream.socket.getsockname())


class Http2:
    """A client's connection that carries WebSockets (RFC 8441), one on each stream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._received: dict[int, trio.MemorySendChannel[bytes]] = {}
        self._sending = trio.Lock()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        self._h2.initiate_connection()
        await self.flush()
        while data := await self._stream.receive_some():
            for event in self._h2.receive_data(data):
                if isinstance(event, h2.events.RemoteSettingsChanged):
                    task_status.started()
                elif isinstance(event, h2.events.ResponseReceived):
                    self._received[event.stream_id].send_nowait(dict(event.headers)[":status"].encode())
                elif isinstance(event, h2.events.DataReceived):
                    self._received[event.stream_id].send_nowait(event.data)
                elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                    self._received[event.stream_id].close()
            await self.flush()

    async def flush(self) -> None:
        async with self._sending:
            await self._stream.send_all(self._h2.data_to_send())

    async def connect(self) -> Client:
        number = self._h2.get_next_available_stream_id()
        self._received[number], received = trio.open_memory_channel[bytes](inf)
        request = {":method": "CONNECT", ":protocol": "websocket", ":scheme": "http", ":path": "/", ":authority": "h"}
        self._h2.send_headers(number, [*request.items(), ("sec-websocket-version", "13")])
        await self.flush()
        assert await received.receive() == b"200"
        stream: Any = Http2Stream(self, number, received)
        return Client(stream, ClientProtocol(parse_uri("ws://h/"), max_size=None, state=State.OPEN))

    async def send(self, number: int, data: bytes) -> None:
        self._h2.send_data(number, data)
        await self.flush()


class Http2Stream:
    def __init__(self, connection: Http2, number: int, received: trio.MemoryReceiveChannel[bytes]) -> None:
        self._connection = connection
        self._number = number
        self._received = received

    async def send_all(self, data: bytes) -> None:
        await self._connection.send(self._number, data)

    async def receive_some(self, size: int = 0) -> bytes:
        try:
            return await self._received.receive()
        except trio.EndOfChannel:
            return b""


async def test_several_users_on_one_http2_connection_of_the_proxy(behind: Served, haproxy_of: ProxyOf) -> None:
    settings = Settings(trusted_proxies=("unix",), close_timeout=0.5, ping_interval=inf)
    options = {"bind": "proto h2"}
    async with (
        behind(haproxy_of, Room(), settings=settings, proxy=options) as proxy,
        connect(proxy) as stream,
        trio.open_nursery() as nursery,
    ):
        http2 = Http2(stream)
        await nursery.start(http2.run)
        clients = [await http2.connect() for _ in range(4)]
        silent = await http2.connect()
        await silent.send("close")
        assert await silent.closed(answer=False) == (1000, "")
        for client in clients:
            await client.send("hello")
            assert await client.receive() == "hello"
            await client.close(4321)
            assert (await client.closed())[0] == 4321
        nursery.cancel_scope.cancel()
