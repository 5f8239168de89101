"""Several processes on one port: who starts them and looks after them, and what each of them has of that.

The supervisor reserves the address and never touches a connection. For each worker it binds a socket of its own to the
address (SO_REUSEPORT): the kernel shares new connections out among those that listen, and a worker that has died is
none of them. Between the two is a socket pair. The worker says there that it serves, and what it has counted when it is
asked; when the supervisor dies, however it does, the worker finds the end of it and ends as by SIGTERM.
"""

from __future__ import annotations

import socket
import subprocess
from math import inf
from os import dup, getpid
from signal import SIGHUP, SIGINT, SIGTERM, raise_signal, strsignal
from typing import TYPE_CHECKING

import trio
from msgspec.json import Decoder, encode
from trio import BrokenResourceError, current_time, move_on_after

from tricorn.chat.backoff import Backoff
from tricorn.errors.report import report, report_error
from tricorn.listening.binds import BACKLOG, addresses, bind_to, close_all
from tricorn.metrics import NOTHING, Counter, Metrics, Numbers, total

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from tricorn.listening.binds import Address

FIRST_PAUSE = 0.1  # seconds before a worker is replaced; each time in a row they double
LONGEST_PAUSE = 30.0
STEADY = 60.0  # seconds that a worker must have lived for its end to be the first in a row
ANSWER_TIME = 1.0  # seconds that a worker has to say what it counted; then what it said before counts
GRACE = 1.0  # seconds beyond drain_timeout, before a worker is killed

_decode = Decoder(Numbers).decode


async def reserve(text: str) -> list[socket.socket]:
    """Bind what a text names, for workers to listen on. Raises OSError and `SettingError` like `bind_to`."""
    reserved = await bind_to(text)
    for each in reserved:  # not before it is bound: somebody else's workers must not be joined
        if not _listens(each):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return reserved


def _listens(sock: socket.socket) -> bool:
    """Whether it listens already, as a Unix socket and one that was passed do: then workers share it."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


class Worker:
    """A worker's side. `descriptors` is what the supervisor has put behind `--worker`."""

    def __init__(self, descriptors: str) -> None:
        self._control, *self.listeners = (socket.socket(fileno=int(each)) for each in descriptors.split(","))
        for each in (self._control, *self.listeners):
            each.set_inheritable(False)
            each.setblocking(False)

    def listen(self) -> list[socket.socket]:
        """Have connections come from now on, and return the sockets that they come to."""
        for listener in self.listeners:
            listener.listen(BACKLOG)
        return self.listeners

    async def obey(self, numbers: Callable[[], Numbers]) -> None:
        """Tell the supervisor that this process serves and, when asked, what `numbers` returns.

        Once the supervisor is gone, raise SIGTERM.
        """
        control = trio.SocketStream(trio.socket.from_stdlib_socket(self._control))
        try:
            async with control:
                question = True
                while question:
                    await control.send_all(encode(numbers()) + b"\n")
                    question = bool(await control.receive_some(1))
        except BrokenResourceError:
            pass
        raise_signal(SIGTERM)


class WorkerMetrics(Metrics):
    """The counters of a supervisor."""

    def __init__(self) -> None:
        self.ends = Counter("worker_ends", "Workers that ended by themselves and were replaced.")


class Supervisor:
    """Keeps `count` workers running, each of them `command` with `--worker` and its descriptors behind it.

    `counted` is what else this process counts; a scrape adds it to what the workers have counted. `ending` is called
    when the end begins, and `check` before workers are replaced: if it raises, they are not.

    `changed` returns when files have changed that workers are made of; then they are replaced. A worker that ends by
    itself, even before it serves, is then started again only after a change.
    """

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        reserved: Sequence[socket.socket],
        *,
        drain_timeout: float,
        counted: Sequence[Metrics] = (),
        ending: Callable[[], None] = lambda: None,
        check: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
        changed: Callable[[], Awaitable[Sequence[str]]] | None = None,
    ) -> None:
        self.metrics = WorkerMetrics()
        self._counted = counted
        self._command = command
        self._count = count
        self._reserved = reserved
        self._drain_timeout = drain_timeout
        self._running: dict[int, _Running] = {}  # by the worker's number
        self._when_ending = ending
        self._check = check
        self._changed = changed
        self._told = trio.Event()  # to replace the workers, or to end; another one takes its place each time
        self._told_at = -inf  # in Trio's time
        self._replaced: set[int] = set()  # workers that are told to end, for others to take their place
        self._up: dict[int, trio.Event] = {}  # set when the worker of that number serves, or none is going to
        self._patience = trio.CancelScope()  # what still runs when it is over is killed
        self._ending = trio.Event()
        self._complete = False  # all workers have been serving
        self._status = 0
        self._gone = NOTHING  # what workers that ended had counted
        self._scraping = trio.Lock()

    async def run(self, announce: Callable[[list[Address]], None]) -> int:
        """Run until SIGTERM or SIGINT, and return the exit status; `announce` is called when all workers serve.

        Either signal is passed on to all workers; a second one too, and then they abort. A worker that ends before all
        have been serving, without having served, ends all of it, and the exit status is its own.

        At SIGHUP and after a change, workers are replaced one after the other, so that everything is read again.

        If cancelled, the workers are killed.
        """
        try:
            return await self._run(announce)
        finally:
            close_all(self._reserved)

    async def scrape(self) -> tuple[Numbers, Mapping[str, int]]:
        """What all workers have counted, those that ended included, and the ids of the processes."""
        async with self._scraping, trio.open_nursery() as nursery:
            for running in self._running.values():
                nursery.start_soon(running.ask)
        own = [each.numbers() for each in (self.metrics, *self._counted)]
        parts = [*own, self._gone, *(running.numbers for running in self._running.values())]
        pids = {str(number): running.process.pid for number, running in sorted(self._running.items())}
        return total(parts), {"supervisor": getpid(), **pids}

    async def _run(self, announce: Callable[[list[Address]], None]) -> int:
        with trio.open_signal_receiver(SIGTERM, SIGINT, SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._obey, signals)
                if self._changed is not None:
                    nursery.start_soon(self._watch, self._changed)
                    nursery.start_soon(self._replace_when_told)
                with self._patience:
                    async with trio.open_nursery() as workers:
                        # One first: what is wrong with all of them is then said once.
                        await self._start(workers, [1])
                        await self._start(workers, range(2, self._count + 1))
                        if not self._ending.is_set():
                            self._complete = True
                            if self._changed is None:
                                nursery.start_soon(self._replace_when_told)
                            announce(addresses(self._reserved))
                nursery.cancel_scope.cancel()
        return self._status

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if number == SIGHUP:
                self._tell()
            else:
                self._end()

    async def _watch(self, changed: Callable[[], Awaitable[Sequence[str]]]) -> None:
        while True:
            files = await changed()
            report("INFO", "files have changed; restarting", files=tuple(files))
            self._tell()

    def _tell(self) -> None:
        self._told_at = current_time()
        told, self._told = self._told, trio.Event()
        told.set()

    async def _told_after(self, time: float) -> bool:
        """Wait until the workers are told after some time to be replaced. Return False if all of it is to end."""
        while self._told_at <= time and not self._ending.is_set():
            await self._told.wait()
        return not self._ending.is_set()

    async def _replace_when_told(self) -> None:
        seen = -inf
        while await self._told_after(seen):
            seen = self._told_at
            try:
                await self._check()
            except Exception as error:
                report_error(error, action="replacing the workers; they stay")
            else:
                for number in range(1, self._count + 1):
                    await self._replace(number, seen)

    async def _replace(self, number: int, told_at: float) -> None:
        """Have a worker end, and wait until there is another that serves. One that does not end in time is killed."""
        running = self._running.get(number)
        if running is None or running.began >= told_at or self._ending.is_set():
            return  # the next one is about to start, or has started, or none is going to
        self._replaced.add(number)
        before, up = self._up[number], trio.Event()
        self._up[number] = up
        running.process.terminate()
        with move_on_after(self._drain_timeout + GRACE) as scope:
            await running.process.wait()
        if scope.cancelled_caught:
            running.process.kill()
        await up.wait()
        before.set()  # if that worker never served, the start of all of it waits here

    def _end(self) -> None:
        told_already: set[int] = set()
        if not self._ending.is_set():
            told_already = self._replaced
            self._ending.set()
            self._tell()
            self._when_ending()
            close_all(self._reserved)  # so that nobody waits in the queue of a socket that the workers have left
            self._patience.deadline = current_time() + self._drain_timeout + GRACE
        for number, running in self._running.items():
            if number not in told_already:
                running.process.terminate()

    async def _start(self, nursery: trio.Nursery, numbers_of_workers: Sequence[int]) -> None:
        for number in numbers_of_workers:
            self._up[number] = trio.Event()
            nursery.start_soon(self._keep, number)
        for number in numbers_of_workers:
            await self._up[number].wait()

    async def _keep(self, number: int) -> None:
        """Run a worker, and the next when it has ended."""
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while not self._ending.is_set():
            began = current_time()
            status, served = await self._run_one(number)
            if self._ending.is_set():
                break
            if number in self._replaced:
                self._replaced.remove(number)
                continue
            if self._changed is not None:
                if served or status < 0:  # else it has said why
                    report("ERROR", f"worker {number} ended: {_how(status)}; waiting for a change", worker=number)
                await self._told_after(began)
                continue
            if not self._up[number].is_set() and not self._complete:
                if status < 0:  # else it has said why
                    report("ERROR", f"worker {number} did not start: {_how(status)}", worker=number)
                self._status = status if status > 0 else 1
                self._end()
                break
            lived = current_time() - began
            if lived >= STEADY:
                backoff.reset()
            pause = backoff.next()
            self.metrics.ends.add()
            report(
                "ERROR",
                f"worker {number} ended: {_how(status)}",
                worker=number,
                seconds=round(lived, 3),
                next_in=pause,
            )
            with move_on_after(pause):
                await self._ending.wait()
        self._up[number].set()

    async def _run_one(self, number: int) -> tuple[int, bool]:
        """Run a worker until it ends. If cancelled, kill it.

        Return its exit status, negative for a signal, and whether it has served.
        """
        try:
            process, control = await self._open()
        except OSError as error:  # no processes, memory or descriptors left
            report_error(error, worker=number)
            return 1, False
        self._running[number] = running = _Running(process, control)
        try:
            if self._ending.is_set():
                process.terminate()
            async with control, trio.open_nursery() as nursery:
                nursery.start_soon(running.hear, self._up[number])
                status = await process.wait()
                nursery.cancel_scope.cancel()
            return status, running.numbers is not NOTHING
        finally:
            del self._running[number]
            self._gone = total([self._gone, Numbers(running.numbers.grown, {})])
            if process.returncode is None:
                process.kill()
                with move_on_after(GRACE, shield=True):
                    await process.wait()

    async def _open(self) -> tuple[trio.Process, trio.SocketStream]:
        ours, theirs = socket.socketpair()
        handed = [theirs]
        try:
            handed += [_again(each) for each in self._reserved]
            descriptors = [each.fileno() for each in handed]
            process = await trio.lowlevel.open_process(
                [*self._command, "--worker", ",".join(map(str, descriptors))],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                process_group=0,  # a terminal's Ctrl-C is the supervisor's, which passes it on
            )
        except BaseException:
            ours.close()
            raise
        finally:
            for each in handed:
                each.close()
        return process, trio.SocketStream(trio.socket.from_stdlib_socket(ours))


class _Running:
    """A worker that runs, as its supervisor sees it."""

    def __init__(self, process: trio.Process, control: trio.SocketStream) -> None:
        self.process = process
        self.began = current_time()
        self.numbers = NOTHING  # what it had counted when it last said so
        self._control = control
        self._heard = trio.Event()

    async def hear(self, up: trio.Event) -> None:
        """Take in what the worker says, until its end."""
        rest = b""
        try:
            async for data in self._control:
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self.numbers = _decode(line)
                    up.set()
                    self._heard.set()
        except BrokenResourceError:
            pass  # it has ended

    async def ask(self) -> None:
        """Have the worker say what it has counted, if it does so in time."""
        self._heard = trio.Event()
        with move_on_after(ANSWER_TIME):
            try:
                await self._control.send_all(b"?")
                await self._heard.wait()
            except (BrokenResourceError, trio.ClosedResourceError):
                pass  # it has ended


def _again(reserved: socket.socket) -> socket.socket:
    """A further socket on an address that is reserved, or the same one if that listens already."""
    if _listens(reserved):
        return socket.socket(fileno=dup(reserved.fileno()))
    listener = socket.socket(reserved.family, reserved.type)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if reserved.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(reserved.getsockname())
    except BaseException:
        listener.close()
        raise
    return listener


def _how(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"signal {-status} ({strsignal(-status)})"
