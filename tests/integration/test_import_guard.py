"""What `tricorn serve` needs is loaded before it says that it listens: real processes, with the guard that denies."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream

from fixtures.hosts import TlsStream, authority

PATIENCE = 60  # seconds, for a whole test

AGENT = """
from socket import AI_NUMERICHOST, gaierror

from trio import sleep, socket, to_thread

from tricorn.chat import ToolError
from tricorn.chat.agents.demo import demo

async def agent(run):
    match run.message.split(maxsplit=1):
        case ["import", name]:
            __import__(name)
        case ["raise", expression]:
            async with run.tool("raise"):
                await sleep(0)
                eval(expression)
                raise ExceptionGroup("several", [ToolError("one"), LookupError("another")])
        case ["forget", _]:
            sleep(0)
        case ["thread", text]:
            await run.say(await to_thread.run_sync(str.upper, text))
        case ["resolve", name]:
            try:
                await socket.getaddrinfo(name, 80, flags=AI_NUMERICHOST)
            except gaierror as error:
                raise LookupError(name) from error
        case _:
            await demo(run)
"""
SKILLS = [
    "hello",
    "12*(7+5)^2",
    "1/0",
    "9^9^9^9",
    "what time is it in Tokyo",
    "what time is it in Atlantis",
    "gmt",
    "count the letters in “Ærøskøbing”",
    "how many words are in one two three",
    "statistics of the text: one. two",
    "statistics of …",
    "reverse e\u0301a",
    "slow 0.01",
    "slow 999999",
]
FAILURES = [
    "raise 1 / 0",
    "raise nmae",
    "raise ''.jion",
    "raise (",
    "raise b'\\xff'.decode()",
    "raise '\\udc80'.encode()",
    "raise open('/no/such/file')",
    "raise 1",
    "forget this",
    "resolve no-such-host.invalid",
    "resolve bücher.invalid",
]
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
GET = b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
MASK = bytes(4)
# Each ends its connection.
RAW = {
    "page": GET % b"/",
    "script": GET % b"/client.js",
    "health": GET % b"/healthz",
    "no such page": GET % b"/nowhere",
    "head": b"HEAD / HTTP/1.0\r\n\r\n",
    "post": b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    "h2c": GET.replace(b": close", b": Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAAA") % b"/",
    "no HTTP": b"\x16\x03\x01\r\n\r\n",
    "long head": GET % (b"/" * 20000),
    "broken HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(20),
    "no such WebSocket": UPGRADE.replace(b"/ws", b"/no"),
    "no key": UPGRADE.replace(b"-Key", b"-Kee"),
    "no version": UPGRADE.replace(b"13", b"12"),
    "unmasked": UPGRADE + b"\x81\0",
    "no such opcode": UPGRADE + b"\x83\x80" + MASK,
    "no UTF-8": UPGRADE + b"\x81\x81" + MASK + b"\xff",
    "no fragment": UPGRADE + b"\x80\x80" + MASK,
    "too long": UPGRADE + b"\x81\xff" + bytes((127,)) * 8 + MASK,
    "closed": UPGRADE + b"\x89\x80" + MASK + b"\x81\x82" + MASK + b"{}" + b"\x82\x80" + MASK + b"\x88\x80" + MASK,
}


@dataclass
class Server:
    port: int
    process: trio.Process
    stderr: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stderr.read_text().splitlines() if line.startswith("{")]

    def check_that_nothing_was_imported(self) -> None:
        assert [record["stack_trace"] for record in self.records if "module" in record] == []
        assert "ImportError" not in self.stderr.read_text()


@asynccontextmanager
async def running(directory: Path, *command: str, **environment: str) -> AsyncGenerator[Server]:
    """A server that says its port at the end of its first line; SIGTERM ends it, with status 0."""
    stderr = directory / "stderr"
    with trio.fail_after(PATIENCE), stderr.open("wb") as file:
        async with trio.open_nursery() as nursery:
            run = partial(
                trio.run_process, stdout=subprocess.PIPE, stderr=file, cwd=directory, env=os.environ | environment
            )
            process = await nursery.start(run, [sys.executable, *command])
            line = b""
            while not line.endswith(b"\n"):
                chunk = await process.stdout.receive_some()
                assert chunk, stderr.read_text()
                line += chunk
            yield Server(int(line.rpartition(b":")[2]), process, stderr)
            process.terminate()


@asynccontextmanager
async def tricorn(directory: Path, guard: str, *options: str) -> AsyncGenerator[Server]:
    """`tricorn serve` with an agent that fails to order."""
    directory.joinpath("agent_to_order.py").write_text(AGENT)
    command = "-m tricorn serve --bind 127.0.0.1:0 --agent agent_to_order:agent"
    async with running(directory, *command.split(), *options, TRICORN_IMPORT_GUARD=guard) as server:
        yield server


class Client:
    def __init__(self, ws: WebSocketConnection) -> None:
        self._ws = ws
        self._posts = 0

    async def say(self, **request: Any) -> None:
        await self._ws.send_message(json.dumps(request))

    async def until(self, type: str) -> dict[str, Any]:
        while (message := json.loads(await self._ws.get_message()))["type"] != type:
            pass
        return message

    async def post(self, text: str) -> None:
        self._posts += 1
        await self.say(type="post", id=f"{self._posts}", conversation="c", text=text)

    async def outcome(self, text: str) -> str:
        await self.post(text)
        return (await self.until("agent_completed"))["outcome"]


@asynccontextmanager
async def connected(port: int, path: str) -> AsyncGenerator[WebSocketConnection]:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as nursery:
        yield await wrap_client_stream(nursery, stream, "127.0.0.1", path, subprotocols=["tricorn.v1"])
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def chatting(server: Server) -> AsyncGenerator[Client]:
    async with connected(server.port, "/ws") as ws:
        client = Client(ws)
        await client.say(type="open", conversation="c")
        yield client


async def talk(port: int, sent: bytes) -> bytes:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(sent)
        received = [chunk async for chunk in stream]
    return b"".join(received)


async def get_by_http2(port: int, paths: Sequence[bytes]) -> list[bytes]:
    """The status of each, all asked for at once on one connection."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
    connection.initiate_connection()
    for stream_id, path in enumerate(paths):
        connection.send_headers(
            2 * stream_id + 1,
            [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"x"), (b":path", path)],
            end_stream=True,
        )
    statuses: dict[int, bytes] = {}
    ended = 0
    async with await trio.open_tcp_stream("127.0.0.1", port) as plain:
        stream = TlsStream(plain, "h2")
        await stream.send_all(connection.data_to_send())
        async for chunk in stream:
            for event in connection.receive_data(chunk):
                if isinstance(event, h2.events.ResponseReceived):
                    statuses[event.stream_id] = dict(event.headers)[b":status"]
                elif isinstance(event, h2.events.DataReceived):
                    connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                ended += isinstance(event, h2.events.StreamEnded)
            await stream.send_all(connection.data_to_send())
            if ended == len(paths):
                break
    return [status for _, status in sorted(statuses.items())]


def break_off(port: int, sent: bytes) -> None:
    """Send and be gone at once: RST."""
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(sent)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def test_talking_to_people_imports_nothing(tmp_path: Path) -> None:
    async with tricorn(tmp_path, "deny") as server, chatting(server) as client:
        for text in [*SKILLS, "thread one"]:
            assert await client.outcome(text) == "success"
        await client.post("slow 60")
        run = (await client.until("tool_executing"))["run"]
        await client.say(type="cancel", conversation="c", run=run)
        assert (await client.until("agent_completed"))["outcome"] == "cancelled"
        for request in ({"type": "nonsense"}, {"type": "open"}, {}):
            await client.say(**request)
            await client.until("error")
        await client.say(type="ping")
        await client.until("pong")
        await client.say(type="leave", conversation="c")
    server.check_that_nothing_was_imported()


async def test_agents_that_fail_import_nothing(tmp_path: Path) -> None:
    async with tricorn(tmp_path, "deny") as server, chatting(server) as client:
        outcomes = [await client.outcome(text) for text in FAILURES]
    assert outcomes == ["success" if text.startswith("forget") else "failed" for text in FAILURES]
    assert "never awaited" in server.stderr.read_text()
    server.check_that_nothing_was_imported()


async def test_pages_refusals_and_violations_import_nothing(tmp_path: Path) -> None:
    async with tricorn(tmp_path, "deny") as server:
        for sent in RAW.values():
            assert await talk(server.port, sent)
        for sent in (b"", GET % b"/", UPGRADE):
            break_off(server.port, sent)
        assert b"ok" in await talk(server.port, GET % b"/healthz")
    server.check_that_nothing_was_imported()


async def test_pages_inside_tls_import_nothing(tmp_path: Path) -> None:
    certificate = authority().issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "certificate.pem")
    tmp_path.joinpath("tls.toml").write_text('certfile = "certificate.pem"\nkeyfile = "certificate.pem"\n')
    async with tricorn(tmp_path, "deny", "--config", "tls.toml") as server:
        assert await get_by_http2(server.port, [b"/", b"/healthz", b"/no"]) == [b"200", b"200", b"404"]
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            encrypted = TlsStream(stream)
            await encrypted.send_all(UPGRADE)
            assert b" 101 " in await encrypted.receive_some()
    server.check_that_nothing_was_imported()


async def test_a_drain_imports_nothing(tmp_path: Path) -> None:
    async with tricorn(tmp_path, "deny") as server, chatting(server) as client:
        await client.post("slow 60")
        await client.until("tool_executing")
        async with await trio.open_tcp_stream("127.0.0.1", server.port):
            server.process.send_signal(signal.SIGTERM)
            assert (await client.until("agent_completed"))["outcome"] == "interrupted"
            with pytest.raises(ConnectionClosed) as closed:
                await client.until("nothing more")
            assert closed.value.reason.code == 1012
            await server.process.wait()
    server.check_that_nothing_was_imported()


@pytest.mark.parametrize(
    ("guard", "outcome", "messages"),
    [
        ("off", "success", []),
        ("count", "success", []),
        ("report", "success", ["wave is imported after start-up"]),
        (
            "deny",
            "failed",
            ["wave is imported after start-up", "ImportError: wave must not be imported after start-up"],
        ),
    ],
)
async def test_an_agent_that_imports_late(tmp_path: Path, guard: str, outcome: str, messages: list[str]) -> None:
    async with tricorn(tmp_path, guard) as server, chatting(server) as client:
        assert await client.outcome("import wave") == outcome
    records = [record for record in server.records if record["message"] != "connection closed"]
    assert [record["message"].partition(": do it")[0] for record in records] == messages
    line = 1 + AGENT[: AGENT.index("__import__")].count("\n")
    for record in records:
        assert f'agent_to_order.py", line {line}, in agent' in record["stack_trace"]


PROGRAM = """
import signal, trio, tricorn
from functools import partial
from tricorn.errors.drill import drill, fail_when_told
from tricorn.errors.import_guard import guarded

async def handler(ws):
    eval(await ws.receive())
    raise ExceptionGroup("several", [OSError(5, "one"), LookupError("another")]) from ValueError("a cause")

async def main():
    await drill(partial(tricorn.serve, fail_when_told, 0))
    with guarded("count") as late:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                server = await nursery.start(tricorn.serve, handler, 0)
                [(_, port)] = server.addresses
                print(f"at :{port}", flush=True)
                await anext(signals)
                nursery.cancel_scope.cancel()
    assert not late, late

trio.run(main)
"""


async def test_handlers_that_fail_import_nothing(tmp_path: Path) -> None:
    """A program of one's own, with the drill and the guard: it exits with 0 only if the guard counted nothing."""
    mistakes = [text.removeprefix("raise ") for text in FAILURES if text.startswith("raise ")]
    async with running(tmp_path, "-c", PROGRAM) as server:
        for mistake in mistakes:
            async with connected(server.port, "/") as ws:
                await ws.send_message(mistake)
                with pytest.raises(ConnectionClosed) as closed:
                    await ws.get_message()
                assert closed.value.reason.code == 1011
    assert len([record for record in server.records if record["severity"] == "ERROR"]) == len(mistakes)
