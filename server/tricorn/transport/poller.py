"""Which sockets can be read or written: one shared epoll, or where there is none, tasks that wait for one socket each.

Both tell a `Watched` the same things. With epoll each socket is registered once and the whole waited for through Trio's
own, which spares every message two system calls and a task switch.
"""

from __future__ import annotations

import sys
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import trio
from trio.lowlevel import checkpoint, notify_closing, wait_readable, wait_writable

from tricorn.waiter import Waiter

if sys.platform == "linux":
    from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLONESHOT, EPOLLOUT, EPOLLRDHUP, epoll

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


RESUMED_AT_ONCE = 8  # sockets: each has a lot of work, or it would not have been put off


class Watched(Protocol):
    """A socket's owner. Its methods are called in a task of the readiness and do not block."""

    wants_read: bool
    wants_write: bool
    at_eof: bool  # nothing will come any more

    def fileno(self) -> int:
        """The socket's descriptor."""

    def readable(self) -> None:
        """There is something to read. Where that was not wanted: the peer hung up."""

    def writable(self) -> None:
        """There is room to write, or an error to be found by trying."""

    def flush(self) -> None:
        """Write what was put off."""

    def resume(self) -> None:
        """Go on with what was read."""

    def failed(self, error: Exception) -> None:
        """One of these methods raised."""


class Poller(Protocol):
    """Where sockets are watched."""

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Watch until cancelled."""

    def register(self, watched: Watched) -> None:
        """Watch a socket from now on."""

    def change(self, watched: Watched) -> None:
        """Heed what the socket's owner wants now."""

    def unregister(self, watched: Watched) -> None:
        """Forget a socket; to be called before it is closed."""

    def flush_soon(self, watched: Watched) -> None:
        """Call `flush` once the tasks that are ready now have run."""

    def resume_soon(self, watched: Watched) -> None:
        """Call `resume` once others have had their turn."""


class Turns:
    """Does, once a scheduler tick, what was put off in the last one: all flushes, and a few of the resumptions."""

    def __init__(self) -> None:
        self._flushing: set[Watched] = set()
        self._resuming: dict[Watched, None] = {}  # the longest waiting first
        self._some = Waiter()

    def flush_soon(self, watched: Watched) -> None:
        self._flushing.add(watched)
        self._some.wake()

    def resume_soon(self, watched: Watched) -> None:
        self._resuming[watched] = None
        self._some.wake()

    async def _take_turns(self) -> None:
        while True:
            if self._resuming:
                await checkpoint()
            else:
                await self._some.wait()
            flushing, self._flushing = self._flushing, set()
            for watched in flushing:
                _call(watched, watched.flush)
            for watched in list(islice(self._resuming, RESUMED_AT_ONCE)):
                del self._resuming[watched]
                _call(watched, watched.resume)


def _call(watched: Watched, step: Callable[[], None]) -> None:
    try:
        step()
    except Exception as error:
        watched.failed(error)


class Epoll(Turns):
    """One epoll for all sockets, itself watched by Trio. Linux only."""

    def __init__(self) -> None:
        super().__init__()
        self._epoll: epoll
        self._watched: dict[int, Watched] = {}

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        with epoll() as self._epoll:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._take_turns)
                task_status.started()
                while True:
                    await wait_readable(self._epoll.fileno())
                    self._dispatch()

    def register(self, watched: Watched) -> None:
        self._watched[watched.fileno()] = watched
        self._epoll.register(watched.fileno(), _events(watched))

    def change(self, watched: Watched) -> None:
        self._epoll.modify(watched.fileno(), _events(watched))

    def unregister(self, watched: Watched) -> None:
        del self._watched[watched.fileno()]
        self._epoll.unregister(watched.fileno())

    def _dispatch(self) -> None:
        get = self._watched.get
        for descriptor, events in self._epoll.poll(0):
            watched = get(descriptor)
            if watched is None:
                continue
            try:
                if events != EPOLLOUT and not watched.at_eof:
                    watched.readable()
                if watched.wants_write and events & (EPOLLOUT | EPOLLHUP | EPOLLERR):
                    watched.writable()
                    if watched.at_eof and watched.wants_write:
                        self.change(watched)
            except Exception as error:
                watched.failed(error)


def _events(watched: Watched) -> int:
    if watched.at_eof:  # once each time: a hang-up does not go away and would keep the loop awake
        return EPOLLONESHOT | (EPOLLOUT if watched.wants_write else 0)
    return EPOLLRDHUP | (EPOLLIN if watched.wants_read else 0) | (EPOLLOUT if watched.wants_write else 0)


class PerSocket(Turns):
    """At most two tasks for each socket, with nothing but what Trio has everywhere.

    A peer that hangs up while reading is not wanted is found out only when reading goes on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._nursery: trio.Nursery
        self._reading: set[Watched] = set()
        self._writing: set[Watched] = set()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await self._take_turns()

    def register(self, watched: Watched) -> None:
        self.change(watched)

    def change(self, watched: Watched) -> None:
        if watched.wants_read and not watched.at_eof and watched not in self._reading:
            self._reading.add(watched)
            self._nursery.start_soon(self._watch, watched, self._read, self._reading)
        if watched.wants_write and watched not in self._writing:
            self._writing.add(watched)
            self._nursery.start_soon(self._watch, watched, self._write, self._writing)

    def unregister(self, watched: Watched) -> None:
        notify_closing(watched.fileno())

    async def _watch(self, watched: Watched, serve: Callable[[Watched], Awaitable[None]], served: set[Watched]) -> None:
        try:
            await serve(watched)
        except trio.ClosedResourceError:
            pass  # unregistered
        except Exception as error:
            watched.failed(error)
        finally:
            served.discard(watched)

    async def _read(self, watched: Watched) -> None:
        while watched.wants_read and not watched.at_eof:
            await wait_readable(watched.fileno())
            if watched.wants_read and not watched.at_eof:
                watched.readable()

    async def _write(self, watched: Watched) -> None:
        while watched.wants_write:
            await wait_writable(watched.fileno())
            watched.writable()


def best_poller() -> Poller:
    """The fastest there is on this platform."""
    return Epoll() if sys.platform == "linux" else PerSocket()
