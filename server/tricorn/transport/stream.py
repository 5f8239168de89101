"""A Trio stream where the native transport wants a non-blocking socket and its readiness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import trio
from trio import BrokenResourceError, ClosedResourceError
from trio.lowlevel import ParkingLot

from tricorn.transport.flow_control import READ_SIZE
from tricorn.transport.poller import Flusher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tricorn.transport.poller import Watched

CHUNK = 16384  # bytes; what is handed to the stream at a time: a peer that takes so many has made progress


class Stream(Protocol):
    """What is needed of the stream. Both may be called at a time, and be cancelled when all is over."""

    async def receive_some(self, max_bytes: int) -> bytes | bytearray: ...

    async def send_all(self, data: bytes) -> None: ...


class StreamSocket(Flusher):
    """Reads and writes a stream in two tasks, for one transport.

    `send` starts writing and says that it would block; what was written it says when it is asked again, once that is
    with the kernel. So the transport knows at any time what of a frame is on its way.
    """

    def __init__(self, stream: Stream, sock: trio.socket.SocketType) -> None:
        super().__init__()
        self._stream = stream
        self._socket = sock  # under the stream
        self._nursery: trio.Nursery
        self._owner: Watched
        self._received: bytes | OSError | None = None
        self._sending = b""
        self._sent = 0  # bytes that were written and that `send` has not told yet
        self._error: OSError | None = None  # why nothing can be written any more
        self._changed = ParkingLot()  # the two tasks, while there is nothing that they are to do

    # A socket

    def fileno(self) -> int:
        return self._socket.fileno()

    def recv(self, size: int, /) -> bytes:
        received, self._received = self._received, None
        if received is None:
            raise BlockingIOError
        if isinstance(received, OSError):
            raise received
        return received

    def send(self, data: bytes | memoryview, /) -> int:
        if self._error is not None:
            raise self._error
        sent, self._sent = self._sent, 0
        if sent:
            return sent
        if not self._sending:
            self._sending = bytes(data[:CHUNK])
            self._changed.unpark_all()
        raise BlockingIOError

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None:
        self._socket.setsockopt(level, option, value)

    def shutdown(self, how: int, /) -> None:
        self._socket.shutdown(how)

    def close(self) -> None:
        self._socket.close()

    # A readiness

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await self._flush()

    def register(self, watched: Watched) -> None:
        self._owner = watched
        self._nursery.start_soon(self._guard, self._read)
        self._nursery.start_soon(self._guard, self._write)

    def change(self, watched: Watched) -> None:
        self._changed.unpark_all()

    def unregister(self, watched: Watched) -> None:
        pass  # closing the socket ends what waits for it

    async def _guard(self, serve: Callable[[], Awaitable[None]]) -> None:
        try:
            await serve()
        except Exception as error:
            self._owner.failed(error)

    async def _read(self) -> None:
        owner = self._owner
        while not owner.at_eof:
            if not owner.wants_read:
                await self._changed.park()
                continue
            try:
                self._received = bytes(await self._stream.receive_some(READ_SIZE))
            except (BrokenResourceError, ClosedResourceError) as error:
                self._received = _why(error)
            if not owner.at_eof:
                owner.readable()

    async def _write(self) -> None:
        owner = self._owner
        while self._error is None:
            if not self._sending:
                await self._changed.park()
                continue
            try:
                await self._stream.send_all(self._sending)
                self._sent = len(self._sending)
            except (BrokenResourceError, ClosedResourceError) as error:
                self._error = _why(error)
            self._sending = b""
            while owner.wants_write and not self._sending:
                owner.writable()


def _why(error: Exception) -> OSError:
    cause = error.__cause__
    return cause if isinstance(cause, OSError) else OSError(f"{error}")
