"""The drill: what `tricorn serve` rehearses between binding its address and accepting the first connection.

Some modules are loaded only when a function first needs them, much of it on the way of an error. The drill goes those
ways once, so that a process that serves has loaded everything, and what cannot be loaded shows before anybody comes.
"""

from __future__ import annotations

import tracemalloc  # noqa: F401, for `warnings`: it shows where what a warning is about came from
from codecs import lookup
from contextlib import contextmanager, suppress
from functools import partial
from os import O_WRONLY, close, devnull, dup, dup2, open
from os.path import expanduser
from socket import AI_NUMERICHOST, gaierror, getaddrinfo
from time import strptime
from typing import TYPE_CHECKING

import idna
import trio

from tricorn.chat import SUBPROTOCOLS, Chat
from tricorn.chat.logs.memory import MemoryLog
from tricorn.errors.report import SINK, STDERR, send_records
from tricorn.metrics import forget
from tricorn.server import serve
from tricorn.service.auth import rehearse
from tricorn.service.pages import pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tricorn.chat import Run
    from tricorn.connection import WebSocket

PATIENCE = 10.0  # seconds; it takes a small fraction of one
READ_SIZE = 65536

# How files of source text may be encoded, which a traceback shows lines of.
ENCODINGS = ("utf-8", "utf-8-sig", "ascii", "latin-1", "cp1252")
NAME = "bücher.invalid"  # a host name that needs all that there is for host names

# What raises something that `traceback` treats in a way of its own, in most versions with an import.
MISTAKES = ("1 / 0", "prnit", "''.jion", "(", "b'\\xff'.decode()")


def _upgrade(path: bytes) -> bytes:
    return (
        b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        b"Sec-WebSocket-Protocol: tricorn.v1\r\n\r\n" % path
    )


def _frame(opcode: int, payload: bytes) -> bytes:
    """A frame from a client, masked with zeros, which leaves a payload as it is (RFC 6455 §5.2)."""
    return bytes((0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0)) + payload


TEXT, CLOSE, PING = 0x1, 0x8, 0x9

# What is sent on a connection, and what must come before the drill hangs up.
REHEARSED = (
    (b"GET / HTTP/1.1\r\nHost: drill\r\n\r\n", b"</html>"),
    (b"GET /readyz HTTP/1.1\r\nHost: drill\r\n\r\n", b'"ok"'),
    (b"GET /nowhere HTTP/1.1\r\nHost: drill\r\n\r\n", b" 404 "),
    (b"\0\r\n\r\n", b" 400 "),
    (
        # HTTP/2 (RFC 9113): the preface, SETTINGS without any, HEADERS of GET http / on the host x, which is all
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + bytes.fromhex("000000 04 00 00000000")
        + bytes.fromhex("000006 01 05 00000001 82 86 84 41 01 78"),
        b"</html>",
    ),
    (_upgrade(b"/fails"), b"\x03\xf3"),  # closed with 1011
    (
        _upgrade(b"/ws")
        + _frame(PING, b"")
        + _frame(TEXT, b"{}")
        + _frame(TEXT, b'{"type":"open","conversation":"drill"}')
        + _frame(TEXT, b'{"type":"post","conversation":"drill","id":"1","text":"x"}'),
        b'"agent_completed"',
    ),
    (_upgrade(b"/ws") + _frame(CLOSE, b"\x03\xe8"), b"\x88\x02\x03\xe8"),
)


async def drill() -> None:
    """Serve on a free port of this machine, use it in every way, have it fail, and end it. Leaves nothing behind.

    What it reports goes nowhere: while it runs, stderr is /dev/null, and records go there. If cancelled, its server
    closes as any other does.

    Raises:
        RuntimeError: something was not answered as it must be. As all that the server raises, in an ExceptionGroup.
        trio.TooSlowError: it did not end within `PATIENCE` seconds.
    """
    with _silence(STDERR), _silence(SINK), _all_records(), trio.fail_after(PATIENCE):
        _call_what_loads()
        async with Chat(_failing_agent, log=MemoryLog()) as chat, trio.open_nursery() as nursery:

            async def handler(ws: WebSocket) -> None:
                if ws.path == "/fails":
                    raise _failure() from LookupError("a cause")
                await chat.session(ws)

            start = partial(
                serve, handler, 0, subprotocols=SUBPROTOCOLS, app=pages(chat.why_not_ready), drain=chat.drain
            )
            [(_, port)] = await nursery.start(start)
            for request, answer in REHEARSED:
                await _exchange(port, request, answer)
            nursery.cancel_scope.cancel()
    forget()


def _call_what_loads() -> None:
    """Call what loads a module when it is first called, in the standard library and in what we and Trio use."""
    rehearse()
    for encoding in ENCODINGS:
        lookup(encoding)
    with suppress(gaierror):
        getaddrinfo(NAME, None, flags=AI_NUMERICHOST)  # which asks no network
    idna.encode(NAME, uts46=True)
    strptime("2000", "%Y")
    expanduser("~nobody")


async def _exchange(port: int, request: bytes, answer: bytes) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(request)
        received = b""
        while answer not in received:
            chunk = await stream.receive_some(READ_SIZE)
            if not chunk:
                raise RuntimeError(f"the drill sent {request!r} and got {received!r}, which lacks {answer!r}")
            received += chunk


async def _failing_agent(run: Run) -> None:
    await run.think("of failing")
    async with run.tool("failure"):
        raise _failure() from LookupError("a cause")


def _failure() -> Exception:
    """An exception group of one of each kind, with notes."""
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
