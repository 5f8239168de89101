"""Behind a trusted proxy the peer is the client: on every way in, for pages, and for the limit of a peer's sockets."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from ipaddress import ip_address
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import tricorn
from fixtures.client import Client
from fixtures.handlers import echo
from fixtures.hosts import TlsStream, asgi, native_tls, native_unix, server_context
from tricorn import Settings, WebSocket
from tricorn.settings import SettingError
from tricorn.trio_websocket import adapt

Served = Callable[..., AbstractAsyncContextManager[Any]]

TRUSTED = Settings(trusted_proxies=("127.0.0.1", "unix"))
PROXIED = Settings(trusted_proxies=("127.0.0.1", "unix"), proxy_protocol=True, handshake_timeout=5, close_timeout=1)
FORWARDED = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "app.example"}


async def tell(ws: WebSocket) -> None:
    """Sends what it knows about the client."""
    await ws.send(json.dumps([ws.request.peer, ws.request.secure, ws.request.headers["host"]]))


async def tell_page(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    host = dict(scope["headers"])[b"host"].decode()
    body = json.dumps([scope["client"], scope["scheme"], host]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def v2(address: str, port: int) -> bytes:
    source = ip_address(address)
    body = source.packed * 2 + port.to_bytes(2, "big") * 2
    family = 0x11 if source.version == 4 else 0x21
    return b"\r\n\r\n\0\r\nQUIT\n" + bytes([0x21, family]) + len(body).to_bytes(2, "big") + body


LOCAL = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"
V1 = b"PROXY TCP4 203.0.113.7 192.0.2.1 4711 443\r\n"


@asynccontextmanager
async def upgrade(server: Any, stream: Any, headers: dict[str, str] | None = None) -> AsyncGenerator[Client]:
    client = server.client(stream)
    head = client.request()[:-2] + b"".join(f"{k}: {v}\r\n".encode() for k, v in (headers or {}).items()) + b"\r\n"
    await stream.send_all(head)
    await client.handshake()
    yield client


async def told(server: Any, headers: dict[str, str]) -> Any:
    async with server.open() as stream, upgrade(server, stream, headers) as client:
        return json.loads(str(await client.receive()))


async def page(stream: Any, *headers: str) -> tuple[bytes, Any]:
    """The status and the content of a page, on a connection that is kept alive."""
    await stream.send_all("\r\n".join(["GET / HTTP/1.1", "Host: inner", *headers, "", ""]).encode())
    response = b""
    while (head := re.search(rb"ength: (\d+)\r\n(?:.+\r\n)*\r\n", response)) is None:
        response += await stream.receive_some()
    while len(body := response[head.end() :]) < int(head[1]):
        response += await stream.receive_some()
    return response[9:12], json.loads(body) if response[9:12] == b"200" else body


async def rest(stream: Any) -> bytes:
    """All that comes until the stream ends."""
    received = b""
    while data := await stream.receive_some():
        received += data
    return received


# Headers


async def test_what_a_trusted_proxy_says_about_the_client(hosted: Served) -> None:
    async with hosted(tell, settings=TRUSTED) as server:
        assert await told(server, FORWARDED) == [["203.0.113.7", 0], True, "app.example"]
        forwarded = {"Forwarded": 'for="[2001:db8::7]:4711";proto=http;host=app.example, for=127.0.0.1'}
        assert await told(server, forwarded) == [["2001:db8::7", 4711], False, "app.example"]


async def test_what_others_say_is_not_believed(hosted: Served) -> None:
    async with hosted(tell, settings=Settings(trusted_proxies=("192.0.2.1",))) as server:
        peer, secure, host = await told(server, FORWARDED | {"Forwarded": "for=203.0.113.7;proto=https;host=x"})
        assert peer is None or (peer[0], peer[1] > 0) == ("127.0.0.1", True)
        assert secure is (server.host is native_tls)
        assert host.partition(":")[0] == "127.0.0.1"


async def test_a_page_of_the_forwarded_host_may_connect(hosted: Served) -> None:
    async with hosted(tell, settings=TRUSTED) as server:
        await told(server, FORWARDED | {"Origin": "https://app.example"})
        with pytest.raises(AssertionError, match="HTTP 403"):
            await told(server, FORWARDED | {"Origin": "https://other.example"})


async def test_each_request_of_a_kept_alive_connection_has_its_own_client(served: Served) -> None:
    async with served(tell, settings=TRUSTED, app=tell_page) as server, server.open() as stream:
        assert await page(stream) == (b"200", [list(stream.socket.getsockname()), "http", "inner"])
        for address in ("203.0.113.7", "203.0.113.8"):
            headers = (f"X-Forwarded-For: {address}", "X-Forwarded-Proto: https", "X-Forwarded-Host: app.example")
            assert await page(stream, *headers) == (b"200", [[address, 0], "https", "app.example"])
        async with upgrade(server, stream, FORWARDED) as client:
            assert json.loads(str(await client.receive())) == [["203.0.113.7", 0], True, "app.example"]


async def test_pages_and_websockets_under_plain_hypercorn(running: Any) -> None:
    async with running(asgi, tell, settings=TRUSTED, app=tell_page) as server, server.open() as stream:
        assert (await page(stream, "X-Forwarded-For: 203.0.113.7"))[1] == [["203.0.113.7", 0], "http", "inner"]


async def test_the_record_has_the_client(served: Served, records: Any) -> None:
    async with served(tell, settings=TRUSTED) as server:
        await told(server, FORWARDED)
    [record] = [each for each in records.read("INFO") if "peer" in each]
    assert record["peer"] == ["203.0.113.7", 0]


# Sockets of a peer


async def test_sockets_count_for_the_client_and_not_for_the_proxy(served: Served) -> None:
    settings = Settings(trusted_proxies=("127.0.0.1",), peer_connections=1)
    async with served(echo, settings=settings, app=tell_page) as server:
        one, other = "X-Forwarded-For: 203.0.113.7", "X-Forwarded-For: 203.0.113.8"
        async with server.open() as first, server.open() as second, server.open() as third, server.open():
            assert (await page(first, one))[0] == b"200"
            await wait_all_tasks_blocked()
            async with upgrade(server, second, dict([one.split(": ")])):  # the first socket is idle, and the proxy's
                assert (await page(first, other))[0] == b"200"
                assert (await page(third, one))[0] == b"503"
                assert await rest(third) == b""
                assert (await page(first))[0] == b"200"
                assert server.own.metrics.limit_hits.values["peer_connections"] == 1
        await wait_all_tasks_blocked()
        async with server.open() as stream:
            assert (await page(stream, one))[0] == b"200"


# The PROXY protocol


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize(
    ("header", "peer"),
    [(V1, ["203.0.113.7", 4711]), (v2("2001:db8::7", 4711), ["2001:db8::7", 4711]), (LOCAL, None)],
)
async def test_the_header_comes_before_everything(
    running: Any, served: Served, encrypted: bool, header: bytes, peer: Any
) -> None:
    options = {"ssl_context": server_context()} if encrypted else {}
    async with served(tell, settings=PROXIED, app=tell_page, **options) as server, server.open() as stream:
        own = list(stream.socket.getsockname())
        for byte in header[:-1]:
            await stream.send_all(bytes([byte]))
            await wait_all_tasks_blocked()
        # The last byte comes together with what follows it.
        behind = _Behind(header[-1:], stream)
        carrying: Any = TlsStream(behind) if encrypted else behind
        async with upgrade(server, carrying) as client:
            told_peer, secure, _ = json.loads(str(await client.receive()))
            assert told_peer == (peer or own)
            assert secure is encrypted


class _Behind:
    """A stream whose first bytes go out together with `data` before them."""

    def __init__(self, data: bytes, stream: Any) -> None:
        self._data = data
        self._stream = stream

    async def send_all(self, data: bytes) -> None:
        before, self._data = self._data, b""
        await self._stream.send_all(before + bytes(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


async def test_pages_have_the_client_too_and_its_headers_are_not_believed(served: Served) -> None:
    async with served(tell, settings=PROXIED, app=tell_page) as server, server.open() as stream:
        await stream.send_all(V1)
        for _ in range(2):
            answer = await page(stream, "X-Forwarded-For: 192.0.2.9")
            assert answer == (b"200", [["203.0.113.7", 4711], "http", "inner"])


async def test_a_proxy_must_send_the_header(served: Served) -> None:
    async with served(tell, settings=PROXIED) as server, server.open() as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await rest(stream)).startswith(b"HTTP/1.1 400 ")


async def test_tls_without_the_header_is_closed(served: Served) -> None:
    async with served(tell, settings=PROXIED, ssl_context=server_context()) as server, server.open() as stream:
        await stream.send_all(b"\x16\x03\x01\x02\0\x01")
        received = b""
        with suppress(trio.BrokenResourceError):  # there is something unread
            received = await stream.receive_some()
        assert received == b""


@pytest.mark.parametrize("header", [V1, LOCAL, v2("203.0.113.7", 1)])
@pytest.mark.parametrize("trusted", [(), ("192.0.2.1",)])
async def test_from_others_the_header_is_a_bad_request(served: Served, header: bytes, trusted: tuple[str, ...]) -> None:
    settings = Settings(trusted_proxies=trusted, proxy_protocol=bool(trusted))
    async with served(tell, settings=settings) as server, server.open() as stream:
        await stream.send_all(header + b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await rest(stream)).startswith(b"HTTP/1.1 400 ")
    async with served(tell, settings=settings) as server:
        assert (await told(server, {}))[0][0] == "127.0.0.1"  # they need none


async def test_the_header_has_the_time_of_the_handshake(served: Served, patient_clock: MockClock) -> None:
    async with served(tell, settings=PROXIED) as server, server.open() as stream:
        await stream.send_all(V1[:20])
        start = trio.current_time()
        assert await rest(stream) == b""
        assert 5 <= trio.current_time() - start < 7


async def test_a_proxy_that_leaves_without_a_header(served: Served) -> None:
    async with served(tell, settings=PROXIED) as server:
        for begin in (b"", V1[:9]):
            async with server.open() as stream:
                await stream.send_all(begin)
                await stream.send_eof()
                assert await rest(stream) == b""


async def test_sockets_count_for_the_client_of_the_header(served: Served) -> None:
    settings = Settings(trusted_proxies=("127.0.0.1",), proxy_protocol=True, peer_connections=1)
    async with (
        served(echo, settings=settings, app=tell_page) as server,
        server.open() as first,
        server.open() as second,
        server.open() as third,
    ):
        await first.send_all(V1)
        async with upgrade(server, first):
            await second.send_all(V1)
            assert (await rest(second)).startswith(b"HTTP/1.1 503 ")
            await third.send_all(v2("203.0.113.8", 1))
            assert (await page(third))[0] == b"200"


async def test_on_a_unix_socket(running: Any) -> None:
    async with running(native_unix, tell, settings=PROXIED) as server, server.open() as stream:
        await stream.send_all(V1)
        async with upgrade(server, stream) as client:
            assert json.loads(str(await client.receive()))[0] == ["203.0.113.7", 4711]


@pytest.mark.parametrize("make", [tricorn.asgi_app, adapt])
def test_who_does_not_own_its_connections_refuses_the_setting(make: Callable[..., object]) -> None:
    with pytest.raises(SettingError, match=r"^proxy_protocol=True: .* has no such setting"):
        make(echo, settings=PROXIED)
