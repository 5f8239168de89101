"""What has the server read things again: SIGHUP, which disconnects nobody but from workers, and `--reload`."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from time import time
from typing import Any

import jwt
import pytest
import trio
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection, wrap_client_stream

from fixtures.workers import SHARED, closed

TRICORN = [sys.executable, "-m", "tricorn"]
SERVE = [*TRICORN, "serve", "--audit", "off", "--bind", "127.0.0.1:0"]
WORKERS = [sys.executable, "-c", SHARED, *SERVE[3:], "--workers", "2", "--agent", "mine:agent"]
PATIENCE = 60  # seconds, for what takes one or two
PROGRAM = """
import os

async def agent(run):
    await run.say(str(os.getpid()))

async def echo(ws):
    async for message in ws:
        await ws.send(message)
"""
OLD, NEW = "an old secret of thirty-two bytes or more", "a new secret of thirty-two bytes or more"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(PROGRAM)
    (tmp_path / "config.toml").write_text("certfile = 'server.pem'\nkeyfile = 'server.pem'\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Service:
    def __init__(self, process: trio.Process, port: int) -> None:
        self.process = process
        self.port = port
        self._said = b""

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    async def until_said(self, text: bytes) -> dict[str, Any]:
        """The first record with a text in it."""
        record: dict[str, Any] = json.loads(await self.line(text))
        return record

    async def line(self, text: bytes) -> bytes:
        """The first line with a text in it."""
        assert self.process.stderr is not None
        while True:
            *lines, self._said = self._said.split(b"\n")
            for index, line in enumerate(lines):
                if text in line:
                    self._said = b"\n".join([*lines[index + 1 :], self._said])
                    return line
            self._said += await self.process.stderr.receive_some() or pytest.fail("it has ended")

    async def records(self) -> list[dict[str, Any]]:
        """What was said since, once it has ended."""
        assert self.process.stderr is not None
        self._said += b"".join([part async for part in self.process.stderr])
        return [json.loads(line) for line in self._said.splitlines()]


@asynccontextmanager
async def running(command: Sequence[str], **environ: str) -> AsyncGenerator[Service]:
    """A server, which must end with 0 at SIGTERM."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            run = partial(trio.run_process, command, **pipes, check=False, env=os.environ | environ)
            process: trio.Process = await nursery.start(run)
            assert process.stdout is not None
            said = b""
            while not said.endswith(b"\n"):
                said += await process.stdout.receive_some() or pytest.fail("it has ended")
            yield Service(process, int(said.rpartition(b":")[2]))
            process.terminate()
            assert await process.wait() == 0
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def websocket(
    service: Service, context: ssl.SSLContext | None = None, path: str = "/ws", token: str = ""
) -> AsyncGenerator[WebSocketConnection]:
    stream: Any = await trio.open_tcp_stream("127.0.0.1", service.port)
    if context is not None:
        stream = trio.SSLStream(stream, context, server_hostname="127.0.0.1", https_compatible=True)
    headers = [("Authorization", f"Bearer {token}")] if token else []
    protocols = ["tricorn.v1"] if path == "/ws" else []
    async with trio.open_nursery() as nursery:
        try:
            yield await wrap_client_stream(
                nursery, stream, "127.0.0.1", path, subprotocols=protocols, extra_headers=headers
            )
        finally:
            await trio.aclose_forcefully(stream)
        nursery.cancel_scope.cancel()


posts = count()  # workers are asked until each of them has answered


async def ask(ws: WebSocketConnection) -> int:
    """The process that answers."""
    await ws.send_message(json.dumps({"type": "open", "conversation": "c"}))
    await ws.send_message(json.dumps({"type": "post", "id": f"{next(posts)}", "conversation": "c", "text": "?"}))
    said = ""
    while (message := json.loads(await ws.get_message()))["type"] != "agent_completed":
        if message["type"] == "agent_message":
            said = message["text"]
    return int(said)


def issue(directory: Path) -> ssl.SSLContext:
    """A new certificate for the server, and a context that trusts only it."""
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(directory / "server.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def is_trusted(service: Service, context: ssl.SSLContext) -> bool:
    stream = await trio.open_tcp_stream("127.0.0.1", service.port)
    tls = trio.SSLStream(stream, context, server_hostname="127.0.0.1")
    try:
        await tls.do_handshake()
    except trio.BrokenResourceError:
        return False
    finally:
        await trio.aclose_forcefully(tls)
    return True


async def test_a_new_certificate_is_for_new_connections(directory: Path) -> None:
    old = issue(directory)
    async with (
        running([*SERVE, "--agent", "mine:agent", "--config", "config.toml"]) as service,
        websocket(service, old) as ws,
    ):
        new = issue(directory)
        assert await is_trusted(service, old)
        service.reload()
        while not await is_trusted(service, new):
            pass
        assert not await is_trusted(service, old)
        assert await ask(ws) == service.process.pid


def encrypted() -> str:
    """A certificate whose key needs a password, for which OpenSSL would ask at a terminal."""
    issued = trustme.CA().issue_cert("127.0.0.1")
    key = load_pem_private_key(issued.private_key_pem.bytes(), None)
    hidden = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))
    return (hidden + issued.cert_chain_pems[0].bytes()).decode()


@pytest.mark.parametrize("bad", ["", "nonsense", encrypted(), None], ids=["empty", "nonsense", "encrypted", "missing"])
async def test_a_bad_certificate_is_reported_and_the_one_before_stays(directory: Path, bad: str | None) -> None:
    context = issue(directory)
    async with (
        running([*SERVE, "--agent", "mine:agent", "--config", "config.toml"]) as service,
        websocket(service, context) as ws,
    ):
        file = directory / "server.pem"
        file.unlink() if bad is None else file.write_text(bad)
        service.reload()
        record = await service.until_said(b"the one before stays")
        assert record["severity"] == "ERROR"
        assert await is_trusted(service, context)
        assert await ask(ws) == service.process.pid
        new = issue(directory)
        service.reload()
        while not await is_trusted(service, new):
            pass


async def test_new_keys(directory: Path) -> None:
    file = directory / "key"
    file.write_text(OLD)

    def token(secret: str) -> str:
        return jwt.encode({"sub": "ada", "exp": time() + 600}, secret)

    async def admits(secret: str) -> bool:
        async with websocket(service, token=token(secret)) as ws:
            try:
                await ask(ws)
            except ConnectionClosed:
                return False
        return True

    async with (
        running([*SERVE, "--agent", "mine:agent"], TRICORN_JWT_KEY=f"file:{file}") as service,
        websocket(service, token=token(OLD)) as ws,
    ):
        file.write_text(NEW)
        assert await admits(OLD)
        assert not await admits(NEW)
        service.reload()
        while not await admits(NEW):
            pass
        assert not await admits(OLD)
        assert await ask(ws) == service.process.pid
        file.write_text("too short")
        service.reload()
        record = await service.until_said(b"the last good ones stay")
        assert record["severity"] == "ERROR"
        assert await admits(NEW)


async def test_a_server_with_nothing_to_read_goes_on() -> None:
    async with (
        running([*TRICORN, "run", "mine:echo", "--bind", "127.0.0.1:0"]) as service,
        websocket(service, path="/") as ws,
    ):
        for _ in range(3):
            service.reload()
            await ws.send_message("hello")
            assert await ws.get_message() == "hello"


async def test_before_it_serves_there_is_nothing_to_read_again(directory: Path) -> None:
    (directory / "mine.py").write_text(f"import signal\nsignal.raise_signal(signal.SIGHUP)\n{PROGRAM}")
    for command in (["serve", "--agent", "mine:agent"], ["run", "mine:echo"]):
        async with running([*TRICORN, *command, "--bind", "127.0.0.1:0"]):
            pass


async def gone(pid: int) -> None:
    """Wait until a process that is not ours has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    await trio.lowlevel.wait_readable(descriptor)
    os.close(descriptor)


async def pids(service: Service) -> set[int]:
    """The workers that serve."""
    found: set[int] = set()
    while len(found) < 2:
        try:
            async with websocket(service) as ws:
                found.add(await ask(ws))
        except* (ConnectionClosed, HandshakeError, trio.BrokenResourceError):
            pass  # by one that is being replaced
    return found


async def test_workers_are_replaced_one_by_one() -> None:
    async with running(WORKERS) as service:
        before = await pids(service)
        async with websocket(service) as one:
            first = await ask(one)
            while True:
                async with websocket(service) as other:
                    second = await ask(other)
                    if second != first:
                        service.reload()
                        assert await closed(one) == await closed(other) == 1012
                        break
        after = await pids(service)
        while after & before:
            after = await pids(service)
    assert not [record for record in await service.records() if record["severity"] == "ERROR"]


async def test_one_worker_serves_while_the_other_is_replaced(directory: Path) -> None:
    async with running(WORKERS) as service:
        before = await pids(service)
        (directory / "mine.py").write_text("raise RuntimeError('half a deployment')")
        service.reload()
        await service.until_said(b"ended: exit status 2")
        async with websocket(service) as ws:
            left = await ask(ws)
            assert left in before
            await service.until_said(b"ended: exit status 2")
            assert await ask(ws) == left
        (directory / "mine.py").write_text(PROGRAM)
        while (await pids(service)) & before:
            pass


async def test_workers_are_not_replaced_for_a_bad_certificate(directory: Path) -> None:
    context = issue(directory)
    async with running([*WORKERS, "--config", "config.toml"]) as service:
        (directory / "server.pem").write_text("nonsense")
        async with websocket(service, context) as ws:
            pid = await ask(ws)
            service.reload()
            record = await service.until_said(b"replacing the workers; they stay")
            assert record["severity"] == "ERROR"
            assert await ask(ws) == pid
            assert await is_trusted(service, context)


async def test_a_worker_that_hangs_is_replaced_too() -> None:
    async with running(WORKERS, TRICORN_DRAIN_TIMEOUT="1", TRICORN_CLOSE_TIMEOUT="0.5") as service:
        before = await pids(service)
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        service.reload()
        for pid in before:
            await gone(pid)
        assert not await pids(service) & before


async def test_the_end_while_workers_are_replaced() -> None:
    async with running(WORKERS) as service, websocket(service) as ws:
        await ask(ws)
        service.reload()


# --reload

RELOAD = [*SERVE, "--log", "sqlite:///chat.db", "--agent", "mine:agent", "--reload"]
SAYS = """
async def agent(run):
    return "{}"
"""


async def answer(ws: WebSocketConnection, post: str) -> str:
    """What is said to a post."""
    await ws.send_message(json.dumps({"type": "open", "conversation": "c"}))
    await ws.send_message(json.dumps({"type": "post", "id": post, "conversation": "c", "text": "?"}))
    said: dict[str, str] = {}  # by the post that it answers
    answered: dict[str, str] = {}
    while post not in answered:
        message = json.loads(await ws.get_message())
        if message["type"] == "agent_started":
            said[message["run"]] = message["post"]
        if message["type"] == "agent_completed":
            answered[said[message["run"]]] = message["text"]
    return answered[post]


async def told_to_come_back(ws: WebSocketConnection) -> None:
    """Wait until a client hears `closing` and is closed with 1012."""
    while json.loads(await ws.get_message())["type"] != "closing":
        pass
    assert await closed(ws) == 1012


async def test_a_change_restarts_and_clients_come_back_to_what_was_said(directory: Path) -> None:
    (directory / "mine.py").write_text(SAYS.format(1))
    async with running(RELOAD) as service:
        for change in (2, 3):
            async with websocket(service) as ws:
                assert await answer(ws, f"post-{change}") == f"{change - 1}"
                (directory / "mine.py").write_text(SAYS.format(change))
                await told_to_come_back(ws)
        async with websocket(service) as ws:
            assert await answer(ws, "post-3") == "2"  # as it was answered before
            assert await answer(ws, "post-4") == "3"
        assert (await service.until_said(b"restarting"))["files"] == [str(directory / "mine.py")]


async def test_a_change_of_what_the_agent_imports_restarts(directory: Path) -> None:
    package = directory / "package"
    package.mkdir()
    (package / "words.py").write_text("WORD = '1'")
    (directory / "mine.py").write_text("from package.words import WORD\n\nasync def agent(run):\n    return WORD\n")
    async with running(RELOAD) as service, websocket(service) as ws:
        assert await answer(ws, "one") == "1"
        (package / "words.py").write_text("WORD = '2'")
        await told_to_come_back(ws)
        async with websocket(service) as another:
            assert await answer(another, "two") == "2"


async def test_an_error_of_the_source_is_one_line_and_the_next_change_mends_it(directory: Path) -> None:
    async with running(RELOAD) as service:
        for broken, problem in (
            ("async def agent(run:", b"raised SyntaxError: '(' was never closed (mine.py, line 1)"),
            ("\n1 / 0", b"raised ZeroDivisionError: division by zero (mine.py, line 2)"),
        ):
            (directory / "mine.py").write_text(broken)
            assert await service.line(b"tricorn: ") == b"tricorn: --agent mine:agent: importing mine " + problem
        waiting = await trio.open_tcp_stream("127.0.0.1", service.port)  # nobody serves, and the port is kept
        async with waiting:
            await waiting.send_all(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            (directory / "mine.py").write_text(SAYS.format("mended"))
            assert (await waiting.receive_some()).startswith(b"HTTP/1.1 200 ")
        async with websocket(service) as ws:
            assert await answer(ws, "post") == "mended"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("async def agent(run:", b"SyntaxError"),
        ("import signal, sys\nprint('waits', file=sys.stderr, flush=True)\nsignal.pause()", b"waits"),
    ],
    ids=["an error", "one that takes long"],
)
async def test_the_first_change_may_come_before_it_serves(directory: Path, source: str, says: bytes) -> None:
    (directory / "mine.py").write_text(source)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(partial(trio.run_process, RELOAD, **pipes))
            said = Service(process, 0)
            assert says in await said.line(says)
            (directory / "mine.py").write_text(SAYS.format("mended"))
            address = b""
            while not address.endswith(b"\n"):
                address += await process.stdout.receive_some() or pytest.fail("it has ended")
            async with websocket(Service(process, int(address.rpartition(b":")[2]))) as ws:
                assert await answer(ws, "post") == "mended"
            process.terminate()


async def test_it_ends_at_a_signal_while_it_waits_for_a_change(directory: Path) -> None:
    async with running(RELOAD) as service:
        (directory / "mine.py").write_text("1 / 0")
        await service.line(b"tricorn: ")


async def test_a_worker_that_dies_starts_again_after_a_change(directory: Path) -> None:
    async with running(RELOAD) as service:
        async with websocket(service) as ws:
            os.kill(int(await answer(ws, "pid")), signal.SIGKILL)
        record = await service.until_said(b"waiting for a change")
        assert record["message"] == "worker 1 ended: signal 9 (Killed); waiting for a change"
        (directory / "mine.py").write_text(SAYS.format("again"))
        async with websocket(service) as ws:
            assert await answer(ws, "post") == "again"
