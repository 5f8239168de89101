"""The codec on a bare socket: the transport of a plain HTTP/1.1 WebSocket."""

from __future__ import annotations

from contextlib import suppress
from socket import SHUT_RD, SHUT_WR, SO_LINGER, SOL_SOCKET
from struct import pack
from typing import TYPE_CHECKING, Protocol

from trio import BrokenResourceError, current_time, sleep
from trio.lowlevel import ParkingLot

from tricorn.connection import Traffic
from tricorn.metrics import LIMIT_HITS, SEND_STALLS
from tricorn.protocol.close import ABNORMAL, NO_PONG, STALLED, TOO_BIG, TOO_FAST, Close
from tricorn.protocol.deflate import Deflater, Inflater
from tricorn.protocol.frames import Opcode, close_frame, frame
from tricorn.protocol.receiver import Receiver
from tricorn.transport.rate_limit import RateLimit

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from tricorn.connection import Kept, WebSocket
    from tricorn.protocol.deflate import Agreement
    from tricorn.settings import Settings
    from tricorn.transport.poller import Poller

READ_SIZE = 65536  # bytes; what one read takes at most
READ_LARGE = 262144  # bytes; the same inside a frame with more than READ_SIZE to come
READ_DEFLATED = 4096  # bytes; the same where they may inflate, to a thousand times as much
READ_AHEAD = 65536  # bytes; what is read while the connection has something to receive, before reading pauses
RESET = pack("ii", 1, 0)  # for SO_LINGER: close with RST and keep nothing
PUT_OFF = 65536  # bytes; what is put off at most to go out in one write
TEXT, BINARY = int(Opcode.TEXT), int(Opcode.BINARY)
LOOKS_PER_TIMEOUT = 4  # how often keepalive looks in its shortest time: it may be late by a quarter


class Wire(Protocol):
    """A non-blocking socket, or what acts like one."""

    def fileno(self) -> int: ...

    def recv(self, size: int, /) -> bytes: ...

    def send(self, data: bytes | memoryview, /) -> int: ...

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...


class NativeTransport:
    """A WebSocket on a socket whose request head has been read and answered.

    Writing: what the socket does not take at once is kept and finished as soon as it does, whatever became of the task
    that sent it; nobody else's frame goes before. So a frame is whole, or the last thing on the stream. While the
    connection still has messages to receive its answers are put off, so that many go out in one write.

    Reading pauses when the connection does not keep up: a busy handler is backpressure for its peer.
    """

    def __init__(
        self, sock: Wire, rest: bytes, readiness: Poller, settings: Settings, agreement: Agreement | None = None
    ) -> None:
        self.wants_read = True
        self.wants_write = False
        self.at_eof = False
        self._socket = sock
        self._rest = rest
        self._readiness = readiness
        self._settings = settings
        self._connection: WebSocket
        self._codec = Receiver(settings.max_message_bytes, Inflater(agreement) if agreement else None)
        self._pace = RateLimit(settings.messages_per_second, settings.bytes_per_second)
        self._frame = Deflater(agreement).frame if agreement else frame
        self._read_size = READ_DEFLATED if agreement else READ_SIZE
        self._unread = 0  # bytes read, or inflated, while the connection had something to receive
        self._put_off: list[bytes] = []  # frames
        self._put_off_bytes = 0
        self._unsent: bytes | memoryview = b""  # what the socket has not taken of the last write
        self._waiting: ParkingLot | None = None  # tasks that wait until nothing is unsent, or the closing is finished
        self._broken = False  # nothing can be sent any more
        self._closing = False  # the close frame was the last thing sent
        self._close_code: int | None = None  # the one in it
        self._bytes_received = self._bytes_sent = 0
        self._finished = False  # the closing handshake is done, or cannot be done
        self._aborted = False
        # For keepalive: what happened since it last looked, and when something last had.
        self._heard = True
        self._heard_at = 0.0
        self._pinged_at: float | None = None
        self._progress = False
        self._progress_at = 0.0

    @property
    def _inflates(self) -> bool:
        return self._read_size == READ_DEFLATED

    # For the connection

    def start(self, connection: WebSocket) -> None:
        self._connection = connection
        self._readiness.register(self)
        if self._rest:
            self._take(self._rest)

    def idle(self) -> None:
        self._unread = 0
        if self._put_off:
            self.flush()
        if not self.wants_read and not self.at_eof:
            self.wants_read = True
            self._readiness.change(self)

    def send(self, payloads: Sequence[bytes], *, text: bool) -> bool:
        if self._broken or self._closing:
            raise BrokenResourceError("the connection is over")
        if self._unsent:
            return False
        opcode = TEXT if text else BINARY
        put_off = self._put_off
        if not put_off and self._connection.inbox:
            self._readiness.flush_soon(self)
        size = 0
        for payload in payloads:
            data = self._frame(opcode, payload)
            put_off.append(data)
            size += len(data)
        self._put_off_bytes += size
        if not self._connection.inbox or self._put_off_bytes >= PUT_OFF:
            self.flush()
        return True

    async def room(self) -> None:
        if self._unsent and not self._broken and not self._closing:
            SEND_STALLS.add()
            while self._unsent and not self._broken and not self._closing:
                await self._wait()

    async def close(self, close: Close) -> None:
        self._closing = True
        self._wake_all()
        if close.code == ABNORMAL:
            self.flush()
            while self._unsent and not self._broken:  # the peer may have ended only its half of the stream
                await self._wait()
        if self._broken or close.code == ABNORMAL:
            return
        self._put_off.append(close_frame(close))
        self._close_code = close.code
        self.idle()
        self._look_finished()
        while not self._finished:
            await self._wait()

    def abort(self) -> None:
        if self._aborted:
            return
        self._aborted = self.at_eof = True
        self._readiness.unregister(self)
        if self._unsent:  # the stream ends in half a frame: the kernel need not keep the rest for it
            self._socket.setsockopt(SOL_SOCKET, SO_LINGER, RESET)
        self._socket.close()
        self._break()
        self._connection.end(Close(ABNORMAL, "aborted"))

    def forget(self) -> None:
        """The connection has ended, and knows this one: both are freed now without the garbage collector."""
        del self._connection

    def traffic(self) -> Traffic:
        close_received = None if self._codec.closed is None else self._codec.closed.code
        close_sent = None if self._unsent else self._close_code
        return Traffic(self._bytes_received, self._bytes_sent, close_received, close_sent)

    # For the readiness

    def fileno(self) -> int:
        return self._socket.fileno()

    def readable(self) -> None:
        if not self.wants_read:  # the peer hung up: what it left is bounded, so read that and find the end
            if self._inflates and self._unread > self._settings.max_message_bytes + READ_AHEAD:
                self._end_of_stream("no close frame within what could be inflated")
                return
            self.wants_read = True
            self._readiness.change(self)
        try:
            size = self._read_size
            data = self._socket.recv(READ_LARGE if self._codec.left > size == READ_SIZE else size)
        except BlockingIOError:
            return
        except OSError as error:
            self._end_of_stream(str(error))
            return
        if data:
            self._heard = True
            self._take(data)
        else:
            self._end_of_stream("no close frame")

    def writable(self) -> None:
        self._write(self._unsent)
        self.flush()
        if not self._unsent:
            self._look_finished()

    def flush(self) -> None:
        if self._unsent or self._broken:
            return
        pings = self._codec.pings
        if pings:
            if not self._closing:
                self._put_off += [frame(Opcode.PONG, ping) for ping in pings]
            pings.clear()
        frames = self._put_off
        if frames:
            self._put_off = []
            self._put_off_bytes = 0
            self._write(frames[0] if len(frames) == 1 else b"".join(frames))
        if self._waiting is not None and not self._unsent:
            self._waiting.unpark()  # one: the next when this one's is on its way, so that they go out in order

    def failed(self, error: Exception) -> None:
        """A bug, or no memory: it ends this connection and nothing else."""
        self._connection.fail(error)
        self.at_eof = True
        self._readiness.change(self)

    # For the server

    def keep_alive(self, now: float) -> None:
        """Ping a silent peer, and give up one that does not answer or that takes nothing of what is sent to it."""
        if self._closing:
            return
        settings = self._settings
        if self._progress:
            self._progress = False
            self._progress_at = now
        elif self._unsent and now - self._progress_at >= settings.stall_timeout:
            self.at_eof = True  # and read no more of it
            self._break()
            self._connection.end(Close(STALLED, "the peer stopped reading"))
        if self._heard or not self.wants_read:  # while reading is paused its answer may be among what is unread
            self._heard = False
            self._heard_at = now
            self._pinged_at = None
        elif self._pinged_at is None:
            if now - self._heard_at >= settings.ping_interval:
                self._pinged_at = now
                self._put_off.append(frame(Opcode.PING, b""))
                self.flush()
        elif self._unsent:  # the ping has to wait behind it, and so does its answer
            self._pinged_at = now
        elif now - self._pinged_at >= settings.ping_timeout:
            self._connection.end(Close(NO_PONG, "no pong"))

    # Inside

    def _take(self, data: bytes) -> None:
        self._bytes_received += len(data)
        codec = self._codec
        messages = codec.receive_data(data)
        connection = self._connection
        if messages and not self._closing:
            connection.deliver(messages)
        if codec.pings:
            if self._unsent:
                del codec.pings[:-1]  # answering the last of those that wait is enough, RFC 6455 §5.5.3
            self.flush()
        over = codec.closed or codec.violation
        if over is None and (passed := self._pace.passed(len(messages), len(data))) and not self._closing:
            over = codec.violation = too_fast(passed, self._settings)  # from here on nothing that comes is looked at
        if over is not None:
            if over.code == TOO_BIG and over is codec.violation and not self._closing:
                LIMIT_HITS.add("max_message_bytes")
            self.wants_read = self._closing
            self._readiness.change(self)
            self._look_finished()
            connection.end(over)
        elif connection.inbox:
            self._unread += sum(map(len, messages)) if self._inflates else len(data)
            if self._unread > READ_AHEAD and not self._broken:
                self.wants_read = False
                self._readiness.change(self)

    def _end_of_stream(self, reason: str) -> None:
        self.at_eof = True
        self._readiness.change(self)
        self._look_finished()
        self._connection.end(Close(ABNORMAL, reason))

    def _write(self, data: bytes | memoryview) -> None:
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._break()
            with suppress(OSError):  # not every error that a send may have ends the stream of what is read
                self._socket.shutdown(SHUT_RD)
            self.idle()  # it is gone: what it left is bounded, so read that and find the end
            return
        self._progress = True
        self._bytes_sent += sent
        all_sent = sent == len(data)
        self._unsent = b"" if all_sent else memoryview(data)[sent:]
        if self.wants_write is all_sent:
            self.wants_write = not all_sent
            self._readiness.change(self)

    def _break(self) -> None:
        """Give up sending."""
        self._broken = True
        self._put_off = []
        self._finish()
        if self.wants_write:
            self.wants_write = False
            if not self._aborted:
                self._readiness.change(self)

    async def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = ParkingLot()
        await self._waiting.park()

    def _wake_all(self) -> None:
        if self._waiting is not None:
            self._waiting.unpark_all()

    def _finish(self) -> None:
        self._finished = True
        self._wake_all()

    def _look_finished(self) -> None:
        """See whether the closing handshake is done: both close frames, or ours and the peer's end of the stream."""
        if not self._closing or self._unsent or self._put_off:
            return
        if self._codec.closed is not None or self.at_eof:
            self._finish()
        elif self._codec.violation is not None:  # its close frame would not be understood: let it see the end instead
            try:
                self._socket.shutdown(SHUT_WR)
            except OSError:
                self._finish()


def too_fast(limit: str, settings: Settings) -> Close:
    """The end of a peer that passes this limit of its pace, which is counted."""
    LIMIT_HITS.add(limit)
    return Close(TOO_FAST, f"more than {getattr(settings, limit):,.0f} {limit.replace('_', ' ')}")


async def keep_alive(transports: Collection[Kept], settings: Settings) -> None:
    """Keep the connections alive that there are at any time, or give them up. Runs until cancelled."""
    period = min(settings.ping_interval, settings.ping_timeout, settings.stall_timeout) / LOOKS_PER_TIMEOUT
    while True:
        await sleep(period)
        now = current_time()
        for transport in list(transports):
            try:
                transport.keep_alive(now)
            except Exception as error:
                transport.failed(error)
