"""Calls that are no upgrade go to an ASGI app, and nothing that happens there harms the WebSockets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from http.client import HTTPConnection
from math import inf
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
import trio
from hypercorn.config import Config
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.protocol import State

from fixtures.clock import seconds
from fixtures.handlers import echo
from tricorn import Settings

Served = Callable[..., AbstractAsyncContextManager[Any]]

SETTINGS = Settings(stall_timeout=6, close_timeout=3, drain_timeout=10)
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what was asked; floods, fails or hangs where the path says so."""
    assert scope["type"] == "http"
    body = b""
    while True:
        event = await receive()
        body += event.get("body", b"")
        if not event.get("more_body"):
            break
    if scope["path"] == "/fail":
        raise RuntimeError("a secret of the app's")
    if scope["path"] == "/hang":
        await trio.sleep_forever()
    text = bytes(2**24) if scope["path"] == "/flood" else f"{scope['method']} {scope['path']} ".encode() + body
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})


async def still_works(server: Any) -> None:
    async with server.connect() as client:
        await client.send("still here")
        assert await client.receive() == "still here"
    assert await ask(server, "GET", "/") == [(200, b"GET / ")]


async def ask(server: Any, *requests: Any) -> list[tuple[int, bytes]]:
    """Ask on one connection: pairs of method and path, with a body for a POST."""

    def in_thread() -> list[tuple[int, bytes]]:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
        answers = []
        for method, path in zip(requests[::2], requests[1::2], strict=True):
            connection.request(method, path, body=b"body " * 30_000 if method == "POST" else None)
            response = connection.getresponse()
            answers.append((response.status, response.read()))
        connection.close()
        return answers

    return await trio.to_thread.run_sync(in_thread)


async def test_several_requests_on_one_connection(served: Served) -> None:
    async with served(echo, app=app) as server:
        assert await ask(server, "GET", "/a", "POST", "/b", "GET", "/c") == [
            (200, b"GET /a "),
            (200, b"POST /b " + b"body " * 30_000),
            (200, b"GET /c "),
        ]


async def test_a_head_and_a_body_in_pieces(served: Served) -> None:
    request = b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    async with served(echo, app=app) as server, server.open() as stream:
        for byte in request:
            await stream.send_all(bytes([byte]))
        response = b""
        while not response.endswith(b"POST /x abcde"):
            response += await stream.receive_some()
        assert response.startswith(b"HTTP/1.1 200 ")


async def test_http_2_without_tls_is_refused_in_its_own_words(served: Served, patient_clock: MockClock) -> None:
    async with served(echo, app=app, settings=SETTINGS) as server, server.open() as stream:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        connection.initiate_connection()
        await stream.send_all(connection.data_to_send())
        events = connection.receive_data(await stream.receive_some())
        assert isinstance(events[-1], h2.events.ConnectionTerminated)
        assert events[-1].error_code == 13  # HTTP_1_1_REQUIRED
        assert await stream.receive_some() == b""


@pytest.mark.parametrize(
    "header",
    [
        b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk",
        b"Upgrade: TLS/1.0",
        b"Upgrade: websocket",
    ],
)
async def test_other_upgrades_are_overlooked(served: Served, header: bytes) -> None:
    """RFC 9110 §7.8. One of HTTP/1.0 is always."""
    version = b"1.0" if header.endswith(b"websocket") else b"1.1"
    async with served(echo, app=app) as server, server.open() as stream:
        for _ in range(2 if version == b"1.1" else 1):
            await stream.send_all(b"GET / HTTP/" + version + b"\r\nHost: h\r\n" + header + b"\r\n\r\n")
            assert await responses(stream, 1) == b""


async def test_an_app_that_raises_is_reported_and_harms_nobody(served: Served, records: Any) -> None:
    async with served(echo, app=app) as server, server.connect() as client:
        [(status, body)] = await ask(server, "GET", "/fail")
        assert (status, b"secret" in body) == (500, False)
        [record] = records.read("ERROR")
        assert "a secret of the app's" in record["stack_trace"]
        await client.send("undisturbed")
        assert await client.receive() == "undisturbed"
        await still_works(server)


# An upgrade after other requests


async def responses(stream: trio.SocketStream, number: int, *, until: bytes = b"GET / ") -> bytes:
    """Read so many responses to `GET /`; return what came after them."""
    received = b""
    for _ in range(number):
        while until not in received:
            data = await stream.receive_some()
            assert data
            received += data
        assert received.startswith(b"HTTP/1.1 200 ")
        received = received[received.index(until) + len(until) :]
    return received


async def upgraded(server: Any, stream: trio.SocketStream, before: bytes = b"") -> Any:
    client = server.client(stream)
    await stream.send_all(before + client.request())
    client.protocol.receive_data(await responses(stream, before.count(b"GET / ")))
    while client.protocol.state is State.CONNECTING:
        client.protocol.receive_data(await stream.receive_some())
        assert client.protocol.handshake_exc is None
    client.response, *_ = client.protocol.events_received()
    return client


PAGE = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.mark.parametrize("pages", [1, 3])
async def test_an_upgrade_after_other_requests_is_the_same(served: Served, records: Any, pages: int) -> None:
    async with served(echo, app=app, settings=Settings(ping_interval=inf)) as server:
        async with server.open() as stream:
            for _ in range(pages):
                await stream.send_all(PAGE)
                assert await responses(stream, 1) == b""
            client = await upgraded(server, stream)
            await client.send("inside", b"x" * 200_000)
            assert [await client.receive() for _ in range(2)] == ["inside", b"x" * 200_000]
            await client.close(4321, "bye")
            assert await client.closed() == (4321, "bye")
        await wait_all_tasks_blocked()
        [record] = records.read("INFO")
        assert (record["code"], record["reason"]) == (4321, "bye")
        await still_works(server)


async def test_pipelined_requests_are_answered_in_order_and_then_the_upgrade(served: Served) -> None:
    async with served(echo, app=app) as server, server.open() as stream:
        client = await upgraded(server, stream, PAGE * 3)
        await client.send("inside")
        assert await client.receive() == "inside"


async def test_an_upgrade_waits_for_the_answer_before_it(served: Served) -> None:
    go_on = trio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"12")]})
        await send({"type": "http.response.body", "body": b"GET /h", "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"GET / "})

    async with served(echo, app=slow) as server, server.open() as stream:
        client = server.client(stream)
        await stream.send_all(PAGE + client.request())
        assert await responses(stream, 1, until=b"GET /h") == b""
        await wait_all_tasks_blocked()
        assert not server.own.connections
        go_on.set()
        rest = b""
        while b"101 " not in rest:
            rest += await stream.receive_some()
        assert rest.startswith(b"GET / HTTP/1.1 101 ")


async def test_what_an_app_does_after_its_answer_delays_and_loses_nothing(served: Served) -> None:
    go_on, done = trio.Event(), trio.Event()

    async def with_a_task(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        await go_on.wait()
        done.set()

    async with served(echo, app=with_a_task) as server, server.open() as stream:
        client = await upgraded(server, stream, PAGE)
        await client.send("inside")
        assert await client.receive() == "inside"
        go_on.set()
        await done.wait()
        await client.send("still")
        assert await client.receive() == "still"


async def test_settings_apply_after_other_requests(served: Served) -> None:
    """Hypercorn's codec compressed messages though `deflate` was off."""
    async with served(echo, app=app) as server, server.open() as stream:
        client = server.client(stream, extensions=[ClientPerMessageDeflateFactory()])
        await stream.send_all(PAGE + client.request())
        rest = await responses(stream, 1)
        while b"\r\n\r\n" not in rest:
            rest += await stream.receive_some()
        assert rest.startswith(b"HTTP/1.1 101 ")
        assert b"extensions" not in rest.lower()


@pytest.mark.parametrize(
    ("later", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * 101 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", b"431"),
        (b"nonsense\r\n\r\n", b"400"),
        (
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + PAGE,
            b"400",
        ),
        (UPGRADE.replace(b"GET / ", b"GET /x "), b"404"),
        (UPGRADE.replace(b"Version: 13", b"Version: 8"), b"426"),
    ],
)
async def test_a_later_request_is_judged_like_the_first(served: Served, later: bytes, status: bytes) -> None:
    for before in (b"", PAGE):
        async with served({"/": echo}, app=app) as server, server.open() as stream:
            await stream.send_all(before + later)
            rest = await responses(stream, len(before) // len(PAGE))
            with suppress(trio.BrokenResourceError):
                while data := await stream.receive_some():
                    rest += data
            assert rest.startswith(b"HTTP/1.1 " + status)
            assert rest.count(b"HTTP/1.1 ") == 1


async def test_a_later_head_has_the_handshake_timeout_from_its_first_byte(
    served: Served, patient_clock: MockClock
) -> None:
    settings = Settings(handshake_timeout=7, close_timeout=3)
    async with served(echo, app=app, settings=settings) as server, server.open() as stream:
        await stream.send_all(PAGE)
        await responses(stream, 1)
        await trio.sleep(4)
        await stream.send_all(PAGE[:5])
        async with seconds(7):
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 408 ")


async def test_between_requests_there_is_hypercorns_keep_alive_timeout(
    served: Served, patient_clock: MockClock
) -> None:
    config = Config.from_mapping(keep_alive_timeout=8)
    async with served(echo, app=app, config=config, settings=SETTINGS) as server, server.open() as stream:
        await stream.send_all(PAGE)
        await responses(stream, 1)
        async with seconds(8):
            assert await stream.receive_some() == b""


async def test_no_more_may_come_after_other_requests_than_there_is_room_for(served: Served) -> None:
    async with served(echo, app=app, settings=Settings(max_connections=1)) as server, server.connect() as first:
        async with server.open() as stream:
            await stream.send_all(PAGE + UPGRADE)
            assert (await responses(stream, 1) or await stream.receive_some()).startswith(b"HTTP/1.1 503 ")
        await first.send("undisturbed")
        assert await first.receive() == "undisturbed"


@pytest.mark.parametrize("after", [PAGE, b"\x81\x00", b"\0" * 100_000])
async def test_whatever_follows_an_upgrade_after_other_requests_ends_that_connection_alone(
    served: Served, records: Any, after: bytes
) -> None:
    async with served(echo, app=app) as server, server.connect() as client:
        async with server.open() as stream:
            await stream.send_all(PAGE + UPGRADE + after)
            received = b""
            with suppress(trio.BrokenResourceError):
                while data := await stream.receive_some():
                    received += data
            assert received.endswith(b"\x03\xea" + b"a frame from a client must be masked") or b"\x03\xea" in received
        await client.send("undisturbed")
        assert await client.receive() == "undisturbed"
        await still_works(server)


async def test_a_body_that_stalls_is_given_up_after_the_stall_timeout(served: Served, patient_clock: MockClock) -> None:
    async with served(echo, app=app, settings=SETTINGS) as server, server.open() as stream:
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nabc")
        async with seconds(6):
            with suppress(trio.BrokenResourceError):
                assert await stream.receive_some() == b""


async def test_a_response_to_a_request_that_is_not_read_arrives(served: Served, patient_clock: MockClock) -> None:
    """Closed at once, the socket would take it back, since what came was not read."""

    async def too_large(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async with served(echo, app=too_large, settings=SETTINGS) as server, server.open() as stream:
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5000000\r\n\r\n" + bytes(500_000))
        await wait_all_tasks_blocked()
        await stream.send_all(bytes(500_000))
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 413 ")
        assert await stream.receive_some() == b""


async def test_draining_closes_a_websocket_after_other_requests_with_1012(
    served: Served, patient_clock: MockClock
) -> None:
    async with served(echo, app=app, settings=SETTINGS) as server, server.open() as stream:
        client = await upgraded(server, stream, PAGE)
        async with seconds(0):
            server.scope.cancel()
            assert (await client.closed())[0] == 1012
            await server.over.wait()


# Endings


@pytest.mark.parametrize("path", [b"/flood", b"/hang"])
async def test_what_does_not_come_to_its_end_is_cut_when_draining_has_to_end(
    served: Served, patient_clock: MockClock, path: bytes
) -> None:
    async with served(echo, app=app, settings=SETTINGS) as server, server.open(4096) as stream:
        await stream.send_all(b"GET " + path + b" HTTP/1.1\r\nHost: h\r\n\r\n")
        await wait_all_tasks_blocked()
        server.scope.cancel()
        await server.over.wait()
        assert trio.current_time() <= SETTINGS.drain_timeout - SETTINGS.close_timeout


async def test_a_response_that_is_on_its_way_when_the_server_ends_gets_there(
    served: Served, patient_clock: MockClock
) -> None:
    async with served(echo, app=app, settings=SETTINGS) as server, server.open(4096) as stream:
        await stream.send_all(b"GET /flood HTTP/1.1\r\nHost: h\r\n\r\n")
        await wait_all_tasks_blocked()
        server.scope.cancel()
        received = 0
        while chunk := await stream.receive_some():
            received += len(chunk)
        assert received > 2**24
        await server.over.wait()
        assert trio.current_time() == 0


async def test_an_idle_connection_does_not_delay_the_servers_end(served: Served, patient_clock: MockClock) -> None:
    async with served(echo, app=app, settings=SETTINGS) as server, server.open() as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
        server.scope.cancel()
        await server.over.wait()
        assert trio.current_time() == 0


async def test_who_does_not_read_is_given_up_after_the_stall_timeout(served: Served, patient_clock: MockClock) -> None:
    async with served(echo, app=app, settings=SETTINGS) as server, server.open(4096) as stream:
        await stream.send_all(b"GET /flood HTTP/1.1\r\nHost: h\r\n\r\n")
        await trio.sleep(7)
        with suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass
        assert trio.current_time() == 7


@pytest.mark.parametrize("path", [b"/flood", b"/hang", b"/"])
@pytest.mark.parametrize("reset", [False, True])
async def test_who_goes_in_the_middle_harms_nobody(served: Served, path: bytes, reset: bool) -> None:
    async with served(echo, app=app) as server:
        async with server.open() as stream:
            await stream.send_all(b"GET " + path + b" HTTP/1.1\r\nHost: h\r\n\r\n")
            await wait_all_tasks_blocked()
            if reset:
                server.client(stream).reset()
        await wait_all_tasks_blocked()
        await still_works(server)
