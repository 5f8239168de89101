"""What a socket is told before it is a WebSocket, and what a handler knows of the request."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tricorn import Settings, WebSocket, serve
from tricorn.listening.accept import ACCEPT_AT_ONCE
from tricorn.listening.binds import listen

Served = Callable[..., AbstractAsyncContextManager[Any]]

SETTINGS = Settings(handshake_timeout=5, close_timeout=3, max_head_bytes=1000)

GET = b"GET / HTTP/1.1\r\nHost: h\r\n"
ASKS = b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
VERSION = b"Sec-WebSocket-Version: 13\r\n"
HEAD = GET + ASKS + KEY + VERSION + b"\r\n"


async def sleep(ws: WebSocket) -> None:
    await trio.sleep_forever()


async def everything(stream: trio.SocketStream) -> tuple[bytes, dict[str, str], bytes]:
    """The response until the end of the stream: status line, headers, body."""
    data = b"".join([part async for part in stream])
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    return status, dict(line.decode().split(": ", 1) for line in lines), body


@pytest.mark.parametrize(
    ("request_", "status", "headers"),
    [
        (b"nonsense\r\n\r\n", b"400 Bad Request", {}),
        (GET + b"bad name: x\r\n\r\n", b"400 Bad Request", {}),
        (HEAD.replace(KEY, b""), b"400 Bad Request", {}),
        (HEAD.replace(b"Connection: Upgrade\r\n", b""), b"400 Bad Request", {}),
        (HEAD.replace(KEY, KEY + b"Content-Length: 5\r\n") + b"hello", b"413 Request Entity Too Large", {}),
        (HEAD.replace(b"13", b"8"), b"426 Upgrade Required", {"Sec-WebSocket-Version": "13", "Upgrade": "websocket"}),
        (HEAD.replace(b"GET", b"POST"), b"405 Method Not Allowed", {"Allow": "GET"}),
        (HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"), b"426 Upgrade Required", {"Upgrade": "websocket"}),
        (HEAD.replace(b"GET /", b"GET /other"), b"404 Not Found", {}),
        (GET + b"\r\n", b"426 Upgrade Required", {"Upgrade": "websocket", "Connection": "Upgrade, close"}),
        (GET + b"x: " + b"x" * 1000 + b"\r\n\r\n", b"431 Request Header Fields Too Large", {}),
        (GET + b"x: " + b"x" * 1000, b"431 Request Header Fields Too Large", {}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"426 Upgrade Required", {"Upgrade": "websocket"}),
    ],
)
async def test_what_is_refused(
    served: Served, patient_clock: MockClock, request_: bytes, status: bytes, headers: dict[str, str]
) -> None:
    async with served({"/": sleep}, settings=SETTINGS) as server, server.open() as stream:
        await stream.send_all(request_)
        line, received, body = await everything(stream)
        assert line == b"HTTP/1.1 " + status
        assert received.items() >= {"Content-Length": str(len(body)), **headers}.items()
        assert body
        assert trio.current_time() == 0
        await stream.aclose()
        await wait_all_tasks_blocked()


async def test_who_keeps_a_refused_socket_open_has_the_close_timeout(served: Served, patient_clock: MockClock) -> None:
    async with served(sleep, settings=SETTINGS) as server, server.open() as stream:
        await stream.send_all(GET + b"\r\n" + b"and more" * 1000)
        await everything(stream)
        with pytest.raises(trio.BrokenResourceError):
            await say_more(stream)
        assert 3 <= trio.current_time() <= 4


async def say_more(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(b"and more")
        await trio.sleep(0.4)


@pytest.mark.parametrize(("said", "status"), [(b"", b""), (b"GET / HT", b"HTTP/1.1 408 Request Timeout")])
async def test_who_does_not_say_what_it_wants_in_time(
    served: Served, patient_clock: MockClock, said: bytes, status: bytes
) -> None:
    async with served(sleep, settings=SETTINGS) as server, server.open() as stream:
        await stream.send_all(said)
        assert (await everything(stream))[0] == status
        assert trio.current_time() == 5


async def test_who_says_it_too_slowly(served: Served, patient_clock: MockClock) -> None:
    async def say(stream: trio.SocketStream) -> None:
        for byte in HEAD:
            await stream.send_all(bytes([byte]))
            await trio.sleep(1)

    async with (
        served(sleep, settings=SETTINGS) as server,
        server.open() as stream,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(say, stream)
        assert (await everything(stream))[0] == b"HTTP/1.1 408 Request Timeout"
        assert trio.current_time() == 5
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("said", [b"", b"GET / HT"])
async def test_who_goes_before_it_has_said_what_it_wants(served: Served, patient_clock: MockClock, said: bytes) -> None:
    async with served(sleep, settings=SETTINGS) as server:
        for reset in (False, True):
            async with server.open() as stream:
                await stream.send_all(said)
                if reset:
                    server.client(stream).reset()
                else:
                    await stream.send_eof()
                    assert await everything(stream) == (b"", {}, b"")
        await wait_all_tasks_blocked()
        assert trio.current_time() == 0


@pytest.mark.parametrize("said", [b"", b"GET / HT", GET + b"\r\n"])
async def test_who_has_not_shaken_hands_does_not_delay_the_servers_end(
    served: Served, patient_clock: MockClock, said: bytes
) -> None:
    async with served(sleep, settings=SETTINGS) as server, server.open() as stream:
        await stream.send_all(said)
        await wait_all_tasks_blocked()
        server.scope.cancel()
        await server.over.wait()
        assert trio.current_time() == 0


async def test_a_head_byte_by_byte(served: Served) -> None:
    async with served(sleep) as server, server.open() as stream:
        for byte in HEAD:
            await stream.send_all(bytes([byte]))
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 101 Switching Protocols\r\n")


async def test_garbage_behind_the_head_is_a_violation(served: Served) -> None:
    async with served(sleep) as server, server.open() as stream:
        await stream.send_all(HEAD + HEAD)
        status, _, body = await everything(stream)
        assert status == b"HTTP/1.1 101 Switching Protocols"
        assert body[2:4] == (1002).to_bytes(2, "big")


async def test_what_a_handler_knows_of_the_request(served: Served) -> None:
    known: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        known.append(ws)

    async with served(handler, subprotocols=["a", "b"]) as server:
        async with server.connect("/%C3%A9%20/x?a=%20&b", subprotocols=["c", "b", "a"]) as client:
            assert await client.closed() == (1000, "")
            assert client.protocol.subprotocol == "b"
            assert known[0].request.peer == client.stream.socket.getsockname()
        async with server.open() as stream:
            await stream.send_all(GET + b"X-Y: 1\r\nx-y: \xe9\r\n" + ASKS + KEY + VERSION + b"\r\n")
            assert b"Sec-WebSocket-Protocol" not in await stream.receive_some()
            await wait_all_tasks_blocked()
        one, other = known
        assert (one.request.path, one.request.query, one.subprotocol) == ("/é /x", "a=%20&b", "b")
        assert one.request.headers["host"] == f"127.0.0.1:{server.port}"
        assert (other.request.path, other.request.query, other.subprotocol) == ("/", "", None)
        assert other.request.headers["x-y"] == "1, é"
        assert one.id != other.id


async def test_only_the_path_given_is_upgraded(served: Served) -> None:
    async with served({"/ws": sleep}) as server:
        for path, status in (
            (b"/", b"404 Not Found"),
            (b"/ws", b"101 Switching Protocols"),
            (b"/ws/", b"404 Not Found"),
        ):
            async with server.open() as stream:
                await stream.send_all(HEAD.replace(b"/", path, 1))
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 " + status)


async def test_a_server_that_cannot_listen_leaves_nothing_open(served: Served) -> None:
    async with served(sleep) as server:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="in use") as caught:
            await serve(sleep, server.port)
        assert os.listdir("/proc/self/fd") == before  # while the traceback still holds all that there was
        assert caught.tb is not None


@pytest.mark.parametrize("host", ["localhost", "::1"])
async def test_every_address_of_the_host_is_listened_on(host: str) -> None:
    try:
        listeners = await listen(0, host)
    except OSError:
        pytest.skip(f"{host} is not there")
    for listener in listeners:
        async with await trio.open_tcp_stream(*listener.getsockname()[:2]):
            pass
        listener.close()


async def test_many_who_come_at_once_are_all_served(served: Served) -> None:
    async with served(sleep) as server, AsyncExitStack() as stack:
        clients = [
            server.client(trio.SocketStream(stack.enter_context(trio.socket.from_stdlib_socket(plain))))
            for plain in [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2 * ACCEPT_AT_ONCE + 1)]
        ]
        for client in clients:
            await client.stream.send_all(client.request())
        for client in clients:
            await client.handshake()


async def test_without_descriptors_accepting_pauses_and_goes_on(
    served: Served, patient_clock: MockClock, records: Any
) -> None:
    """That the clock goes on shows that the server sleeps in between: it jumps when every task is blocked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with served(sleep) as server, server.connect() as before:
        with trio.socket.socket() as sock:
            after = server.client(trio.SocketStream(sock))
            resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, hard))
            try:
                await sock.connect(("127.0.0.1", server.port))
                await trio.sleep(5)
                [record] = records.read("WARNING")
                before.protocol.send_ping(b"still here")
                await before.flush()
                assert (await before.frame()).data == b"still here"
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await after.stream.send_all(after.request())
            await after.handshake()
            assert "cannot accept connections for now" in record["message"]
