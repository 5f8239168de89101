"""Plain `hypercorn -k trio tricorn.asgi:app`, as a process: what it promises, and what is known of Hypercorn 0.18."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds, for a whole test

FLOOD = """
import tricorn

async def handler(ws):
    await ws.send("here")
    await ws.send(bytes(2**24))
    await ws.send("never")

tricorn.send_records("stderr", "INFO")
app = tricorn.asgi_app(handler)
"""
FACTORY = """
from contextlib import asynccontextmanager
import trio

def step(text):
    with open("steps", "a") as file:
        file.write(text + "\\n")

@asynccontextmanager
async def factory():
    step("opened")
    async def agent(run):
        await run.say("waiting")
        try:
            await trio.sleep_forever()
        finally:
            step("interrupted")
    yield agent
    step("closed")
"""
# With a log that says it can be shared, which is enough: each client talks to one worker.
SHARED = """
from tricorn.chat.logs.memory import MemoryLog
MemoryLog.shared = True
from tricorn.asgi import app
"""


class Running:
    """A process, and what it has written to stderr."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.port = 0
        self.log = ""
        self._more = trio.Event()

    async def until(self, text: str, times: int = 1) -> str:
        """The log, once it has a text so many times, or is complete."""
        while self.log.count(text) < times and not self._complete:
            await self._more.wait()
        return self.log

    async def ended(self) -> int:
        """The exit status, once the log is complete."""
        while not self._complete:
            await self._more.wait()
        return await self.process.wait()

    async def read(self) -> None:
        """Read the log to its end."""
        assert self.process.stderr is not None
        async for data in self.process.stderr:
            self.log += data.decode()
            self._tell()
        self._complete = True
        self._tell()

    _complete = False

    def _tell(self) -> None:
        self._more.set()
        self._more = trio.Event()

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[WebSocketConnection]:
        """A client of the chat that has been welcomed."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with stream, trio.open_nursery() as nursery:
            wrap = partial(wrap_client_stream, nursery, stream, f"127.0.0.1:{self.port}", "/ws")
            client = await wrap(subprotocols=["tricorn.v1"])
            assert (await receive(client))["type"] == "welcome"
            yield client
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def hypercorn(
    directory: Path, *options: str, app: str = "tricorn.asgi:app", serves: bool = True, **environ: str
) -> AsyncGenerator[Running]:
    """A process in a group of its own. What is left of that at the end is killed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("K_", "PORT"))}
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "hypercorn", "-b", "127.0.0.1:0", *options, app],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=directory,
        env={**inherited, "PYTHONPATH": str(directory), **environ},
        start_new_session=True,
    )
    assert process.stderr is not None
    running = Running(process)
    try:
        async with process.stderr, trio.open_nursery() as nursery:
            nursery.start_soon(running.read)
            with trio.fail_after(PATIENCE):
                if serves:
                    address = re.search(r"Running on http://127.0.0.1:(\d+)", await running.until("CTRL + C"))
                    assert address, running.log
                    running.port = int(address[1])
                yield running
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def receive(client: WebSocketConnection) -> dict[str, Any]:
    answer: dict[str, Any] = msgspec.json.decode(await client.get_message())
    return answer


async def collect(client: WebSocketConnection, types: list[str]) -> None:
    while True:
        types.append((await receive(client))["type"])


async def closed(client: WebSocketConnection) -> list[str]:
    """The types of what still comes; the close code must be 1012."""
    types: list[str] = []
    with pytest.raises(ConnectionClosed) as end:
        await collect(client, types)
    assert end.value.reason is not None
    assert end.value.reason.code == 1012
    return types


async def test_the_chat_and_its_end(tmp_path: Path) -> None:
    async with hypercorn(tmp_path, "-k", "trio") as server:
        async with server.connect() as client:
            await client.send_message('{"type":"open","conversation":"c"}')
            await client.send_message('{"type":"post","conversation":"c","id":"1","text":"6*7"}')
            answer: dict[str, Any] = {}
            while answer.get("type") != "agent_completed":
                answer = await receive(client)
            assert answer["text"] == "6*7 = 42"
            server.process.terminate()
            assert await closed(client) == ["closing"]
        assert await server.ended() == 0
        assert "imported after start-up" not in server.log
        assert "Traceback" not in server.log


async def test_what_an_agent_needs_is_closed_after_the_drain(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    async with hypercorn(tmp_path, "-k", "trio", TRICORN_AGENT="mine:factory") as server:
        async with server.connect() as client:
            await client.send_message('{"type":"open","conversation":"c"}')
            await client.send_message('{"type":"post","conversation":"c","id":"1","text":"wait"}')
            while (await receive(client))["type"] != "agent_message":
                pass
            server.process.terminate()
            types = await closed(client)
            assert types[0] == "closing"
            assert types[-1] == "agent_completed"
        assert await server.ended() == 0
        assert "Traceback" not in server.log
    assert (tmp_path / "steps").read_text().split() == ["opened", "interrupted", "closed"]


async def test_what_an_agent_fails_to_open_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY.replace('step("opened")', "1 / 0"))
    async with hypercorn(tmp_path, "-k", "trio", serves=False, TRICORN_AGENT="mine:factory") as server:
        await server.ended()
        record = msgspec.json.decode(server.log.splitlines()[0])
    problem = "--agent mine:factory: starting it raised ZeroDivisionError: division by zero (mine.py, line 11)"
    assert (record["severity"], record["message"]) == ("CRITICAL", f"did not start up: {problem}")


async def test_the_asyncio_version_of_the_chat(tmp_path: Path) -> None:
    """On Hypercorn's asyncio worker, which tells an application of SIGTERM only when its connections are gone."""
    app = "bench.asyncio_version.asgi:app"
    async with hypercorn(tmp_path, "-k", "asyncio", app=app, PYTHONPATH=str(ROOT)) as server:
        async with server.connect() as client:
            await client.send_message('{"type":"open","conversation":"c"}')
            await client.send_message('{"type":"post","conversation":"c","id":"1","text":"6*7"}')
            answer: dict[str, Any] = {}
            while answer.get("type") != "agent_completed":
                answer = await receive(client)
            assert answer["seq"] == 8
            assert answer["text"] == "6*7 = 42"
        server.process.terminate()
        assert await server.ended() == 0
        assert "Traceback" not in server.log


@pytest.mark.parametrize("group", [False, True], ids=["parent", "group"])
async def test_several_workers_all_end_in_order(tmp_path: Path, group: bool) -> None:
    """Also where whoever ends them sends SIGTERM to every process, as systemd does, and Hypercorn to its workers."""
    (tmp_path / "shared.py").write_text(SHARED)
    async with hypercorn(tmp_path, "-k", "trio", "-w", "2", app="shared:app", TRICORN_LOG="memory:") as server:
        await server.until("CTRL + C", times=2)
        ends: list[list[str]] = []

        async def client(task_status: trio.TaskStatus[None]) -> None:
            async with server.connect() as ws:
                task_status.started()
                ends.append(await closed(ws))

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                await nursery.start(client)
            if group:
                os.killpg(server.process.pid, signal.SIGTERM)
            else:
                server.process.terminate()
        assert ends == [["closing"]] * 6
        assert await server.ended() == 0


async def test_who_reads_nothing_does_not_hold_up_the_end(tmp_path: Path) -> None:
    (tmp_path / "flood.py").write_text(FLOOD)
    async with hypercorn(tmp_path, "-k", "trio", app="flood:app") as server:
        sock = trio.socket.socket()
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
        await sock.connect(("127.0.0.1", server.port))
        stream = trio.SocketStream(sock)
        await stream.send_all(UPGRADE)
        response = b""
        while b"here" not in response:
            response += await stream.receive_some(256)
        server.process.terminate()
        with trio.fail_after(20):
            assert await server.ended() == 0
        assert '"code":1012' in server.log
        sock.close()


async def test_who_does_not_read_pages_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with hypercorn(tmp_path, "-k", "trio") as server:
        sock = trio.socket.socket()
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
        await sock.connect(("127.0.0.1", server.port))
        stream = trio.SocketStream(sock)

        async def ask() -> None:
            with suppress(trio.BrokenResourceError):  # it ends while some of it is on the way
                await stream.send_all(b"GET /client.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 5000)

        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(ask)  # how much the kernel takes varies
            assert (await stream.receive_some(100)).startswith(b"HTTP/1.1 200 ")
            server.process.terminate()
            with trio.fail_after(20):
                assert await server.ended() == 0
            nursery.cancel_scope.cancel()


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


async def test_bytes_behind_an_upgrade_end_that_connection_and_not_the_worker(tmp_path: Path) -> None:
    """Hypercorn 0.18 answers such a request with 400, and ends with the worker if it is accepted meanwhile."""
    (tmp_path / "flood.py").write_text(FLOOD)
    async with hypercorn(tmp_path, "-k", "trio", app="flood:app") as server:
        for behind in (b"\x81\x80\0\0\0\0", b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"\0" * 100_000):
            for _ in range(5):
                async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
                    await stream.send_all(UPGRADE + behind)
                    assert (await stream.receive_some()).startswith(b"HTTP/1.1 400 ")
        server.process.terminate()
        with trio.fail_after(20):
            assert await server.ended() == 0
        assert "Traceback" not in server.log


async def test_without_a_key_only_this_machine_comes_in(tmp_path: Path) -> None:
    async with hypercorn(tmp_path, "-k", "trio") as server:
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            head = UPGRADE.replace(b"GET / ", b"GET /ws ").replace(b"127.0.0.1", b"example.org")
            head = head.replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Protocol: tricorn.v1\r\n\r\n")
            await stream.send_all(head)
            answer = b""
            while b"\x88" not in answer:
                answer += await stream.receive_some()
        assert (4501).to_bytes(2, "big") in answer


@pytest.mark.parametrize(
    ("options", "environ", "line"),
    [
        ([], {}, "tricorn: Tricorn needs Trio: start it with hypercorn -k trio"),
        (["-k", "trio"], {"TRICORN_NONE": "1"}, "tricorn: TRICORN_NONE: no such setting"),
        (["-k", "trio"], {"TRICORN_AGENT": "no.such:agent"}, "tricorn: --agent no.such:agent: there is no module"),
    ],
    ids=["asyncio", "setting", "agent"],
)
async def test_what_keeps_it_from_starting_is_one_line(
    tmp_path: Path, options: list[str], environ: dict[str, str], line: str
) -> None:
    async with hypercorn(tmp_path, *options, serves=False, **environ) as server:
        await server.ended()
        assert server.log.startswith(line), server.log
        assert server.log.count("\n") == 1, server.log


@pytest.mark.parametrize("log", ["memory:", "sqlite:///log.db"])
async def test_several_workers_with_a_log_each_do_not_start(tmp_path: Path, log: str) -> None:
    line = "tricorn: hypercorn -w 2: workers need a log that they can share, redis:// or postgresql://; without one "
    async with hypercorn(tmp_path, "-k", "trio", "-w", "2", serves=False, TRICORN_LOG=log) as server:
        await server.ended()
        # Hypercorn ends the others when the first has ended, maybe before they say so too.
        assert set(server.log.splitlines()) == {f"{line}there must be 1"}


CHILD = """
from importlib import import_module
from multiprocessing import get_context

if __name__ == "__main__":
    child = get_context("spawn").Process(target=import_module, args=("tricorn.asgi",))
    child.start()
    child.join()
    raise SystemExit(child.exitcode)
"""


@pytest.mark.parametrize("log", ["memory:", "unix:///nowhere"])
async def test_a_process_of_a_program_that_is_not_known_needs_a_log_that_can_be_shared(log: str) -> None:
    """It may be one of several."""
    with trio.fail_after(PATIENCE):
        environ = {**os.environ, "TRICORN_LOG": log}
        done = await trio.run_process([sys.executable, "-c", CHILD], capture_stderr=True, check=False, env=environ)
    if log == "memory:":
        start = b"tricorn: a process that another one started: workers need a log that they can share, "
        assert (done.returncode, done.stderr.startswith(start)) == (1, True), done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, b"")


async def test_a_key_that_cannot_be_read_is_told_first(tmp_path: Path) -> None:
    async with hypercorn(tmp_path, "-k", "trio", serves=False, TRICORN_JWT_KEY="file:///none") as server:
        await server.ended()
        record = msgspec.json.decode(server.log.splitlines()[0])
        assert record["severity"] == "CRITICAL"
        assert record["message"].startswith("did not start up: TRICORN_JWT_KEY: cannot be read")


async def test_importing_tricorn_reads_no_environment() -> None:
    command = [sys.executable, "-c", "import sys, tricorn; assert 'tricorn.chat' not in sys.modules"]
    await trio.run_process(command, env={**os.environ, "TRICORN_NONE": "1"})
