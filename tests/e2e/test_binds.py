"""What `tricorn serve` and `tricorn run` listen on, and what systemd gives and is told: as processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from fixtures.workers import SHARED

TRICORN = [sys.executable, "-m", "tricorn"]
SERVE = [*TRICORN, "serve", "--audit", "off", "--auth", "none"]
PATIENCE = 60  # seconds, for what takes one or two
HANDLER = """
async def echo(ws):
    async for message in ws:
        await ws.send(message)
"""
# What `tricorn serve --workers` needs is a log that says it can be shared.
WORKERS = [sys.executable, "-c", SHARED, "serve", "--audit", "off", "--auth", "none", "--workers", "2"]
# Do what systemd does, and become the command: sys.argv[1] has descriptors, which are passed from 3 on.
SYSTEMD = """
import os, sys
descriptors = [os.dup(int(each)) for each in sys.argv[1].split(",")]
kept = [os.dup2(each, 100 + index) for index, each in enumerate(descriptors)]
for index, each in enumerate(kept):
    os.dup2(each, 3 + index)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(kept))}
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(HANDLER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@asynccontextmanager
async def running(command: Sequence[str], fds: Sequence[int] = ()) -> AsyncGenerator[tuple[trio.Process, list[str]]]:
    """A server, and what it says that it listens on. It must end with 0 at SIGTERM."""
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            run = partial(trio.run_process, command, stdout=subprocess.PIPE, pass_fds=fds, check=False)
            process: trio.Process = await nursery.start(run)
            assert process.stdout is not None
            said = b""
            while not said.endswith(b"\n"):
                said += await process.stdout.receive_some() or pytest.fail(f"it has ended: {said!r}")
            yield process, said.decode().removeprefix("Tricorn is listening on ").strip().split(", ")
            if process.returncode is None:
                process.terminate()
            assert await process.wait() == 0
            nursery.cancel_scope.cancel()


async def is_served(address: str) -> None:
    path, is_unix = address.removeprefix("unix:"), address.startswith("unix:")
    host, _, port = address.rpartition("/")[2].rpartition(":")
    stream: trio.SocketStream
    if is_unix:
        stream = await trio.open_unix_socket(path)
    else:
        stream = await trio.open_tcp_stream(host.strip("[]"), int(port))
    async with stream:
        await stream.send_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize("command", [SERVE, [*TRICORN, "run", "mine:echo"], WORKERS], ids=["serve", "run", "workers"])
async def test_several_binds(command: list[str], directory: Path) -> None:
    path = directory / "socket"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with socket.create_server(("127.0.0.1", 0)) as given:
        number = given.fileno()
        binds = ["127.0.0.1:0", f"unix:{path}", f"fd:{number}"]
        options = [word for bind in binds for word in ("--bind", bind)]
        async with running([*command, *options], [number]) as (_, addresses):
            assert len(addresses) == 3
            assert addresses[1] == f"unix:{path}"
            assert addresses[2].endswith(f"127.0.0.1:{given.getsockname()[1]}")
            for address in addresses:
                await is_served(address)
            done = await trio.run_process([*SERVE, "--bind", binds[1]], capture_stderr=True, check=False)
            assert (done.returncode, done.stderr.decode()) == (
                2,
                f"tricorn: --bind {binds[1]}: address already in use\n",
            )
            await is_served(addresses[1])
    assert not path.exists()


async def test_by_the_environment(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRICORN_BIND", f"127.0.0.1:0, unix:{directory}/socket")
    async with running(SERVE) as (_, addresses):
        assert len(addresses) == 2
        for address in addresses:
            await is_served(address)


@pytest.mark.parametrize("command", [SERVE, [*TRICORN, "run", "mine:echo"], WORKERS], ids=["serve", "run", "workers"])
@pytest.mark.parametrize("options", [[], ["--bind", "fd://"]], ids=["by default", "fd://"])
async def test_sockets_of_systemd(command: list[str], options: list[str], directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(directory / "socket"))
        unix.listen()
        numbers = [tcp.fileno(), unix.fileno()]
        systemd = [sys.executable, "-c", SYSTEMD, ",".join(map(str, numbers))]
        async with running([*systemd, *command, *options], numbers) as (_, addresses):
            assert addresses[0].endswith(f"127.0.0.1:{tcp.getsockname()[1]}")
            assert addresses[1:] == [f"unix:{directory}/socket"]
            for address in addresses:
                await is_served(address)
    assert (directory / "socket").exists()  # which is systemd's


async def test_sockets_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", "1")
    async with running([*SERVE, "--bind", "127.0.0.1:0"]) as (_, [address]):
        await is_served(address)
    done = await trio.run_process([*SERVE, "--bind", "fd://"], capture_stderr=True, check=False)
    said = "tricorn: --bind fd://: no sockets were passed to this process in LISTEN_FDS\n"
    assert (done.returncode, done.stderr.decode()) == (2, said)


@pytest.mark.parametrize("command", [SERVE, [*TRICORN, "run", "mine:echo"], WORKERS], ids=["serve", "run", "workers"])
@pytest.mark.parametrize("kind", ["file", "abstract"])
async def test_systemd_is_told(command: list[str], kind: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(directory / "notify")
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        await notify.bind(name if kind == "file" else f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", name if kind == "file" else f"@{name}")
        async with running([*command, "--bind", "127.0.0.1:0"]) as (process, _):
            assert await notify.recv(100) == b"READY=1"
            process.send_signal(signal.SIGTERM)
            assert await notify.recv(100) == b"STOPPING=1"
            await process.wait()  # a second signal might find it without a handler
        with pytest.raises(BlockingIOError):
            os.read(notify.fileno(), 100)
