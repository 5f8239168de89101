"""TLS on the server's own listener: the WebSockets in it are the native ones, and HTTP/2 is for pages."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest
import trio
from hypercorn.config import Config
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.frames import Frame, Opcode

from fixtures.clock import seconds
from fixtures.handlers import echo
from fixtures.hosts import TlsStream, authority, client_context, page, server_context
from tricorn import Settings, WebSocket
from tricorn.listening.accept import SPARE

Served = Callable[..., AbstractAsyncContextManager[Any]]

SETTINGS = Settings(stall_timeout=6, close_timeout=3, drain_timeout=10, handshake_timeout=5, ping_interval=inf)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Hypercorn's, with a certificate for 127.0.0.1."""
    certificate = authority().issue_cert("127.0.0.1")
    chain = tmp_path / "chain.pem"
    key = tmp_path / "key.pem"
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(chain, append=True)
    certificate.private_key_pem.write_to_path(key)
    return Config.from_mapping(certfile=str(chain), keyfile=str(key))


@asynccontextmanager
async def encrypted(server: Any, *protocols: str, receive_buffer: int | None = None) -> AsyncGenerator[Any]:
    """A stream through TLS that has said nothing yet."""
    async with server.open(receive_buffer) as stream:
        wrapped = TlsStream(stream, *protocols)
        await wrapped.do_handshake()
        yield wrapped


class Multiplexed:
    """A client of HTTP/2."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._events: list[Any] = []

    async def start(self, window: int = 65535) -> None:
        self.h2.local_settings.initial_window_size = window
        self.h2.initiate_connection()
        await self.flush()
        await self.event(h2.events.RemoteSettingsChanged)

    async def ask(self, path: str = "/", method: str = "GET", *headers: tuple[str, str]) -> int:
        """Ask for a page; return the stream's number."""
        number = self.h2.get_next_available_stream_id()
        request = [(":method", method), (":scheme", "https"), (":path", path), (":authority", "127.0.0.1"), *headers]
        self.h2.send_headers(number, request, end_stream=method == "GET")
        await self.flush()
        return number

    async def status(self) -> str:
        """The status of the next response."""
        response = await self.event(h2.events.ResponseReceived)
        return dict(response.headers)[":status"]

    async def flush(self) -> None:
        await self._stream.send_all(self.h2.data_to_send())

    async def event(self, kind: type) -> Any:
        while True:
            for event in self._events:
                if isinstance(event, kind):
                    self._events.remove(event)
                    return event
            data = await self._stream.receive_some()
            assert data
            self._events += self.h2.receive_data(data)
            await self.flush()


async def flood(scope: Any, receive: Any, send: Any) -> None:
    """An app that sends more than anybody takes."""
    if scope["type"] == "lifespan":
        raise NotImplementedError
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(2**20)})


# WebSockets


async def test_the_request_is_known_to_be_secure(served: Served) -> None:
    seen: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        seen.append(ws)
        await echo(ws)

    async with served(handler, ssl_context=server_context(), settings=SETTINGS) as server, encrypted(server) as stream:
        client = server.client(stream, "/x?y")
        await stream.send_all(client.request())
        await client.handshake()
        await client.send("grüße", b"\0", b"x" * 300_000)
        assert [await client.receive() for _ in range(3)] == ["grüße", b"\0", b"x" * 300_000]
        await client.close()
        assert await client.closed() == (1000, "")
    [ws] = seen
    assert (ws.request.path, ws.request.query, ws.request.secure, ws.request.certificate) == ("/x", "y", True, None)
    assert ws.request.peer is not None
    assert ws.request.peer[0] == "127.0.0.1"


async def test_without_tls_the_request_is_not_secure(served: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send(f"{ws.request.secure} {ws.request.certificate}")

    async with served(handler) as server, server.connect() as client:
        assert await client.receive() == "False None"


async def test_the_clients_certificate_reaches_the_handler(served: Served) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority().issue_cert("127.0.0.1").configure_cert(context)
    authority().configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED

    async def handler(ws: WebSocket) -> None:
        assert ws.request.certificate is not None
        await ws.send(str(ws.request.certificate["subjectAltName"]))

    async with served(handler, ssl_context=context) as server, server.open() as stream:
        ours = client_context()
        authority().issue_cert("client@example.org").configure_cert(ours)
        wrapped = trio.SSLStream(stream, ours, server_hostname="127.0.0.1", https_compatible=True)
        client = server.client(wrapped)
        await wrapped.send_all(client.request())
        await client.handshake()
        assert await client.receive() == "(('email', 'client@example.org'),)"


async def test_settings_apply_inside_tls(served: Served) -> None:
    """Hypercorn's codec compressed messages though `deflate` was off."""
    async with served(echo, ssl_context=server_context(), settings=SETTINGS) as server, encrypted(server) as stream:
        client = server.client(stream, extensions=None)
        head = client.request().replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n")
        await stream.send_all(head)
        response = await stream.receive_some()
        assert response.startswith(b"HTTP/1.1 101 ")
        assert b"extensions" not in response.lower()


async def test_a_request_that_comes_with_the_end_of_the_handshake(served: Served) -> None:
    """All of it was read then, and no poller tells of it again."""
    async with served(echo, ssl_context=server_context(), settings=SETTINGS) as server, server.open() as stream:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_context().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        done = False
        while not done:
            try:
                tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                await stream.send_all(outgoing.read())
                incoming.write(await stream.receive_some())
        tls.write(server.client(stream).request() + Frame(Opcode.TEXT, b"early").serialize(mask=True))
        await stream.send_all(outgoing.read())
        received = b""
        while not received.endswith(b"early"):
            data = await stream.receive_some()
            assert data
            incoming.write(data)
            with suppress(ssl.SSLWantReadError):
                while opened := tls.read():
                    received += opened
        assert received.startswith(b"HTTP/1.1 101 ")


async def test_the_end_is_said_in_tls_too(served: Served) -> None:
    """close_notify, RFC 8446 §6.1: without it, this client raises."""
    async with served(echo, ssl_context=server_context(), settings=SETTINGS) as server, server.open() as stream:
        wrapped = trio.SSLStream(stream, client_context(), server_hostname="127.0.0.1", https_compatible=False)
        client = server.client(wrapped)
        await wrapped.send_all(client.request())
        await client.handshake()
        await client.close()
        assert (await client.frame()).data == b"\x03\xe8"
        assert await wrapped.receive_some() == b""


async def test_a_peer_that_only_says_the_end_in_tls_is_gone(served: Served, records: Any) -> None:
    ended = trio.Event()
    received = []

    async def handler(ws: WebSocket) -> None:
        await ws.send("hello")
        received.extend([message async for message in ws])
        ended.set()

    async with served(handler, ssl_context=server_context(), settings=SETTINGS) as server, server.open() as stream:
        wrapped = trio.SSLStream(stream, client_context(), server_hostname="127.0.0.1", https_compatible=True)
        client = server.client(wrapped)
        await wrapped.send_all(client.request())
        await client.handshake()
        assert await client.receive() == "hello"
        client.protocol.send_text(b"last")
        with suppress(ssl.SSLError):
            wrapped._ssl_object.write(b"".join(client.protocol.data_to_send()))
            wrapped._ssl_object.unwrap()
        await stream.send_all(wrapped._outgoing.read())  # in one piece, and no FIN
        await ended.wait()
    assert received == ["last"]
    assert [record["code"] for record in records.read("INFO")] == [1006]


# Handshakes


async def test_silent_sockets_count_as_handshakes_and_are_closed_in_time(
    served: Served, patient_clock: MockClock
) -> None:
    settings = Settings(handshake_timeout=5, max_handshakes=2)
    async with (
        served(echo, ssl_context=server_context(), settings=settings) as server,
        server.open() as silent,
        server.open() as other,
    ):
        await wait_all_tasks_blocked()
        async with server.open() as third:
            assert await third.receive_some() == b""
        async with seconds(5):
            assert await silent.receive_some() == b""
            assert await other.receive_some() == b""
        async with encrypted(server) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 426 ")
    assert server.own.metrics.limit_hits.values["max_handshakes"] == 1


async def test_half_a_head_inside_tls_gets_408(served: Served, patient_clock: MockClock) -> None:
    async with served(echo, ssl_context=server_context(), settings=SETTINGS) as server, encrypted(server) as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\n")
        async with seconds(5):
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 408 ")


async def test_what_is_no_tls_harms_nobody(served: Served) -> None:
    async with served(echo, ssl_context=server_context(), settings=SETTINGS) as server:
        for nonsense in (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"\x16\x03\x01" + bytes(1000), bytes(100_000)):
            async with server.open() as stream:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(nonsense)
                    await stream.send_eof()
                    while await stream.receive_some():
                        pass
        async with encrypted(server) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 426 ")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/x", {}, b"404 "), ("/", {"origin": "https://else.where"}, b"403 "), ("/", {"host": "a b"}, b"400 ")],
)
async def test_who_is_not_let_in(
    served: Served, config: Config, path: str, headers: dict[str, str], status: bytes
) -> None:
    async with served({"/": echo}, config=config) as server, encrypted(server, "http/1.1") as stream:
        head = {
            "host": "127.0.0.1",
            "upgrade": "websocket",
            "connection": "Upgrade",
            "sec-websocket-version": "13",
            "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
            **headers,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        await stream.send_all(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode())
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 " + status)


async def test_another_name_than_those_of_the_config_is_refused(served: Served, config: Config) -> None:
    config.server_names = ["right.example"]
    async with served(echo, config=config, app=page) as server:
        for name, status in (("right.example", b"200"), ("wrong.example", b"421")):
            async with encrypted(server) as stream:
                await stream.send_all(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 " + status)
        async with encrypted(server) as stream:
            await stream.send_all(server.client(stream).request())
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 421 ")


# HTTP/2


async def test_http_2_serves_pages_and_offers_no_websockets(served: Served, config: Config) -> None:
    async with served(echo, config=config, app=page) as server, encrypted(server, "h2", "http/1.1") as stream:
        assert stream.selected_alpn_protocol() == "h2"
        client = Multiplexed(stream)
        await client.start()
        assert not client.h2.remote_settings.enable_connect_protocol
        for _ in range(3):
            await client.ask()
            assert await client.status() == "200"
        await client.ask("/", "CONNECT", (":protocol", "websocket"), ("sec-websocket-version", "13"))
        assert await client.status() == "403"


async def test_http_2_without_an_app_is_refused(served: Served) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority().issue_cert("127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(["h2"])
    async with served(echo, ssl_context=context) as server, encrypted(server, "h2") as stream:
        client = Multiplexed(stream)
        await client.start()
        assert (await client.event(h2.events.ConnectionTerminated)).error_code == 13  # HTTP_1_1_REQUIRED


async def test_a_closed_window_has_the_stall_timeout(served: Served, config: Config, patient_clock: MockClock) -> None:
    """Pings in between do not prolong it."""
    async with served(echo, config=config, app=flood, settings=SETTINGS) as server, encrypted(server, "h2") as stream:
        client = Multiplexed(stream)
        await client.start(window=0)
        for _ in range(100):
            await client.ask()
        async with seconds(6, 2), trio.open_nursery() as nursery:

            async def ping() -> None:
                with suppress(trio.BrokenResourceError):
                    while True:
                        client.h2.ping(bytes(8))
                        await client.flush()
                        await trio.sleep(1)

            nursery.start_soon(ping)
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass
            nursery.cancel_scope.cancel()


async def test_a_request_that_is_not_finished_has_the_stall_timeout(
    served: Served, config: Config, patient_clock: MockClock
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        while (await receive()).get("more_body"):
            pass

    async with served(echo, config=config, app=app, settings=SETTINGS) as server, encrypted(server, "h2") as stream:
        client = Multiplexed(stream)
        await client.start()
        await client.ask("/", "POST")
        async with seconds(6, 2):
            with suppress(trio.BrokenResourceError, AssertionError):
                await client.event(h2.events.ConnectionTerminated)


async def test_an_idle_connection_has_hypercorns_keep_alive_timeout(
    served: Served, config: Config, patient_clock: MockClock
) -> None:
    config.keep_alive_timeout = 7
    async with served(echo, config=config, app=page, settings=SETTINGS) as server, encrypted(server, "h2") as stream:
        client = Multiplexed(stream)
        await client.start()
        await client.ask()
        assert await client.status() == "200"
        async with seconds(7):
            with suppress(AssertionError):
                await client.event(h2.events.ConnectionTerminated)


async def test_connections_that_hold_pages_keep_no_websocket_out(served: Served, config: Config) -> None:
    settings = Settings(max_connections=2)
    async with served(echo, config=config, app=flood, settings=settings) as server, trio.open_nursery() as nursery:

        async def hold(task_status: trio.TaskStatus[None]) -> None:
            async with encrypted(server, "h2") as stream:
                client = Multiplexed(stream)
                with suppress(trio.BrokenResourceError, h2.exceptions.ProtocolError, AssertionError):
                    await client.start(window=0)
                    await client.ask()
                task_status.started()
                await trio.sleep_forever()

        for _ in range(settings.max_connections + SPARE):
            await nursery.start(hold)
        async with encrypted(server) as stream:
            client = server.client(stream)
            await stream.send_all(client.request())
            await client.handshake()
            await client.send("in")
            assert await client.receive() == "in"
        nursery.cancel_scope.cancel()


async def test_too_many_frames_of_http_2_end_the_connection(
    served: Served, config: Config, mock_clock: MockClock
) -> None:
    settings = Settings(messages_per_second=10)
    async with served(echo, config=config, app=page, settings=settings) as server, encrypted(server, "h2") as stream:
        client = Multiplexed(stream)
        await client.start()
        for _ in range(101):
            client.h2.ping(bytes(8))
        await client.flush()
        assert (await client.event(h2.events.ConnectionTerminated)).error_code == 11  # ENHANCE_YOUR_CALM
    assert server.own.metrics.limit_hits.values["messages_per_second"] == 1


async def test_draining_ends_idle_http_2_at_once(served: Served, config: Config, patient_clock: MockClock) -> None:
    async with served(echo, config=config, app=page, settings=SETTINGS) as server, encrypted(server, "h2") as stream:
        client = Multiplexed(stream)
        await client.start()
        await client.ask()
        assert await client.status() == "200"
        async with seconds(0):
            server.scope.cancel()
            assert (await client.event(h2.events.ConnectionTerminated)).error_code == 0
            await server.over.wait()


async def test_draining_bounds_what_http_2_has_going(served: Served, config: Config, patient_clock: MockClock) -> None:
    async with served(echo, config=config, app=flood, settings=SETTINGS) as server, encrypted(server, "h2") as stream:
        client = Multiplexed(stream)
        await client.start(window=0)
        await client.ask()
        await wait_all_tasks_blocked()
        async with seconds(0, 7):
            server.scope.cancel()
            await server.over.wait()
