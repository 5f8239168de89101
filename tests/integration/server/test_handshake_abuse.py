"""Handshakes as nobody should send them: the right status, the connection closed, no task left."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

import pytest
import trio
import trio.testing

from tricorn import Settings, WebSocket

Served = Callable[..., AbstractAsyncContextManager[Any]]

SETTINGS = Settings(handshake_timeout=5, close_timeout=0.05, max_head_bytes=16384)  # nobody answers the close frame
PIECE = 1000  # bytes of a request that are sent at a time
TARGET = b"GET / HTTP/1.1\r\n"
HOST = b"Host: h\r\n"
UPGRADE = b"Upgrade: websocket\r\n"
CONNECTION = b"Connection: Upgrade\r\n"
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
VERSION = b"Sec-WebSocket-Version: 13\r\n"
GOOD = TARGET + HOST + UPGRADE + CONNECTION + KEY + VERSION + b"\r\n"


class Abuse(NamedTuple):
    what: str  # with the section that it breaks
    head: bytes
    status: int
    header: str = ""  # that the response must have


def without(line: bytes) -> bytes:
    return GOOD.replace(line, b"")


def twice(line: bytes) -> bytes:
    return GOOD.replace(line, line + line)


def instead(line: bytes, other: bytes) -> bytes:
    return GOOD.replace(line, other)


def more(line: bytes) -> bytes:
    return GOOD.replace(HOST, HOST + line)


ABUSES = [
    # RFC 6455 §4.2.1
    Abuse("no Connection (RFC 6455 §4.2.1.4)", without(CONNECTION), 400),
    Abuse("Connection without Upgrade", instead(CONNECTION, b"Connection: close\r\n"), 400),
    Abuse("no key (§4.2.1.5)", without(KEY), 400),
    Abuse("two keys (§11.3.1)", twice(KEY), 400),
    Abuse("a key that is no base64", instead(KEY, b"Sec-WebSocket-Key: ????????????????????????\r\n"), 400),
    Abuse("a key of 15 bytes", instead(KEY, b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAA\r\n"), 400),
    Abuse("no version (§4.2.1.6)", without(VERSION), 426, "sec-websocket-version: 13"),
    Abuse("two versions (§11.3.5)", twice(VERSION), 426, "sec-websocket-version: 13"),
    Abuse("version 8 (§4.4)", instead(b"13", b"8"), 426, "sec-websocket-version: 13"),
    Abuse("version 013", instead(b"13", b"013"), 426, "sec-websocket-version: 13"),
    Abuse("extensions that are none (§9.1)", more(b"Sec-WebSocket-Extensions: a; =\r\n"), 400),
    Abuse("no Upgrade", without(UPGRADE), 426, "upgrade: websocket"),
    Abuse("another Upgrade", instead(b"websocket", b"h2c"), 426, "upgrade: websocket"),
    Abuse("POST (§4.2.1.1)", instead(b"GET", b"POST"), 405, "allow: GET"),
    Abuse("HEAD", instead(b"GET", b"HEAD"), 405, "allow: GET"),
    # RFC 9112 and RFC 9110
    Abuse("HTTP/1.0 (RFC 9110 §7.8)", instead(b"HTTP/1.1", b"HTTP/1.0"), 426, "upgrade: websocket"),
    Abuse("HTTP/2.0 without its preface (RFC 9112 §2.3)", instead(b"HTTP/1.1", b"HTTP/2.0"), 505),
    Abuse("HTTP/1.10", instead(b"HTTP/1.1", b"HTTP/1.10"), 400),
    Abuse("http/1.1", instead(b"HTTP/1.1", b"http/1.1"), 400),
    Abuse("no Host (RFC 9112 §3.2)", without(HOST), 400),
    Abuse("two Hosts (RFC 9112 §3.2)", twice(HOST), 400),
    Abuse("a Host that is none", instead(HOST, b"Host: a b\r\n"), 400),
    Abuse("a Host with a path", instead(HOST, b"Host: h/x\r\n"), 400),
    Abuse("NUL in a value (RFC 9110 §5.5)", more(b"X: a\0b\r\n"), 400),
    Abuse("NUL in a name", more(b"X\0: a\r\n"), 400),
    Abuse("a bare CR in a value (RFC 9112 §2.2)", more(b"X: a\rb\r\n"), 400),
    Abuse("a name with a space behind it (RFC 9112 §5.1)", more(b"X : a\r\n"), 400),
    Abuse("a line without a colon", more(b"nothing\r\n"), 400),
    Abuse("no name", more(b": a\r\n"), 400),
    Abuse("a target with a space (RFC 9112 §3.2)", instead(b"GET /", b"GET /a b"), 400),
    Abuse("a target with a control character", instead(b"GET /", b"GET /\x01"), 400),
    Abuse("no target", instead(b"GET /", b"GET"), 400),
    Abuse("no request line", b"\0\1\2\3\r\n\r\n", 400),
    Abuse("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    Abuse("a body (RFC 9110 §9.3.1)", instead(VERSION, VERSION + b"Content-Length: 5\r\n") + b"hello", 413),
    Abuse("a chunked body", instead(VERSION, VERSION + b"Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n", 413),
    Abuse("two lengths (RFC 9112 §6.3)", more(b"Content-Length: 0\r\nContent-Length: 5\r\n"), 400),
    Abuse("a length that is none", more(b"Content-Length: -1\r\n"), 400),
    Abuse("a length and chunks", more(b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n"), 413),
    Abuse("100 kB of one header (RFC 6585 §5)", more(b"X: " + b"x" * 100_000 + b"\r\n"), 431),
    Abuse("100 kB of many headers", more(b"".join(b"X%d: x\r\n" % n for n in range(10_000))), 431),
    Abuse("100 kB of a target (RFC 9110 §15.5.15)", instead(b"GET /", b"GET /" + b"x" * 100_000), 414),
]


async def never(ws: WebSocket) -> None:
    raise AssertionError("nobody gets in")


@pytest.mark.parametrize("abuse", ABUSES, ids=lambda abuse: abuse.what)
async def test_it_gets_its_status_and_is_closed(served: Served, abuse: Abuse) -> None:
    async with served(never, settings=SETTINGS) as server:
        async with server.open() as stream:
            tasks = trio.lowlevel.current_statistics().tasks_living
            response = await answer(stream, abuse.head)
            status, _, rest = response.partition("\r\n")
            assert status.split(" ")[:2] == ["HTTP/1.1", str(abuse.status)], response
            headers = rest.partition("\r\n\r\n")[0].lower().split("\r\n")
            assert "connection: close" in headers or "connection: upgrade, close" in headers
            if abuse.header:
                assert abuse.header.lower() in headers
        while trio.lowlevel.current_statistics().tasks_living >= tasks + 1:
            await trio.testing.wait_all_tasks_blocked(0.005)


async def answer(stream: trio.SocketStream, head: bytes) -> str:
    """All that comes until the end, whatever becomes of what is still being sent."""
    received = b""

    async def receive() -> None:
        nonlocal received
        try:
            async for data in stream:
                received += data
        except trio.BrokenResourceError:
            pass
        nursery.cancel_scope.cancel()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            try:
                for start in range(0, len(head), PIECE):
                    await stream.send_all(head[start : start + PIECE])
            except trio.BrokenResourceError:
                pass
    return received.decode("latin-1")


@pytest.mark.parametrize(
    ("head", "path"),
    [
        (GOOD.replace(b"\r\n", b"\n"), "/"),  # RFC 9112 §2.2: a bare LF may be taken for the end of a line
        (instead(b"GET /", b"GET http://h/a?b"), "/a"),  # §3.2.2: the absolute form
        (instead(b"GET /", b"GET http://h"), "/"),
        (instead(HOST, b"Host: [::1]:8080\r\n"), "/"),
        (instead(HOST, b"Host:\r\n"), "/"),  # RFC 9110 §7.2: the target has no authority
        (instead(CONNECTION, b"Connection: keep-alive\r\nConnection: upgrade\r\n"), "/"),
        (instead(UPGRADE, b"Upgrade: h2c, WebSocket\r\n"), "/"),
        (more(b"Content-Length: 0\r\n"), "/"),
        (more(b"Sec-WebSocket-Extensions: x-unknown; a=1\r\n"), "/"),
    ],
)
async def test_what_is_odd_and_allowed_gets_in(served: Served, head: bytes, path: str) -> None:
    paths: list[str] = []

    async def note(ws: WebSocket) -> None:
        paths.append(ws.request.path)

    async with served(note, settings=SETTINGS) as server, server.open() as stream:
        assert (await answer(stream, head)).startswith("HTTP/1.1 101 ")
    assert paths == [path]


async def test_a_request_behind_an_upgrade_is_no_request(served: Served) -> None:
    """What follows the head are frames (RFC 6455 §4.2.2), and these are none: masks are missing."""
    async with served(never_sends, settings=SETTINGS) as server, server.open() as stream:
        response = await answer(stream, GOOD + GOOD)
    assert response.count("HTTP/1.1 ") == 1
    assert "\x88" in response  # a close frame
    assert "\x03\xea" in response  # 1002


async def never_sends(ws: WebSocket) -> None:
    await trio.sleep_forever()
