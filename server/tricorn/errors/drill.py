"""The drill: use a server in every way, and have it fail, before it accepts its first connection.

Some modules are loaded only when a function first needs them, and most of those are needed by the handling of an error.
The drill goes these ways once: then the process has loaded everything, and what cannot be loaded shows at start-up.
"""

from __future__ import annotations

import tracemalloc  # noqa: F401, for `warnings`: it shows where what a warning is about came from
from codecs import lookup
from contextlib import contextmanager, suppress
from os import O_WRONLY, close, devnull, dup, dup2, open
from os.path import expanduser
from socket import AI_NUMERICHOST, gaierror, getaddrinfo
from time import strptime
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from tricorn.errors.report import SINK, STDERR, counted, send_records

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Sequence

    Start = Callable[..., Awaitable[object]]

PATIENCE = 10.0  # seconds; it takes a small fraction of one
READ_SIZE = 65536

# How files of source text may be encoded, which a traceback shows lines of.
ENCODINGS = ("utf-8", "utf-8-sig", "ascii", "latin-1", "cp1252")
NAME = "bücher.invalid"  # a host name that needs all that there is for host names
NO_NAME = "☃.invalid"  # one that Python sends on to Trio, which refuses it before it asks anybody

# What raises something that `traceback` treats in a way of its own, in most versions with an import.
MISTAKES = ("1 / 0", "prnit", "''.jion", "(", "b'\\xff'.decode()")

TEXT, CLOSE, PING = 0x1, 0x8, 0x9


def upgrade(path: bytes, more_headers: bytes = b"") -> bytes:
    """Make the request that opens a WebSocket. Each of `more_headers` ends with CRLF."""
    return (
        b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n%b\r\n" % (path, more_headers)
    )


def frame(opcode: int, payload: bytes) -> bytes:
    """Make a frame from a client, masked with zeros, which leaves a payload as it is (RFC 6455 §5.2)."""
    return bytes((0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0)) + payload


class Exchange(NamedTuple):
    """What is sent on a connection, and what must come before the drill hangs up."""

    request: bytes
    answer: bytes


# What every server can answer whose handler is `fail_when_told`.
EXCHANGES = (
    Exchange(b"GET /nowhere HTTP/1.1\r\nHost: drill\r\n\r\n", b"HTTP/1.1 4"),
    Exchange(b"\0\r\n\r\n", b" 400 "),
    Exchange(upgrade(b"/") + frame(PING, b"") + frame(TEXT, b"fail"), b"\x03\xf3"),  # closed with 1011
    Exchange(upgrade(b"/") + frame(CLOSE, b"\x03\xe8"), b"\x88\x02\x03\xe8"),
)


async def fail_when_told(messages: AsyncIterable[object]) -> None:
    """Be the handler of a drill: fail at the first message, in a way that needs all that reporting can need."""
    async for _ in messages:
        raise failure() from LookupError("a cause")


async def drill(start: Start, exchanges: Sequence[Exchange] = EXCHANGES) -> None:
    """Start a server, go through some exchanges with it, and cancel it: `drill(partial(serve, fail_when_told, 0))`.

    `start` is for `Nursery.start`; the first address of the started value, a `tricorn.Server`, is connected to.
    While the drill lasts, stderr is /dev/null, and records go there. Nothing is left behind, and nothing of it counts.
    If cancelled, the server closes as any other does.

    Raises:
        RuntimeError: an answer was not what it must be. Like all that the server raises, it is in an ExceptionGroup.
        trio.TooSlowError: it did not end within `PATIENCE` seconds.
    """
    before = dict(counted)
    with _silence(STDERR), _silence(SINK), _all_records(), trio.fail_after(PATIENCE):
        _call_what_loads()
        with suppress(UnicodeError):
            await trio.socket.getaddrinfo(NO_NAME, None, flags=AI_NUMERICHOST)
        async with trio.open_nursery() as nursery:
            server: Any = await nursery.start(start)
            (host, port), *_ = server.addresses
            for exchange in exchanges:
                await _go_through(exchange, host, port)
            nursery.cancel_scope.cancel()
    counted.update(before)


def _call_what_loads() -> None:
    """Call what loads a module when it is first called, in the standard library."""
    for encoding in ENCODINGS:
        lookup(encoding)
    with suppress(gaierror):
        getaddrinfo(NAME, None, flags=AI_NUMERICHOST)  # which asks no network
    strptime("2000", "%Y")
    expanduser("~nobody")


async def _go_through(exchange: Exchange, host: str, port: int) -> None:
    async with await trio.open_tcp_stream(host, port) as stream:
        await stream.send_all(exchange.request)
        received = b""
        while exchange.answer not in received:
            chunk = await stream.receive_some(READ_SIZE)
            if not chunk:
                raise RuntimeError(
                    f"the drill sent {exchange.request!r} and got {received!r}, which lacks {exchange.answer!r}"
                )
            received += chunk


def failure() -> Exception:
    """Make an exception group of one of each kind, with notes."""
    errors: list[Exception] = []
    for mistake in MISTAKES:
        try:
            eval(mistake)  # noqa: S307 (they are ours)
        except Exception as error:
            error.add_note("a note")
            errors.append(error)
    return ExceptionGroup("the drill", errors)


@contextmanager
def _all_records() -> Iterator[None]:
    """Write every record to stderr, so that the drill goes that way whatever the program has chosen."""
    before = send_records("stderr", "DEBUG")
    try:
        yield
    finally:
        send_records(*before)


@contextmanager
def _silence(descriptor: int) -> Iterator[None]:
    """Send what is written to a descriptor, by whatever way, nowhere."""
    nowhere = open(devnull, O_WRONLY)
    kept = dup(descriptor)
    dup2(nowhere, descriptor)
    try:
        yield
    finally:
        dup2(kept, descriptor)
        close(kept)
        close(nowhere)
