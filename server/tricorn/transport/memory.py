"""A wire that has both ends in this process: the native transport without sockets, for `tricorn.testing`."""

from __future__ import annotations

from errno import ECONNRESET, EPIPE
from socket import SHUT_WR
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import checkpoint

from tricorn.transport.poller import Flusher
from tricorn.waiter import Waiter

if TYPE_CHECKING:
    from collections.abc import Callable

    from tricorn.transport.poller import Watched

CAPACITY = 65536  # bytes that may be on their way in each direction


def _nothing() -> None: ...


class MemoryWire(Flusher):
    """The bytes between one client and its server, as the server's socket and as the poller of it.

    Attributes:
        notify: called when the client may have something to read, or room to write.
        ended: the server has ended its stream; nothing follows what can still be taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notify: Callable[[], None] = _nothing
        self.ended = False
        self._to_client = bytearray()
        self._to_server = bytearray()
        self._gone = False  # the client has closed its end
        self._watched: Watched | None = None
        self._changed = Waiter()

    # The client's end

    def give(self, data: bytes) -> int:
        """Take as much as there is room for, and return how much that is."""
        size = min(len(data), CAPACITY - len(self._to_server))
        self._to_server += data[:size]
        self._changed.wake()
        return size

    def take(self) -> bytes:
        """Return what the server has sent."""
        data = bytes(self._to_client)
        self._to_client.clear()
        self._changed.wake()
        return data

    def hang_up(self) -> None:
        """Close the client's end."""
        self._gone = True
        self._changed.wake()

    # The server's end, as a socket

    def fileno(self) -> int:
        return -1  # there is no descriptor, and no kernel to ask

    def recv(self, size: int, /) -> bytes:
        data = bytes(self._to_server[:size])
        if data:
            del self._to_server[:size]
            self.notify()
            return data
        if self._gone:
            raise ConnectionResetError(ECONNRESET, "the client has vanished")
        raise BlockingIOError

    def send(self, data: bytes | memoryview, /) -> int:
        if self._gone:
            raise BrokenPipeError(EPIPE, "the client has vanished")
        size = min(len(data), CAPACITY - len(self._to_client))  # 0 where a socket raises BlockingIOError
        self._to_client += data[:size]
        self.notify()
        return size

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None:
        pass  # whether the end is a RST makes no difference to this client

    def shutdown(self, how: int, /) -> None:
        if how == SHUT_WR:
            self.close()

    def close(self) -> None:
        self.ended = True
        self.notify()

    # The server's end, as a poller

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._flush)
            task_status.started()
            while True:
                if self._dispatch():
                    await checkpoint()
                else:
                    await self._changed.wait()

    def register(self, watched: Watched) -> None:
        self._watched = watched
        self._changed.wake()

    def change(self, watched: Watched) -> None:
        self._changed.wake()

    def unregister(self, watched: Watched) -> None:
        self._watched = None

    def _dispatch(self) -> bool:
        """Tell the transport what it can do, and return whether there was anything."""
        watched = self._watched
        if watched is None:
            return False
        reads = not watched.at_eof and (self._gone or (watched.wants_read and bool(self._to_server)))
        writes = watched.wants_write and (self._gone or len(self._to_client) < CAPACITY)
        try:
            if reads:
                watched.readable()
            if writes and watched.wants_write:
                watched.writable()
        except Exception as error:
            watched.failed(error)
        return reads or writes
