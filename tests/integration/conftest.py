"""Programs under test, run as what they are: processes."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from fixtures.records import Records

LISTENING = re.compile(r"^ *\d+: [0-9A-F]+:([0-9A-F]{4}) [0-9A-F:]+ 0A(?: +[^ ]+){5} (\d+) ", re.MULTILINE)


@pytest.fixture
def patient_clock() -> MockClock:
    """Jumps to the next deadline when nothing has happened for a while: what is under way in the kernel gets there."""
    return MockClock(autojump_threshold=0.05)


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Iterator[Records]:
    """What is reported on stderr. An error that the test does not read fails it."""
    records = Records(capfd)
    yield records
    assert records.read("ERROR") == []


@pytest.fixture
def serving() -> Callable[..., AbstractAsyncContextManager[int]]:
    """`async with serving(*command, cwd=...) as port`: a program that serves until SIGTERM and then exits with 0."""
    return serve


@asynccontextmanager
async def serve(*command: str | Path, cwd: Path | None = None) -> AsyncGenerator[int]:
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, command, cwd=cwd))
        try:
            yield await port_of(process)
        finally:
            process.terminate()


async def port_of(process: trio.Process) -> int:
    """The port that a process listens on. `tricorn.run` does not say when it starts to: look until it does or ends.

    While there are two, `tricorn serve` has bound its own and is in the drill.
    """
    with trio.fail_after(30):
        while len(ports := listening(process.pid)) != 1:
            with trio.move_on_after(0.02):
                await process.wait()
    return ports[0]


def listening(pid: int) -> list[int]:
    """The TCP ports that a process of this machine listens on, from its open descriptors and the kernel's table."""
    proc = Path("/proc", str(pid))
    sockets = set()
    for descriptor in proc.joinpath("fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            sockets.add(str(descriptor.readlink()))
    table = proc.joinpath("net/tcp").read_text()
    return [int(port, 16) for port, inode in LISTENING.findall(table) if f"socket:[{inode}]" in sockets]
