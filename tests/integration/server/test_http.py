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
from trio.testing import MockClock, wait_all_tasks_blocked

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


async def test_http_2_by_prior_knowledge(served: Served) -> None:
    async with served(echo, app=app) as server, server.open() as stream:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        connection.initiate_connection()
        for number, path in ((1, "/one"), (3, "/two")):
            headers = {":method": "GET", ":path": path, ":scheme": "http", ":authority": "h"}
            connection.send_headers(number, list(headers.items()), end_stream=True)
        await stream.send_all(connection.data_to_send())
        bodies: dict[int, bytes] = {}
        ended = 0
        while ended < 2:
            for event in connection.receive_data(await stream.receive_some()):
                if isinstance(event, h2.events.ResponseReceived):
                    assert dict(event.headers)[":status"] == "200"
                if isinstance(event, h2.events.DataReceived):
                    bodies[event.stream_id] = bodies.get(event.stream_id, b"") + event.data
                ended += isinstance(event, h2.events.StreamEnded)
            await stream.send_all(connection.data_to_send())
        assert bodies == {1: b"GET /one ", 3: b"GET /two "}


async def test_an_app_that_raises_is_reported_and_harms_nobody(served: Served, records: Any) -> None:
    async with served(echo, app=app) as server, server.connect() as client:
        [(status, body)] = await ask(server, "GET", "/fail")
        assert (status, b"secret" in body) == (500, False)
        [record] = records.read("ERROR")
        assert "a secret of the app's" in record["stack_trace"]
        await client.send("undisturbed")
        assert await client.receive() == "undisturbed"
        await still_works(server)


async def test_an_upgrade_behind_another_request_reaches_the_handler(served: Served) -> None:
    async with served(echo, app=app, settings=Settings(ping_interval=inf)) as server:
        async with server.open() as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
            client = server.client(stream)
            response = b""
            await stream.send_all(client.request())
            while b"HTTP/1.1 101 " not in response:
                response += await stream.receive_some()
            client.protocol.receive_data(response[response.index(b"HTTP/1.1 101 ") :])
            await client.send("inside")
            assert await client.receive() == "inside"
            await client.close()
            assert await client.closed() == (1000, "")
        await still_works(server)


@pytest.mark.parametrize("behind", [b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"\x81\x80\0\0\0\0", b"\0" * 100_000])
async def test_whatever_follows_an_upgrade_behind_another_request_ends_that_connection_alone(
    served: Served, records: Any, behind: bytes
) -> None:
    async with served(echo, app=app) as server, server.connect() as client:
        async with server.open() as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" + UPGRADE + behind)
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass
        await client.send("undisturbed")
        assert await client.receive() == "undisturbed"
        await still_works(server)
        records.read("ERROR")


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
