"""A server as a process of its own: started, found by the port that it says, watched through the kernel, ended."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from time import clock_gettime, monotonic, sleep
from typing import IO

from bench.servers import SERVERS, Mode

ROOT = Path(__file__).parents[1]
ADDRESS = re.compile(rb"https?://\S+?:(\d+)")
START_TIMEOUT = 30.0  # seconds
PAGE = os.sysconf("SC_PAGE_SIZE")
LIBC = ctypes.CDLL(None)


class NotStarted(Exception):
    """The server does not come up. The text says why, in what it said itself."""


class Server:
    """A server's process and those that it has started. What is asked of them is the sum over all."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], output: IO[bytes], host: str, began: float) -> None:
        self.name = name
        self.path = SERVERS[name].path
        self.process = process
        self.host = host
        self.port = 0
        self.began = began  # on the monotonic clock
        self._output = output

    def output(self) -> bytes:
        """What it has said so far, on stdout and stderr."""
        return os.pread(self._output.fileno(), 1 << 24, 0)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def cpu(self) -> float:
        """Seconds of user and system time so far, to the nanosecond; what has ended does not count."""
        return self._sum(_cpu)

    def memory(self) -> int:
        """Bytes that are resident (RSS)."""
        return int(self._sum(lambda pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE))

    def descriptors(self) -> int:
        return int(self._sum(lambda pid: len(os.listdir(f"/proc/{pid}/fd"))))

    def _sum(self, read: Callable[[int], float]) -> float:
        total = 0.0
        for pid in self.pids():
            with suppress(OSError):  # it has ended
                total += read(pid)
        return total

    def pids(self) -> list[int]:
        pids = [self.process.pid]
        for pid in pids:
            with suppress(OSError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    pids += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        return pids

    def wait_for_address(self) -> None:
        """Wait until it has said where it listens. Raises NotStarted."""
        deadline = monotonic() + START_TIMEOUT
        while not (found := ADDRESS.search(self.output())):
            if not self.is_alive():
                raise NotStarted(_complaint(self.output()))
            if monotonic() > deadline:
                raise NotStarted(f"it says no address in {START_TIMEOUT:.0f} s")
            sleep(0.001)
        self.port = int(found[1])


def _cpu(pid: int) -> float:
    clock = ctypes.c_int()
    if error := LIBC.clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise OSError(error, os.strerror(error))
    return clock_gettime(clock.value)


def _complaint(output: bytes) -> str:
    """The line that says what is wrong, in what a program has said before it ended."""
    lines = output.decode(errors="replace").splitlines() or ["it ends and says nothing"]
    return next((line for line in reversed(lines) if "Error" in line or "No module" in line), lines[-1]).strip()


@contextmanager
def serving(
    name: str,
    mode: Mode = "bare",
    *,
    host: str = "127.0.0.1",
    before: Sequence[str] = (),
    cores: Iterable[int] | None = None,
) -> Iterator[Server]:
    """Run a server until the end of the block, pinned to `cores`. `before` is what its command stands behind.

    Raises NotStarted where it does not come up, FileNotFoundError where a program that it needs is not here.
    """
    with TemporaryFile() as output, SERVERS[name].beside() as beside:
        began = monotonic()
        try:
            process = _start([*before, *SERVERS[name].line(host, mode, beside)], output, cores)
        except FileNotFoundError as error:
            raise NotStarted(f"there is no program {error.filename}") from None
        try:
            server = Server(name, process, output, host, began)
            server.wait_for_address()
            yield server
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start(command: list[str], output: IO[bytes], cores: Iterable[int] | None) -> subprocess.Popen[bytes]:
    """Start a process on these cores: it has them from this one, for as long as it takes to start it."""
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ours if cores is None else cores)
    try:
        return subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    finally:
        os.sched_setaffinity(0, ours)
