"""Rule E11: what a peer sends is never an ERROR, whatever Hypercorn and its protocols make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from struct import pack
from typing import Any

import pytest
import trio
from hpack import Encoder
from hypercorn.trio.tcp_server import TCPServer

from fixtures.handlers import echo
from fixtures.hosts import Host, TlsStream, native, native_tls, server_context
from tricorn.listening.http import is_of_a_peer, upgrade_required

Served = Callable[..., Any]
Records = Any

PAGE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
PATH = {":method": "GET", ":path": "/", ":scheme": "http", ":authority": "x"}


def upgrade(settings: bytes) -> bytes:
    """To HTTP/2, RFC 7540 §3.2."""
    lines = [b"Host: x", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: " + settings]
    return b"GET / HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n"


def websocket(extensions: bytes) -> bytes:
    lines = [
        b"Host: x",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        b"Sec-WebSocket-Extensions: " + extensions,
    ]
    return b"GET / HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """RFC 9113 §4.1."""
    return pack(">I", len(payload))[1:] + bytes([kind, flags]) + pack(">I", stream) + payload


DATA, HEADERS, PRIORITY, RESET, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)


def request(stream: int, flags: int = END_STREAM | END_HEADERS, **changed: str | bytes) -> bytes:
    headers = PATH | {f":{name}": value for name, value in changed.items()}
    return frame(HEADERS, flags, stream, Encoder().encode(list(headers.items())))


def streams(number: int) -> range:
    return range(1, 2 * number, 2)


SENT = {
    "settings without padding": upgrade(b"AAA"),
    "settings of seven bytes": upgrade(b"AAAAAAAAAA=="),
    "a setting out of range": upgrade(b"AAUAAAAB"),
    "settings behind a page": PAGE + upgrade(b"AAA"),
    "an extension parameter that is no number": PAGE + websocket(b"permessage-deflate; server_max_window_bits=abc"),
    "an extension parameter that is no text": PAGE + websocket(b"permessage-deflate; server_max_window_bits=\xff"),
    "a flood of pings": HTTP2 + frame(PING, 0, 0, b"12345678") * 2000,
    "a flood of settings": HTTP2 + frame(SETTINGS, 0, 0) * 2000,
    "a flood of streams": HTTP2 + b"".join(request(each, END_HEADERS) for each in streams(300)),
    "a flood of resets": HTTP2
    + b"".join(request(each) + frame(RESET, 0, each, b"\0\0\0\x08") for each in streams(300)),
    "a flood of priorities": HTTP2 + b"".join(frame(PRIORITY, 0, each, b"\0\0\0\0\5") for each in streams(3000)),
    "a flood of continuations": HTTP2 + request(1, END_STREAM) + frame(CONTINUATION, 0, 1) * 2000,
    "more than the window": HTTP2 + request(1, END_HEADERS) + frame(DATA, 0, 1, b"x" * 16000) * 20,
    "a window that overflows": HTTP2 + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 2,
    "a stream that depends on itself": HTTP2 + request(1) + frame(PRIORITY, 0, 1, b"\0\0\0\1\5"),
    "a path that is no text": HTTP2 + request(1, path=b"/\xff\xfe"),
    "a method that is no text": HTTP2 + request(1, method=b"\xff"),
    "headers that are none": HTTP2 + frame(HEADERS, END_STREAM | END_HEADERS, 1, b"\xff" * 50),
    "no frames": HTTP2 + b"\xff" * 100,
}


@pytest.mark.parametrize("host", [native, native_tls])
@pytest.mark.parametrize("sent", SENT.values(), ids=SENT)
async def test_what_a_peer_sends_is_no_error(
    running: Served, capfd: pytest.CaptureFixture[str], sent: bytes, host: Host
) -> None:
    options = {"ssl_context": server_context("h2", "http/1.1")} if host is native_tls else {}
    async with running(host, echo, app=upgrade_required, **options) as server:
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as plain:
            stream = plain
            if host is native_tls:
                stream = TlsStream(plain, "h2" if sent.startswith(HTTP2) else "http/1.1")
                await stream.do_handshake()
            with trio.move_on_after(0.3), suppress(trio.BrokenResourceError):  # some are answered and wait for more
                await stream.send_all(sent)
                while await stream.receive_some():
                    pass
        async with server.connect() as client:
            await client.send("others are served")
            assert await client.receive() == "others are served"
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line for line in lines if line["severity"] == "ERROR"] == []
    for line in lines:
        if line["severity"] == "WARNING":
            assert line["message"].startswith("the peer broke the protocol: ")
            assert "stack_trace" not in line
            assert len(line["message"]) < 300


async def test_a_bug_of_ours_that_hypercorn_calls_stays_an_error(
    served: Served, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: object, data: bytes) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr("tricorn.listening.http.Exchange._write", broken)
    async with served(echo, app=upgrade_required) as server, server.open() as stream:
        await stream.send_all(PAGE)
        with suppress(trio.BrokenResourceError):
            assert await stream.receive_some() == b""
    [record] = records.read("ERROR")
    assert record["message"] == "LookupError: a bug"


async def test_an_application_that_fails_stays_an_error(served: Served, records: Records) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await upgrade_required(scope, receive, send)
        await send({"type": "http.no.such.message"})

    async with served(echo, app=app) as server, server.open() as stream:
        await stream.send_all(PAGE)
        assert b" 500 " in await stream.receive_some()
    [record] = records.read("ERROR")
    assert "http.no.such.message" in record["message"]


@pytest.mark.parametrize("kind", [MemoryError, KeyError])
def test_no_memory_is_not_the_peers_mistake(kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        exec(f"raise {kind.__name__}", {"__name__": TCPServer.__module__})
    error = caught.value.with_traceback(caught.tb.tb_next)  # but for this function
    assert is_of_a_peer(error) is (kind is KeyError)
