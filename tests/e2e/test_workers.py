"""`tricorn serve --workers`: processes on one port, and who looks after them.

The chat's log here is one that says it can be shared, which is enough: each client talks to one worker.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio_websocket import WebSocketConnection, wrap_client_stream

from fixtures.workers import AGENT, SHARED, ask, closed
from tricorn.service.workers import Supervisor, reserve

PATIENCE = 60  # seconds, for what takes one or two
SERVE = ("serve", "--audit", "off", "--bind", "127.0.0.1:0", "--agent", "mine:pid")
SETTINGS = {"TRICORN_METRICS": "127.0.0.1:0"}
# A signal ends a connection by its timeouts only if nothing else does.
PATIENT = {**SETTINGS, "TRICORN_DRAIN_TIMEOUT": "50", "TRICORN_CLOSE_TIMEOUT": "40"}
SHORT = {**SETTINGS, "TRICORN_DRAIN_TIMEOUT": "1", "TRICORN_CLOSE_TIMEOUT": "0.5"}

FACTORY = """
import os
from contextlib import asynccontextmanager

def step(text):
    with open("steps", "a") as file:
        file.write(f"{text} {os.getpid()}\\n")

@asynccontextmanager
async def pid():
    step("opened")
    async def agent(run):
        return str(os.getpid())
    yield agent
    step("closed")
"""

Start = Callable[..., Awaitable["Service"]]


@dataclass
class Service:
    process: trio.Process
    port: int
    metrics: int
    said: bytes = b""
    """What was read of stderr, which is the workers' too."""

    async def until_said(self, text: bytes, count: int) -> None:
        assert self.process.stderr is not None
        while self.said.count(text) < count:
            self.said += await self.process.stderr.receive_some()

    async def records(self) -> list[dict[str, Any]]:
        """All of stderr, once everybody has ended."""
        assert self.process.stderr is not None
        self.said += b"".join([part async for part in self.process.stderr])
        return [json.loads(line) for line in self.said.splitlines()]

    @asynccontextmanager
    async def client(self) -> AsyncGenerator[tuple[WebSocketConnection, int]]:
        """A connection, and the process that serves it."""
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream, trio.open_nursery() as nursery:
            ws = await wrap_client_stream(nursery, stream, "127.0.0.1", "/ws", subprotocols=["tricorn.v1"])
            await ws.send_message(json.dumps({"type": "open", "conversation": "c"}))
            yield ws, await ask(ws)
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def client_of(self, wanted: Callable[[int], bool]) -> AsyncGenerator[tuple[WebSocketConnection, int]]:
        """A connection that one of the processes wanted serves. The kernel picks one at random."""
        while True:
            async with self.client() as (ws, pid):
                if wanted(pid):
                    yield ws, pid
                    return

    async def scrape(self) -> dict[tuple[str, ...], float]:
        async with await trio.open_tcp_stream("127.0.0.1", self.metrics) as stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            _, _, body = b"".join([part async for part in stream]).partition(b"\r\n\r\n")
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        }

    async def end(self) -> int:
        with trio.fail_after(PATIENCE):
            return await self.process.wait()


async def gone(pid: int) -> None:
    """Wait until a process that is not ours has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    await trio.lowlevel.wait_readable(descriptor)
    os.close(descriptor)


@pytest.fixture
async def start(tmp_path: Path, nursery: trio.Nursery) -> AsyncGenerator[Start]:
    (tmp_path / "mine.py").write_text(AGENT)

    async def launch(environ: dict[str, str] = SETTINGS, workers: int = 2) -> Service:
        command = [sys.executable, "-c", SHARED, *SERVE, "--workers", str(workers)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        options = {"cwd": tmp_path, "env": os.environ | environ, "process_group": 0}
        run = partial(trio.run_process, command, **pipes, **options, check=False)
        process = await nursery.start(run)
        said = b""
        while said.count(b"\n") < 2:
            said += await process.stdout.receive_some() or pytest.fail("it has ended")
        metrics, port = map(int, re.findall(rb":(\d+)", said))
        return Service(process, port, metrics)

    with trio.fail_after(PATIENCE):
        yield launch
    nursery.cancel_scope.cancel()


async def test_they_share_a_port_and_one_that_is_killed_is_replaced(start: Start) -> None:
    service = await start()
    async with (
        service.client() as (one, first),
        service.client_of(lambda pid: pid != first) as (other, second),
    ):
        before = await service.scrape()
        assert before["tricorn_connections", "open"] == 2
        assert before["tricorn_messages_total", "sent"] > 10
        assert {"1", "2", "supervisor"} == {name[1] for name in before if name[0] == "process_open_fds"}
        os.kill(first, signal.SIGKILL)
        assert await closed(one) == 1006
        assert await ask(other) == second
        await service.until_said(b"ended: signal 9", 1)
        after = await service.scrape()
        assert after["tricorn_connections", "open"] == after["tricorn_worker_ends_total",] == 1
        assert after["tricorn_connections_opened_total",] == before["tricorn_connections_opened_total",]
        assert after["tricorn_messages_total", "received"] == before["tricorn_messages_total", "received"] + 1
        async with service.client_of(lambda pid: pid not in (first, second)):
            after = await service.scrape()
            assert after["tricorn_connections", "open"] == 2
            assert after["tricorn_late_imports_total",] == 0
        assert await ask(other) == second
        service.process.terminate()
        assert await service.end() == 0
        assert await closed(other) == 1012
    [record] = [record for record in await service.records() if record["severity"] == "ERROR"]
    assert re.fullmatch(r"worker [12] ended: signal 9 \(Killed\)", record["message"])
    await gone(second)


async def test_ctrl_c_reaches_each_of_them_once(start: Start) -> None:
    service = await start(PATIENT)
    async with service.client() as (ws, _):
        os.killpg(service.process.pid, signal.SIGINT)
        assert await closed(ws) == 1012
        assert await service.end() == 0


async def test_a_second_signal_aborts(start: Start) -> None:
    service = await start(PATIENT)
    async with await trio.open_tcp_stream("127.0.0.1", service.port) as silent:
        await silent.send_all(
            b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await silent.receive_some()
        service.process.terminate()
        data = b""
        while not data.endswith(b"\x88\x02" + (1012).to_bytes(2, "big")):
            data += await silent.receive_some()
        service.process.terminate()
        with trio.fail_after(20):
            assert await service.end() == 0


async def test_when_the_supervisor_is_killed_they_end_as_if_told_to(start: Start) -> None:
    service = await start()
    async with service.client() as (ws, pid):
        service.process.kill()
        assert await closed(ws) == 1012
        await gone(pid)


async def test_one_that_hangs_holds_up_neither_a_scrape_nor_the_end(start: Start) -> None:
    service = await start(SHORT)
    async with service.client() as (_, pid):
        assert (await service.scrape())["tricorn_connections", "open"] == 1
        os.kill(pid, signal.SIGSTOP)
        assert (await service.scrape())["tricorn_connections", "open"] == 1
        service.process.terminate()
        assert await service.end() == 0
        await gone(pid)


async def test_one_that_cannot_start_again_is_tried_again(start: Start, tmp_path: Path) -> None:
    service = await start()
    module = tmp_path / "mine.py"
    async with service.client() as (_, first), service.client_of(lambda pid: pid != first) as (other, second):
        module.write_text("raise RuntimeError('half a deployment')")
        os.kill(first, signal.SIGKILL)
        await service.until_said(b"half a deployment", 2)
        assert await ask(other) == second
        module.write_text(AGENT)
        async with service.client_of(lambda pid: pid != second):
            pass
    service.process.terminate()
    assert await service.end() == 0


async def test_each_opens_what_its_agent_needs(start: Start, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    service = await start()
    async with service.client() as (_, first), service.client_of(lambda pid: pid != first) as (_, second):
        pass
    service.process.terminate()
    assert await service.end() == 0
    steps = (tmp_path / "steps").read_text().splitlines()
    assert sorted(steps) == sorted(f"{step} {pid}" for step in ("opened", "closed") for pid in (first, second))


async def test_what_one_fails_to_open_is_said_once_and_ends_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY.replace('step("opened")', "1 / 0"))
    status, said = await refused(*SERVE, "--workers", "3", cwd=tmp_path)
    assert status == 1
    problem = "starting it raised ZeroDivisionError: division by zero (mine.py, line 11)"
    assert said == f"tricorn: --agent mine:pid: {problem}\n"


async def refused(*arguments: str, cwd: Path, program: str = SHARED, **environ: str) -> tuple[int, str]:
    done = await trio.run_process(
        [sys.executable, "-c", program, *arguments],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=cwd,
        env=os.environ | environ,
    )
    assert done.stdout == b""
    return done.returncode, done.stderr.decode()


async def test_what_is_wrong_with_all_of_them_is_said_once_and_ends_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("1 / 0")
    status, said = await refused(*SERVE, "--workers", "3", "--audit", "off", cwd=tmp_path)
    assert status == 2
    assert said == (
        "tricorn: --agent mine:pid: importing mine raised ZeroDivisionError: division by zero (mine.py, line 1)\n"
    )


@pytest.mark.parametrize("reuse", [False, True])
async def test_a_port_in_use(tmp_path: Path, reuse: bool) -> None:
    """Also where it could be shared: it is somebody else's."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        status, said = await refused("serve", "--bind", bind, "--workers", "2", cwd=tmp_path)
    assert status == 2
    assert said == f"tricorn: --bind {bind}: address already in use\n"


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["--workers", "2"], {}, "--workers 2: workers need a log that they can share, redis:// or postgresql://"),
        ([], {"TRICORN_WORKERS": "2"}, "--workers 2: workers need a log that they can share"),
        (["--workers", "0"], {}, "--workers 0: must be a whole number above 0"),
        (["--workers", "many"], {}, "--workers many: must be a whole number above 0"),
        ([], {"TRICORN_WORKERS": "0"}, "TRICORN_WORKERS=0: must be a whole number above 0"),
    ],
)
async def test_what_is_asked_wrongly(tmp_path: Path, arguments: list[str], environ: dict[str, str], said: str) -> None:
    program = "import sys; from tricorn.service.cli import main; sys.exit(main(sys.argv[1:]))"
    status, line = await refused("serve", *arguments, cwd=tmp_path, program=program, **environ)
    assert status == 2
    assert line.startswith(f"tricorn: {said}")
    assert line.count("\n") == 1


# The supervisor in a program of one's own

OBEYS = """
import sys, trio
from tricorn.metrics import NOTHING
from tricorn.service.workers import Worker
trio.run(Worker(sys.argv[2]).obey, lambda: NOTHING)
"""


async def test_cancelled_it_leaves_no_process() -> None:
    supervisor = Supervisor([sys.executable, "-c", OBEYS], 2, await reserve("127.0.0.1:0"), drain_timeout=1)
    ready = trio.Event()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.run, lambda _: ready.set())
            await ready.wait()
            _, pids = await supervisor.scrape()
            nursery.cancel_scope.cancel()
    assert pids.pop("supervisor") == os.getpid()
    assert len(pids) == 2
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_one_that_is_killed_before_it_serves_ends_it(capfd: pytest.CaptureFixture[str]) -> None:
    kills_itself = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    supervisor = Supervisor([sys.executable, "-c", kills_itself], 2, await reserve("127.0.0.1:0"), drain_timeout=1)
    with trio.fail_after(PATIENCE):
        assert await supervisor.run(pytest.fail) == 1
    [record] = map(json.loads, capfd.readouterr().err.splitlines())
    assert record["message"] == "worker 1 did not start: signal 9 (Killed)"


async def test_a_command_that_there_is_not_ends_it(capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = Supervisor(["/nowhere/at/all"], 2, await reserve("127.0.0.1:0"), drain_timeout=1)
    with trio.fail_after(PATIENCE):
        assert await supervisor.run(pytest.fail) == 1
    [record] = map(json.loads, capfd.readouterr().err.splitlines())
    assert "/nowhere/at/all" in record["message"]
