"""`tricorn.run` as a process: signals, and what it does until it has ended."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from subprocess import PIPE
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream

import tricorn

PATIENCE = 60  # seconds, for a whole test
AT_ONCE = 20  # seconds, on a busy machine; less than the times of PATIENT

PROGRAM = """
import trio
import tricorn

async def handler(ws):
    if ws.request.path == "/flood":
        await ws.send(bytes(2**24))
        await ws.send("never")
    if ws.request.path == "/deaf":
        with trio.CancelScope(shield=True):
            await ws.send("deaf")
            await trio.sleep(1)
    async for message in ws:
        await ws.send(message)

async def drain():
    print("draining", flush=True)
    await DRAIN
    print("drained", flush=True)

listen = tricorn.server.listen

async def listen_and_tell(port, host):
    listeners = await listen(port, host)
    print(listeners[0].getsockname()[1], flush=True)
    return listeners

tricorn.server.listen = listen_and_tell
tricorn.send_records("stderr", "INFO")
tricorn.run(handler, 0, settings=tricorn.Settings(**SETTINGS), drain=drain)
print("returned", flush=True)
"""

PATIENT = {"drain_timeout": 50, "close_timeout": 40, "stall_timeout": 1000}
SHORT = {"drain_timeout": 2, "close_timeout": 0.5, "stall_timeout": 1000}
NOTHING, FOREVER = "trio.lowlevel.checkpoint()", "trio.sleep_forever()"


class Process:
    """A server in a process of its own."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.port = 0

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def line(self) -> str:
        """The next line that it prints."""
        line = b""
        while not line.endswith(b"\n"):
            assert self.process.stdout is not None
            byte = await self.process.stdout.receive_some(1)
            assert byte
            line += byte
        return line.decode().strip()

    async def end(self) -> list[dict[str, Any]]:
        """Wait until it has ended, with 0 and having returned, and return what it reported on stderr."""
        with trio.fail_after(AT_ONCE):
            assert await self.line() == "returned"
            assert await self.process.wait() == 0
        assert self.process.stderr is not None
        return [json.loads(line) for line in b"".join([part async for part in self.process.stderr]).splitlines()]

    @asynccontextmanager
    async def connect(self, path: str = "/", size: int = 2**25) -> AsyncGenerator[WebSocketConnection]:
        async with (
            await trio.open_tcp_stream("127.0.0.1", self.port) as stream,
            trio.open_nursery() as nursery,
            await wrap_client_stream(nursery, stream, "127.0.0.1", path, max_message_size=size) as ws,
        ):
            yield ws
            await stream.aclose()
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def connect_and_never_read(self, path: str) -> AsyncGenerator[trio.SocketStream]:
        """A client that reads its handshake's response and nothing behind it, so that a flood must stall."""
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            await stream.send_all(
                b"GET %s HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n" % path.encode()
            )
            assert (await stream.receive_some(30)).startswith(b"HTTP/1.1 101 ")
            yield stream


@asynccontextmanager
async def running(drain: str = NOTHING, settings: dict[str, float] = PATIENT) -> AsyncGenerator[Process]:
    program = PROGRAM.replace("DRAIN", drain).replace("SETTINGS", repr(settings))
    run = partial(trio.run_process, [sys.executable, "-c", program], stdout=PIPE, stderr=PIPE, check=False)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            server = Process(await nursery.start(run))
            server.port = int(await server.line())
            yield server
            nursery.cancel_scope.cancel()


async def closed(ws: WebSocketConnection) -> tuple[int, str | None]:
    with pytest.raises(ConnectionClosed) as caught:
        await ws.get_message()
    assert caught.value.reason is not None
    return caught.value.reason.code, caught.value.reason.reason


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_closes_everybody(number: int) -> None:
    async with running() as server, server.connect() as one, server.connect() as other:
        await one.send_message("hello")
        assert await one.get_message() == "hello"
        server.signal(number)
        assert [await closed(ws) for ws in (one, other)] == [(1012, None)] * 2
        assert [await server.line() for _ in range(2)] == ["draining", "drained"]
        records = await server.end()
    assert [(record["message"], record["code"]) for record in records] == [("connection closed", 1012)] * 2


async def test_whatever_they_do_it_ends_in_time() -> None:
    """A client that does not read, a handler that does not hear, and a `drain` that hangs."""
    async with (
        running(FOREVER, SHORT) as server,
        server.connect_and_never_read("/flood"),
        server.connect("/deaf") as deaf,
    ):
        assert await deaf.get_message() == "deaf"
        server.signal(signal.SIGTERM)
        assert await server.line() == "draining"
        records = await server.end()
    assert [(record["message"], record["code"]) for record in records] == [("connection closed", 1012)] * 2


async def test_a_second_signal_ends_it_while_it_drains() -> None:
    async with running(FOREVER) as server, server.connect() as ws, server.connect_and_never_read("/flood"):
        await ws.send_message("hello")
        assert await ws.get_message() == "hello"
        server.signal(signal.SIGTERM)
        assert await server.line() == "draining"
        server.signal(signal.SIGTERM)
        records = await server.end()
        assert (await closed(ws))[0] == 1006
    assert [(record["severity"], record["code"]) for record in records] == [("INFO", 1006)] * 2


async def test_a_second_signal_ends_it_while_it_closes() -> None:
    async with running() as server, server.connect_and_never_read("/") as silent, server.connect() as ws:
        server.signal(signal.SIGINT)
        assert await closed(ws) == (1012, None)
        data = b""
        while not data.endswith(b"\x88\x02" + (1012).to_bytes(2, "big")):
            data += await silent.receive_some()
        server.signal(signal.SIGTERM)
        assert [await server.line() for _ in range(2)] == ["draining", "drained"]
        records = await server.end()
    assert [(record["severity"], record["code"]) for record in records] == [("INFO", 1012)] * 2


async def test_a_signal_with_nobody_there() -> None:
    async with running() as server:
        async with server.connect():
            pass
        server.signal(signal.SIGTERM)
        assert [await server.line() for _ in range(2)] == ["draining", "drained"]
        assert len(await server.end()) == 1


async def never(ws: tricorn.WebSocket) -> None:
    raise AssertionError


def test_run_raises_for_a_port_in_use() -> None:
    async def hold_a_port_and_run_on_it() -> None:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(tricorn.serve, never, 0)
            port = server.addresses[0][1]
            with pytest.raises(OSError, match="in use"):
                await trio.to_thread.run_sync(tricorn.run, never, port)
            nursery.cancel_scope.cancel()

    trio.run(hold_a_port_and_run_on_it)


def test_run_raises_for_an_address_that_is_not_this_machines() -> None:
    with pytest.raises(OSError, match="assign"):
        tricorn.run(never, 0, "192.0.2.1")
