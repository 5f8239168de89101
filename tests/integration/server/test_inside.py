"""WebSockets inside TLS and HTTP/2, which Hypercorn unwraps, and TLS on the server's own listener."""

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
import pytest
import trio
import trustme
from hypercorn.config import Config
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.frames import Frame, Opcode

from fixtures.clock import seconds
from fixtures.handlers import echo, greet_and_sleep
from tricorn import Disconnected, Settings, WebSocket

Served = Callable[..., AbstractAsyncContextManager[Any]]

SETTINGS = Settings(stall_timeout=6, close_timeout=3, drain_timeout=10, ping_interval=inf)
SILENT = Settings(ping_interval=inf)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def config(authority: trustme.CA, tmp_path: Path) -> Config:
    """Hypercorn's, with a certificate for 127.0.0.1."""
    certificate = authority.issue_cert("127.0.0.1")
    chain = tmp_path / "chain.pem"
    key = tmp_path / "key.pem"
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(chain, append=True)
    certificate.private_key_pem.write_to_path(key)
    return Config.from_mapping(certfile=str(chain), keyfile=str(key))


@asynccontextmanager
async def encrypted(
    server: Any, authority: trustme.CA, *protocols: str, receive_buffer: int | None = None
) -> AsyncGenerator[trio.SSLStream[Any]]:
    """A stream through TLS that has said nothing yet."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(list(protocols))
    authority.configure_trust(context)
    async with server.open(receive_buffer) as stream:
        wrapped = trio.SSLStream(stream, context, server_hostname="127.0.0.1", https_compatible=True)
        await wrapped.do_handshake()
        yield wrapped


class Multiplexed:
    """A client of HTTP/2 with a WebSocket in a stream of it (RFC 8441)."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._events: list[Any] = []

    async def start(self) -> None:
        self._h2.initiate_connection()
        await self.flush()
        while not self._h2.remote_settings.enable_connect_protocol:
            await self._receive()

    async def ask(self, path: str = "/", *headers: tuple[str, str]) -> tuple[int, str]:
        """Ask for a WebSocket: the stream's number and the status."""
        number = self._h2.get_next_available_stream_id()
        request = [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "https"), (":path", path)]
        request += [(":authority", "127.0.0.1"), ("sec-websocket-version", "13"), *headers]
        self._h2.send_headers(number, request)
        await self.flush()
        response = await self._event(h2.events.ResponseReceived)
        return number, dict(response.headers)[":status"]

    async def send(self, number: int, opcode: Opcode, payload: bytes) -> None:
        self._h2.send_data(number, Frame(opcode, payload).serialize(mask=True))
        await self.flush()

    async def receive(self) -> bytes:
        """The next data."""
        while True:
            event = await self._event(h2.events.DataReceived)
            if event.data:
                return bytes(event.data)

    async def flush(self) -> None:
        await self._stream.send_all(self._h2.data_to_send())

    async def _event(self, kind: type) -> Any:
        while True:
            for event in self._events:
                if isinstance(event, kind):
                    self._events.remove(event)
                    return event
            await self._receive()

    async def _receive(self) -> None:
        data = await self._stream.receive_some()
        assert data
        self._events += self._h2.receive_data(data)
        await self.flush()


def text(payload: bytes) -> bytes:
    return Frame(Opcode.TEXT, payload).serialize(mask=False)


def close(code: int) -> bytes:
    return Frame(Opcode.CLOSE, code.to_bytes(2, "big")).serialize(mask=False)


async def test_tls(served: Served, authority: trustme.CA, config: Config) -> None:
    seen: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        seen.append(ws)
        await echo(ws)

    async with served({"/x": handler}, config=config, settings=SILENT, subprotocols=["b"]) as server:
        async with encrypted(server, authority, "http/1.1") as stream:
            client = server.client(stream, "/x?y", subprotocols=["a", "b"])
            await stream.send_all(client.request())
            await client.handshake()
            assert client.protocol.subprotocol == "b"
            await client.send("grüße", b"\0")
            assert [await client.receive() for _ in range(2)] == ["grüße", b"\0"]
            await client.close()
            assert (await client.frame()).opcode is Opcode.CLOSE
        [ws] = seen
        assert (ws.request.path, ws.request.query, ws.subprotocol) == ("/x", "y", "b")
        assert ws.request.peer[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/x", {}, b"404 "), ("/", {"origin": "https://else.where"}, b"403 "), ("/", {"host": "a b"}, b"400 ")],
)
async def test_who_is_not_let_in(
    served: Served, authority: trustme.CA, config: Config, path: str, headers: dict[str, str], status: bytes
) -> None:
    async with served({"/": echo}, config=config) as server, encrypted(server, authority, "http/1.1") as stream:
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


async def test_a_request_inside_tls(served: Served, authority: trustme.CA, config: Config) -> None:
    async with served(echo, config=config) as server, encrypted(server, authority, "http/1.1") as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 426 ")


async def test_http_2_is_chosen_in_the_handshake_and_carries_websockets(
    served: Served, authority: trustme.CA, config: Config
) -> None:
    async with (
        served(echo, config=config, settings=SILENT) as server,
        encrypted(server, authority, "h2", "http/1.1") as stream,
    ):
        assert stream.selected_alpn_protocol() == "h2"
        client = Multiplexed(stream)
        await client.start()
        one, status = await client.ask()
        other, _ = await client.ask()
        assert status == "200"
        for number, payload in ((one, b"one"), (other, b"other")):
            await client.send(number, Opcode.TEXT, payload)
            assert await client.receive() == text(payload)
        assert (await client.ask("/", ("origin", "https://else.where")))[1] == "403"
        assert await client.receive() == b"pages of this origin may not connect\n"
        await client.send(one, Opcode.CLOSE, b"\x03\xe8")
        assert await client.receive() == close(1000)


async def test_http_2_without_tls_carries_websockets(served: Served) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise NotImplementedError

    async with served(echo, app=app, settings=SILENT) as server, server.open() as stream:
        client = Multiplexed(stream)
        await client.start()
        number, _ = await client.ask()
        await client.send(number, Opcode.TEXT, b"hello")
        assert await client.receive() == text(b"hello")


async def test_they_are_told_when_the_server_ends(
    served: Served, authority: trustme.CA, config: Config, patient_clock: MockClock
) -> None:
    options = {"config": config, "settings": SETTINGS}
    async with served(greet_and_sleep, **options) as server, encrypted(server, authority, "http/1.1") as stream:
        client = server.client(stream)
        await stream.send_all(client.request())
        await client.handshake()
        assert await client.receive() == "hello"
        async with seconds(0):
            server.scope.cancel()
            assert (await client.frame()).data == b"\x03\xf4"
            await server.over.wait()


async def test_they_are_told_also_where_draining_takes_all_its_time(
    served: Served, authority: trustme.CA, config: Config, patient_clock: MockClock
) -> None:
    options = {"config": config, "settings": SETTINGS, "drain": trio.sleep_forever}
    async with served(greet_and_sleep, **options) as server, encrypted(server, authority, "http/1.1") as stream:
        client = server.client(stream)
        await stream.send_all(client.request())
        await client.handshake()
        assert await client.receive() == "hello"
        async with seconds(7):
            server.scope.cancel()
            assert (await client.frame()).data == b"\x03\xf4"
            await server.over.wait()


async def test_who_reads_nothing_is_given_up(
    served: Served, authority: trustme.CA, config: Config, patient_clock: MockClock, records: Any
) -> None:
    ended = trio.Event()

    async def flood(ws: WebSocket) -> None:
        try:
            await ws.send(bytes(2**24))
            await ws.send("waits")
        except Disconnected:
            ended.set()
            raise

    async with served(flood, config=config, settings=SETTINGS) as server:
        # A buffer that does not grow: the kernel would take more a moment later, when the clock has jumped already.
        async with encrypted(server, authority, "http/1.1", receive_buffer=4096) as stream:
            client = server.client(stream)
            await stream.send_all(client.request())
            await ended.wait()
            assert 6 <= trio.current_time() <= 10
        await wait_all_tasks_blocked()
    [record] = records.read("INFO")
    assert record["code"] == 4001


async def test_what_is_no_tls_harms_nobody(served: Served, authority: trustme.CA, config: Config) -> None:
    async with served(echo, config=config) as server:
        async with server.open() as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass
        async with encrypted(server, authority, "http/1.1") as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 426 ")


async def test_the_lifespan_of_an_app(served: Served) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        for _ in range(2):
            phase = (await receive())["type"]
            seen.append(phase)
            await send({"type": f"{phase}.complete"})

    async with served(echo, app=app) as server:
        assert seen == ["lifespan.startup"]
        async with server.connect() as client:
            server.scope.cancel()
            await client.closed()
    assert seen == ["lifespan.startup", "lifespan.shutdown"]


async def test_an_app_that_does_not_start_up_ends_the_start(served: Served) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    with pytest.RaisesGroup(
        pytest.RaisesExc(Exception, match="no database"), flatten_subgroups=True, allow_unwrapped=True
    ):
        async with served(echo, app=app):
            pass


async def test_an_app_that_does_not_shut_down_has_what_is_left_of_the_time(
    served: Served, patient_clock: MockClock
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await trio.sleep_forever()

    async with served(echo, app=app, settings=SETTINGS) as server, seconds(10):
        server.scope.cancel()
        await server.over.wait()
