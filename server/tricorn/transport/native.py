"""The codec on a socket, bare or with TLS: the transport of an HTTP/1.1 WebSocket on our own port."""

from __future__ import annotations

from contextlib import suppress
from secrets import token_bytes
from socket import SHUT_RD, SHUT_WR
from typing import TYPE_CHECKING, Protocol

from trio import BrokenResourceError, Event, current_time
from trio.lowlevel import ParkingLot

from tricorn.connection import Traffic
from tricorn.protocol.close import ABNORMAL, NO_PONG, STALLED, TOO_BIG, Close
from tricorn.protocol.deflate import Deflater, Inflater
from tricorn.protocol.frames import Opcode, close_frame, fragment, frame
from tricorn.protocol.prepared import Prepared
from tricorn.protocol.receiver import Receiver
from tricorn.transport.flow_control import BROADCAST_MAX, PUT_OFF, READ_AHEAD, READ_DEFLATED, READ_SIZE
from tricorn.transport.rate_limit import RateLimit
from tricorn.transport.sockets import reset_when_closed, unconfirmed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tricorn.connection import Connection
    from tricorn.metrics import ServerMetrics
    from tricorn.protocol.deflate import Agreement
    from tricorn.settings import Settings
    from tricorn.transport.poller import Poller

READ_LARGE = 262144  # bytes; one read takes no more inside a frame with more than READ_SIZE to come
TEXT, BINARY = int(Opcode.TEXT), int(Opcode.BINARY)


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

    __slots__ = (
        "_aborted",
        "_behind",
        "_broken",
        "_bytes_received",
        "_bytes_sent",
        "_close_code",
        "_closing",
        "_codec",
        "_connection",
        "_deflater",
        "_finished",
        "_frame",
        "_heard",
        "_heard_at",
        "_metrics",
        "_pinged_at",
        "_pings",
        "_poller",
        "_progress",
        "_progress_at",
        "_put_off",
        "_put_off_bytes",
        "_rate_limit",
        "_read_size",
        "_rest",
        "_settings",
        "_socket",
        "_taken",
        "_unread",
        "_unsent",
        "_waiting",
        "at_eof",
        "wants_read",
        "wants_write",
    )

    def __init__(
        self,
        sock: Wire,
        rest: bytes,
        poller: Poller,
        settings: Settings,
        metrics: ServerMetrics,
        agreement: Agreement | None = None,
        *,
        unsent: bytes = b"",
    ) -> None:
        self.wants_read = True
        self.wants_write = bool(unsent)
        self.at_eof = False
        self._socket = sock
        self._rest = rest
        self._poller = poller
        self._settings = settings
        self._metrics = metrics
        self._connection: Connection
        self._codec = Receiver(settings.max_message_bytes, Inflater(agreement) if agreement else None)
        self._rate_limit = RateLimit(settings, metrics)
        self._deflater = Deflater(agreement) if agreement else None
        self._frame = self._deflater.frame if self._deflater else frame
        self._read_size = READ_DEFLATED if agreement else READ_SIZE
        self._behind = False  # the connection has something to receive
        self._unread = 0  # bytes read, or inflated, while it had
        self._put_off: list[bytes] = []  # frames
        self._put_off_bytes = 0
        self._unsent: bytes | memoryview = unsent  # what the socket has not taken of the last write
        self._waiting: ParkingLot | None = None  # who waits until nothing is unsent, or the closing is finished
        self._broken = False  # nothing can be sent any more
        self._closing = False  # the close frame was the last thing sent
        self._close_code: int | None = None  # the one in it
        self._bytes_received = self._bytes_sent = 0
        self._pings: dict[bytes, _Ping] | None = None  # of the handler, without an answer yet, in their order
        self._finished = False  # the closing handshake is done, or cannot be done
        self._aborted = False
        # For keepalive: what happened since it last looked, and when something last had.
        self._heard = True
        self._heard_at = 0.0
        self._pinged_at: float | None = None
        self._progress = False
        self._progress_at = 0.0
        self._taken: object = 0

    @property
    def _inflates(self) -> bool:
        return self._read_size == READ_DEFLATED

    # For the connection

    def start(self, connection: Connection) -> None:
        self._connection = connection
        self._poller.register(self)
        if self._rest:
            self._take(self._rest)

    def idle(self) -> None:
        self._behind = False
        self._unread = 0
        if self._put_off:
            self.flush()
        if not self.wants_read and not self.at_eof:
            self._pace()

    def send(self, payloads: Sequence[bytes], *, text: bool, more: bool) -> bool:
        if self._broken or self._closing:
            self._require_open()
        if self._unsent:
            return False
        opcode = TEXT if text else BINARY
        put_off = self._put_off
        if more and not put_off:
            self._poller.flush_soon(self)
        size = 0
        if payloads.__class__ is Prepared:
            put_off.append(payloads.frames(self._deflater))
            size = len(put_off[-1])
        else:
            for payload in payloads:
                data = self._frame(opcode, payload)
                put_off.append(data)
                size += len(data)
        self._put_off_bytes += size
        if not more or self._put_off_bytes >= PUT_OFF:
            self.flush()
        return True

    def send_fragment(self, payload: bytes, *, text: bool | None, last: bool) -> bool:
        self._require_open()
        if self._unsent:
            return False
        opcode = Opcode.CONTINUATION if text is None else Opcode.TEXT if text else Opcode.BINARY
        make = fragment if self._deflater is None else self._deflater.fragment
        self._put_off.append(make(opcode, payload, last=last))
        self.flush()
        return True

    def limit_messages(self, max_bytes: int) -> None:
        codec = self._codec
        if codec.violation is None:
            codec.limit_messages(max_bytes)
            if codec.violation is not None:
                self.resume()

    def broadcast(self, message: Prepared) -> bool:
        self._require_open()
        if len(self._unsent) + self._put_off_bytes > BROADCAST_MAX:
            return False
        data = message.frames(self._deflater)  # not before: what a compressor remembers has to be sent
        self._put_off.append(data)
        self._put_off_bytes += len(data)
        self._poller.flush_soon(self)
        return True

    async def ping(self) -> float:
        self._require_open()
        if self._pings is None:
            self._codec.awaited = self._pings = {}
        payload = token_bytes(4)
        ping = self._pings[payload] = _Ping(current_time())
        self._put_off.append(frame(Opcode.PING, payload))
        self.flush()
        try:
            await ping.answered.wait()
        finally:
            self._pings.pop(payload, None)
        if ping.latency is None:
            raise BrokenResourceError("the connection ended before the pong came")
        return ping.latency

    async def room(self) -> None:
        while self._unsent and not self._broken and not self._closing:
            await self._wait()

    async def flushed(self) -> None:
        while (self._unsent or self._put_off) and not self._broken:
            self.flush()
            if self._unsent and not self._broken:
                await self._wait()

    def waiting(self) -> int:
        if self._broken:
            return 0
        return unconfirmed(self._socket.fileno()) + len(self._unsent) + sum(map(len, self._put_off))

    def taken(self) -> object:
        return self._bytes_sent - unconfirmed(self._socket.fileno())

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

    def abort(self, close: Close | None = None) -> None:
        if self._aborted:
            return
        if close is not None and close.code != ABNORMAL and not self._closing:
            self._closing = True
            self._put_off.append(close_frame(close))
            self.flush()
        self._aborted = self.at_eof = True
        self._poller.unregister(self)
        if self._unsent:  # the stream ends in half a frame: the kernel need not keep the rest for it
            reset_when_closed(self._socket)
        self._socket.close()
        self._break()
        for ping in (self._pings or {}).values():
            ping.answered.set()
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
        if self._codec.more:  # the peer hung up, and what was read comes before that
            self._poller.resume_soon(self)
            return
        if not self.wants_read:  # the peer hung up: what it left is bounded, so read that and find the end
            if self._inflates and self._unread > self._settings.max_message_bytes + READ_AHEAD:
                self._end_of_stream("no close frame within what could be inflated")
                return
            self.wants_read = True
            self._poller.change(self)
        problem = "no close frame"
        try:
            size = self._read_size
            data = self._socket.recv(READ_LARGE if self._codec.left > size == READ_SIZE else size)
        except BlockingIOError:
            return
        except OSError as error:
            data, problem = b"", str(error)
        if data:
            self._heard = True
            self._take(data)
        else:
            self._end_of_stream(problem)

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
            self._waiting.unpark_all()

    def resume(self) -> None:
        if not self.at_eof:
            self._take(b"")

    def failed(self, error: Exception) -> None:
        self._connection.fail(error)
        self.at_eof = True
        if not self._aborted:
            self._poller.change(self)

    # For the server

    def keep_alive(self, now: float, blocked: float) -> None:
        """Ping a silent peer, and give up one that does not answer or that takes nothing of what is sent to it."""
        if self._closing or self.at_eof:
            return
        settings = self._settings
        self._heard_at += blocked
        self._progress_at += blocked
        if self._pinged_at is not None:
            self._pinged_at += blocked
        if self._unsent and self._taken != (taken := self.taken()):  # of a full buffer the peer may take a little
            self._taken = taken
            self._progress = True
        if self._progress:
            self._progress = False
            self._progress_at = now
        elif self._unsent and now - self._progress_at >= settings.stall_timeout:
            self.at_eof = True  # and read no more of it
            self._break()
            self._connection.end(Close(STALLED, "the peer stopped reading"))
        if self._pinged_at is not None and now - self._pinged_at >= settings.ping_timeout and self.wants_read:
            self.readable()  # its answer may have come meanwhile
            if self.at_eof:
                return
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
            self._behind = connection.deliver(messages)
        if codec.pings:
            if self._unsent:
                del codec.pings[:-1]  # answering the last of those that wait is enough, RFC 6455 §5.5.3
            self.flush()
        if codec.pongs:
            self._take_pongs(codec.pongs)
        over = codec.closed or codec.violation
        if over is None:
            too_fast = self._rate_limit.exceeded(codec.frames, codec.inflated or len(data))
            if too_fast is not None and not self._closing:
                over = codec.violation = too_fast  # from here on nothing that comes is looked at
        if over is not None:
            if over.code == TOO_BIG and over is codec.violation and not self._closing:
                self._metrics.limit_hits.add("max_message_bytes")
            self.wants_read = self._closing
            self._poller.change(self)
            self._look_finished()
            connection.end(over)
        elif self._behind:
            self._unread += sum(map(len, messages)) if self._inflates else len(data)
            if self._unread > READ_AHEAD or codec.more or not self.wants_read:
                self._pace()
        elif codec.more or not self.wants_read:
            self._pace()

    def _pace(self) -> None:
        """Read on, unless there is enough for now: what was read and waits for its turn, or for the connection."""
        full = self._behind and self._unread > READ_AHEAD and not self._broken
        more = self._codec.more
        if more and not full:
            self._poller.resume_soon(self)
        wants_read = not more and not full
        if self.wants_read is not wants_read:
            self.wants_read = wants_read
            self._poller.change(self)

    def _take_pongs(self, pongs: list[bytes]) -> None:
        """A pong answers its ping and all before it (RFC 6455 §5.5.3)."""
        now = current_time()
        for payload in pongs:
            if self._pings and payload in self._pings:
                answered = list(self._pings)
                for each in answered[: answered.index(payload) + 1]:
                    ping = self._pings.pop(each)
                    ping.latency = now - ping.sent_at
                    ping.answered.set()
        pongs.clear()

    def _require_open(self) -> None:
        if self._broken or self._closing:
            raise BrokenResourceError("the connection is over")

    def _end_of_stream(self, reason: str) -> None:
        self.at_eof = True
        self._poller.change(self)
        self._look_finished()
        self._connection.end(Close(ABNORMAL, reason))

    def _write(self, data: bytes | memoryview) -> None:
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = -1
        if sent < 0:
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
            self._poller.change(self)

    def _break(self) -> None:
        """Give up sending."""
        self._broken = True
        self._put_off = []
        self._finish()
        if self.wants_write:
            self.wants_write = False
            if not self._aborted:
                self._poller.change(self)

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


class _Ping:
    """A ping of the handler on its way."""

    __slots__ = ("answered", "latency", "sent_at")

    def __init__(self, now: float) -> None:
        self.sent_at = now
        self.latency: float | None = None
        self.answered = Event()
