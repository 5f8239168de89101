"""`tricorn.run` as a process whose tasks, threads or loop stand in the way, and what is of no concern to others."""

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
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.uri import parse_uri

from fixtures.client import Client

PATIENCE = 90  # seconds, for a whole test
LATER = 10  # seconds that a busy machine may be late

PROGRAM = """
import asyncio, time
import trio
import tricorn

async def thread(ws):
    async for message in ws:
        await trio.to_thread.run_sync(time.sleep, 60)

async def shield(ws):
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(60)

async def bare(ws):
    while True:
        try:
            await trio.sleep(0.1)
        except:
            pass

async def block(ws):
    async for message in ws:
        time.sleep(float(message))
        await ws.send("over")

async def fail(ws):
    async for message in ws:
        raise {"SystemExit": SystemExit, "GeneratorExit": GeneratorExit, "Cancelled": asyncio.CancelledError}[message]

async def echo(ws):
    async for message in ws:
        await ws.send(message)

listen = tricorn.server.listen

async def listen_and_tell(port, host):
    listeners = await listen(port, host)
    print(listeners[0].getsockname()[1], flush=True)
    return listeners

tricorn.server.listen = listen_and_tell
tricorn.send_records("stderr", "INFO")
handlers = {"/thread": thread, "/shield": shield, "/bare": bare, "/block": block, "/fail": fail, "/": echo}
tricorn.run(handlers, 0, settings=tricorn.Settings(**SETTINGS))
print("returned", flush=True)
"""

SETTINGS = {"close_timeout": 1, "drain_timeout": 2}


class Process:
    """A server in a process of its own."""

    def __init__(self, process: trio.Process, port: int) -> None:
        self.process = process
        self.port = port
        self.errors = b""

    @asynccontextmanager
    async def connect(self, path: str = "/") -> AsyncGenerator[Client]:
        """A client past its handshake."""
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            client = Client(stream, ClientProtocol(parse_uri(f"ws://h{path}"), max_size=None))
            await stream.send_all(client.request())
            await client.handshake()
            yield client

    async def read_errors(self) -> None:
        assert self.process.stderr is not None
        async for part in self.process.stderr:
            self.errors += part

    def records(self, severity: str) -> list[dict[str, Any]]:
        lines = [line for line in self.errors.splitlines() if line.startswith(b"{")]
        return [record for record in map(json.loads, lines) if record["severity"] == severity]


@asynccontextmanager
async def running(**settings: float) -> AsyncGenerator[Process]:
    program = PROGRAM.replace("**SETTINGS", f"**{SETTINGS | settings}")
    run = partial(trio.run_process, [sys.executable, "-c", program], stdout=PIPE, stderr=PIPE, check=False)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(run)
            line = b""
            while not line.endswith(b"\n"):
                line += await process.stdout.receive_some(1)
            server = Process(process, int(line))
            async with trio.open_nursery() as reading:
                reading.start_soon(server.read_errors)
                try:
                    yield server
                finally:
                    if process.poll() is None:
                        process.kill()


@pytest.mark.parametrize("path", ["/thread", "/shield", "/bare"])
async def test_what_does_not_end_holds_up_neither_its_socket_nor_the_exit(path: str) -> None:
    async with running() as server:
        async with server.connect(path) as client, server.connect() as other:
            await client.send("begin")
            await other.send("x")
            assert await other.receive() == "x"
            start = trio.current_time()
            await client.close()
            assert await client.closed() == (1000, "")
            assert trio.current_time() - start <= 1 + LATER
            start = trio.current_time()
            server.process.send_signal(signal.SIGTERM)
            assert await other.closed() == (1012, "")
        assert await server.process.wait() == 1
        assert trio.current_time() - start <= 3 + LATER
    [closed] = server.records("ERROR")
    assert closed["message"] == "a connection's tasks do not end when they are cancelled; its socket was closed"
    [ended] = server.records("CRITICAL")
    assert ended["message"] == "the process does not end in time; it is ended now"
    for record in (closed, ended):
        assert any(f"in {path[1:]}" in task for task in record["tasks"])
    if path == "/thread":
        assert b"Thread 0x" in server.errors


async def test_a_handler_that_blocks_the_loop_does_not_hold_up_the_exit() -> None:
    async with running() as server, server.connect("/block") as client:
        await client.send("60")
        await trio.sleep(0.2)  # until it blocks; if it does not yet, it ends the sooner
        start = trio.current_time()
        server.process.send_signal(signal.SIGTERM)
        await server.process.wait()
        assert trio.current_time() - start <= 3 + LATER


@pytest.mark.parametrize("name", ["SystemExit", "GeneratorExit", "Cancelled"])
async def test_what_would_end_a_program_fails_one_connection(name: str) -> None:
    async with running() as server:
        async with server.connect("/fail") as client, server.connect() as other:
            await client.send(name)
            code, reason = await client.closed()
            assert code == 1011
            await other.send("x")
            assert await other.receive() == "x"
            server.process.send_signal(signal.SIGTERM)
            assert await other.closed() == (1012, "")
        assert await server.process.wait() == 0
    [error] = server.records("ERROR")
    assert error["error_id"] == reason
    assert name in error["message"]


TIMES = {"ping_interval": 0.5, "ping_timeout": 0.5, "stall_timeout": 0.5}


@pytest.mark.parametrize("how", ["stopped", "blocked"])
async def test_nobody_is_closed_because_the_server_stood_still(how: str) -> None:
    async def answer(client: Client) -> None:
        """Answer pings until the test's own message comes back."""
        while (frame := await client.frame()).opcode is Opcode.PING:
            pass
        assert frame.data == b"still here"
        await client.close()
        assert await client.closed() == (1000, "")

    async with (
        running(**TIMES) as server,
        server.connect() as one,
        server.connect() as two,
        server.connect("/block") as blocking,
        trio.open_nursery() as nursery,
    ):
        for client in (one, two):
            nursery.start_soon(answer, client)
        await trio.sleep(0.6)  # pings are under way
        if how == "stopped":
            server.process.send_signal(signal.SIGSTOP)
            await trio.sleep(3)
            server.process.send_signal(signal.SIGCONT)
        else:
            await blocking.send("3")
            assert await blocking.receive() == "over"
        await trio.sleep(0.3)
        for client in (one, two):
            await client.send("still here")
