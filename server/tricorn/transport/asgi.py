"""The transport on an ASGI server: a WebSocket behind its `receive` and `send` (ASGI 3.0, scope `websocket`)."""

from __future__ import annotations

import select
import socket
from collections import deque
from select import poll
from sys import byteorder, platform
from typing import TYPE_CHECKING, Any

import trio
from trio import BrokenResourceError, BusyResourceError, CancelScope, Event, move_on_after, sleep
from trio.lowlevel import ParkingLot, checkpoint

from tricorn.connection import Traffic
from tricorn.protocol.close import ABNORMAL, NO_STATUS, STALLED, TOO_BIG, Close
from tricorn.transport.flow_control import BROADCAST_MAX, PUT_OFF, READ_AHEAD
from tricorn.transport.rate_limit import RateLimit
from tricorn.transport.sockets import shut_down
from tricorn.waiter import Waiter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tricorn.connection import Connection, Handed
    from tricorn.metrics import ServerMetrics
    from tricorn.protocol.prepared import Prepared
    from tricorn.settings import Settings

    ASGIEvent = dict[str, Any]
    Receive = Callable[[], Awaitable[ASGIEvent]]
    Send = Callable[[ASGIEvent], Awaitable[None]]
    # Calls what it is given with the connection's socket; False where that has none any more.
    Reach = Callable[[Callable[[socket.socket], None]], bool]

LOOK = 0.5  # seconds between two looks whether the peer hung up, while reading is paused
BUSY = 0.1  # seconds after which a receiver that is not back is taken to be busy with something else
IN_INBOX = 64  # bytes; what a message costs besides its own size
PROBES = 3  # of TCP's keepalive
MAX_PROBE_TIME = 32767  # seconds, Linux

# Where the kernel tells of half a stream that ended, and can be told when to ask; elsewhere it shows in reading on.
LINUX = platform == "linux"
POLLRDHUP = select.POLLRDHUP if LINUX else 0
TCP_INFO = socket.IPPROTO_TCP, socket.TCP_INFO if LINUX else 0
KEEPALIVE = socket.SOL_SOCKET, socket.SO_KEEPALIVE
IDLE, INTERVAL, COUNT, USER_TIMEOUT = (
    (socket.IPPROTO_TCP, getattr(socket, name, 0))
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
)
BYTES_ACKED = slice(120, 128)  # tcpi_bytes_acked in Linux's struct tcp_info


class Unattended:
    """Transports in whose `receive` nobody sat when they were put in here, most of them not for long."""

    def __init__(self) -> None:
        self._transports: set[AsgiTransport] = set()
        self._some = ParkingLot()

    def add(self, transport: AsgiTransport) -> None:
        if not self._transports:
            self._some.unpark()
        self._transports.add(transport)

    async def attend(self) -> None:
        while True:
            if not self._transports:
                await self._some.park()
            await sleep(BUSY)
            transports, self._transports = self._transports, set()
            for transport in transports:
                transport.attend()


class AsgiTransport:
    """A WebSocket behind `receive` and `send` of an ASGI server.

    Reading: somebody sits in `receive`, since that is how a server tells that the peer is gone. Who receives from the
    connection does so itself, which costs no change of tasks; a `receive` that is cancelled loses nothing, as it is one
    of a memory channel. While nobody does, a task reads ahead. While the handler does not keep up that waits instead,
    so that a busy handler is backpressure for its peer, and asks the socket now and then whether the peer hung up.

    Writing: one task sits in `send`, which with Hypercorn cannot be cancelled. Who sends something waits only until
    there is room for it.
    """

    def __init__(
        self,
        receive: Receive,
        send: Send,
        reach: Reach,
        unattended: Unattended,
        settings: Settings,
        metrics: ServerMetrics,
    ) -> None:
        self._receive = receive
        self._send = send
        self._reach = reach
        self._unattended = unattended
        self._settings = settings
        self._metrics = metrics
        self._connection: Connection
        self._nursery: trio.Nursery
        self._reading = CancelScope(shield=True)
        self._writing = CancelScope(shield=True)
        self._reads_ahead = True  # the reading task reads, and not who receives from the connection
        self._relieved = False  # it may stop to: somebody receives
        self._receiving = False  # who receives from the connection sits in `receive`
        self._unread = 0  # bytes delivered while the connection had something to receive
        self._read_on = ParkingLot()  # the reading task, while it does not read or reading is paused
        self._unsent: deque[tuple[ASGIEvent, int]] = deque()  # events and the sizes of messages, in bytes
        self._unsent_bytes = 0  # in there and on the way
        self._writer = Waiter()  # for the writing task, while there is nothing to send
        self._fragments = bytearray()  # of the message that is being sent in fragments
        self._fragments_are_text = False
        self._room = ParkingLot()  # who waits until less is unsent
        self._sent = ParkingLot()  # the connection, while it waits until nothing is unsent
        self._broken = False  # nothing can be sent any more
        self._over = False  # nothing more is delivered
        self._max_message_bytes = settings.max_message_bytes
        self._rate_limit = RateLimit(settings, metrics)
        self._heard = False  # something was received
        self._at_end = False  # `receive` must not be called again
        self._gone = Event()  # `websocket.disconnect` came
        self._finished = Event()  # the closing handshake is done, or cannot be done
        self._aborted = False
        self._bytes_received = self._bytes_sent = 0
        self._close_received: int | None = None
        self._close_sent: int | None = None
        # For `keep_alive`: whether the peer took something since it last looked, and when it last had.
        self._progress = True
        self._progress_at = 0.0
        self._taken = 0
        self._kept_alive = False

    def carry(self, connection: Connection) -> None:
        """Know the connection, which the server may abort before it runs."""
        self._connection = connection

    async def run(self, handler: Callable[[Handed], Awaitable[None]], websocket: Handed) -> None:
        """Run the connection. If cancelled, it closes in the proper way."""
        async with trio.open_nursery() as self._nursery:
            try:
                await self._connection.run(handler, websocket)
                if self._heard:
                    # Hypercorn's reader waits without end for somebody to take what it read, up to the disconnect.
                    with move_on_after(self._settings.close_timeout, shield=True):
                        await self._gone.wait()
            finally:
                self._reading.cancel()
                self._writing.cancel()

    # For the connection

    def start(self, connection: Connection) -> None:
        self._nursery.start_soon(self._read)
        self._nursery.start_soon(self._write)

    def idle(self) -> Awaitable[None] | None:
        if self._receiving:
            raise BusyResourceError("another task is receiving from this connection")
        if not self._reads_ahead:
            self._receiving = True
            return self._read_one()
        self._relieved = True
        if self._unread:
            self._unread = 0
            self._read_on.unpark_all()
        return None

    def send(self, payloads: Sequence[bytes], *, text: bool, more: bool) -> bool:
        self._require_open()
        if self._unsent_bytes >= PUT_OFF:
            return False
        for payload in payloads:
            self._put(payload, text)
        self._writer.wake()
        return True

    def send_fragment(self, payload: bytes, *, text: bool | None, last: bool) -> bool:
        """ASGI knows no fragments: they are put together."""
        self._require_open()
        if self._unsent_bytes >= PUT_OFF and (last or text is not None):
            return False
        if text is not None:
            self._fragments_are_text = text
        self._fragments += payload
        if last:
            whole, self._fragments = bytes(self._fragments), bytearray()
            self._put(whole, self._fragments_are_text)
            self._writer.wake()
        return True

    def limit_messages(self, max_bytes: int) -> None:
        """Hypercorn keeps what has come of a message up to its own `websocket_max_message_size`."""
        self._max_message_bytes = max_bytes

    def broadcast(self, message: Prepared) -> bool:
        self._require_open()
        if self._unsent_bytes > BROADCAST_MAX:
            return False
        self._put(message[0], message.text)
        self._writer.wake()
        return True

    async def ping(self) -> float:
        await checkpoint()
        raise NotImplementedError("an ASGI server shows no pongs: `ping` works on Tricorn's own server only")

    async def room(self) -> None:
        while self._unsent_bytes >= PUT_OFF and not self._broken and not self._over:
            await self._room.park()

    async def flushed(self) -> None:
        while self._unsent_bytes and not self._broken:
            await self._sent.park()

    def waiting(self) -> int:
        return 0 if self._broken else self._unsent_bytes

    def taken(self) -> object:
        self._reach(self._see_progress)
        return self._bytes_sent, self._taken

    async def close(self, close: Close) -> None:
        self._over = True
        self._room.unpark_all()
        self._read_on.unpark_all()
        self.attend()
        if self._broken or close.code == ABNORMAL:
            return
        self._unsent.append(({"type": "websocket.close", "code": close.code, "reason": close.reason}, 0))
        self._writer.wake()
        await self._finished.wait()

    def abort(self, close: Close | None = None) -> None:
        if self._aborted:
            return
        self._aborted = True
        if not self._gone.is_set():
            self._reach(shut_down)
        self._break()
        self._connection.end(Close(ABNORMAL, "aborted"))

    def traffic(self) -> Traffic:
        """Bytes are those of messages: the server does not tell those of frames, nor what compression saved."""
        return Traffic(self._bytes_received, self._bytes_sent, self._close_received, self._close_sent)

    # For the server

    def keep_alive(self, now: float, blocked: float) -> None:
        """Give up a peer that takes nothing of what is sent to it."""
        self._progress_at += blocked
        if not self._kept_alive:
            self._kept_alive = True
            self._reach(self._have_kernel_ask)
        elif not self._heard and self._hung_up():  # Hypercorn may have closed it before it was accepted, and not say so
            self._connection.end(Close(ABNORMAL, "no close frame"))
        if self._unsent_bytes:
            self._reach(self._see_progress)
        if self._progress or not self._unsent_bytes:
            self._progress = False
            self._progress_at = now
        elif now - self._progress_at >= self._settings.stall_timeout and not self._over:
            self._break()
            self._give_up(Close(STALLED, "the peer stopped reading"))

    def failed(self, error: Exception) -> None:
        """A bug, or no memory: it ends this connection and nothing else."""
        self._connection.fail(error)

    # For the router

    def attend(self) -> None:
        """Read ahead, unless somebody is receiving."""
        if not self._receiving and not self._reads_ahead:
            self._reads_ahead = True
            self._read_on.unpark_all()

    # Inside

    async def _read(self) -> None:
        with self._reading:
            while not self._at_end:
                await self._read_one()
                while self._unread > READ_AHEAD and not self._over and not self._hung_up():
                    with move_on_after(LOOK):
                        await self._read_on.park()
                if self._relieved and not self._over:
                    self._reads_ahead = self._relieved = False
                    self._unattended.add(self)
                    while not self._reads_ahead:
                        await self._read_on.park()

    async def _read_one(self) -> None:
        """Read one event. If cancelled, none is lost: Hypercorn's `receive` is that of a memory channel."""
        try:
            event = await self._receive()
            if event["type"] == "websocket.receive":
                self._take(event)
            else:
                self._disconnected(event)
        except Exception as error:
            self._at_end = True
            self.failed(error)
        finally:
            self._receiving = False
            self._unattended.add(self)

    def _take(self, event: ASGIEvent) -> None:
        self._heard = True
        message = event.get("text")
        if message is None:
            message = event["bytes"]
            size = len(message)
        else:
            size = len(message) if message.isascii() else len(message.encode())
        self._bytes_received += size
        if self._over:
            return
        if size > self._max_message_bytes:
            self._metrics.limit_hits.add("max_message_bytes")
            self._give_up(Close(TOO_BIG, f"a message may have at most {self._max_message_bytes} bytes"))
            return
        if too_fast := self._rate_limit.exceeded(1, size):
            self._give_up(too_fast)
            return
        if self._connection.deliver([message]):
            self._unread += size + IN_INBOX

    def _give_up(self, close: Close) -> None:
        self._over = True  # and read no more of it
        self._connection.end(close)

    def _disconnected(self, event: ASGIEvent) -> None:
        close = Close(event.get("code") or NO_STATUS, event.get("reason") or "")
        if close.code != ABNORMAL and self._close_sent is None:  # the code behind our own is made up by Hypercorn
            self._close_received = close.code
        self._at_end = True
        self._gone.set()
        self._break()
        self._connection.end(close)

    async def _write(self) -> None:
        with self._writing:
            try:
                while True:
                    while self._unsent:
                        event, size = self._unsent.popleft()
                        await self._send(event)
                        self._progress = True
                        self._bytes_sent += size
                        self._unsent_bytes -= size
                        self._sent.unpark_all()
                        if self._unsent_bytes < PUT_OFF <= self._unsent_bytes + size:
                            self._room.unpark_all()
                        if event["type"] == "websocket.close":
                            self._close_sent = event["code"]
                    await self._writer.wait()
            except OSError:  # ASGI 3.0: the peer is gone
                self._break()
            except Exception as error:
                self._break()
                self.failed(error)

    def _put(self, payload: bytes, text: bool) -> None:
        size = len(payload)
        self._unsent_bytes += size
        if text:
            self._unsent.append(({"type": "websocket.send", "text": payload.decode()}, size))
        else:
            self._unsent.append(({"type": "websocket.send", "bytes": payload}, size))

    def _require_open(self) -> None:
        if self._broken or self._over:
            raise BrokenResourceError("the connection is over")

    def _break(self) -> None:
        """Give up sending."""
        self._broken = True
        self._unsent.clear()
        self._room.unpark_all()
        self._sent.unpark_all()
        self._finished.set()

    def _have_kernel_ask(self, sock: socket.socket) -> None:
        """ASGI shows no pong, so the kernel asks the peer's whether it is still there."""
        settings = self._settings
        patience = settings.ping_interval + settings.ping_timeout
        if not LINUX or patience > MAX_PROBE_TIME:
            return
        sock.setsockopt(*KEEPALIVE, 1)
        sock.setsockopt(*IDLE, max(1, round(settings.ping_interval)))
        sock.setsockopt(*INTERVAL, max(1, round(settings.ping_timeout / PROBES)))
        sock.setsockopt(*COUNT, PROBES)
        sock.setsockopt(*USER_TIMEOUT, round(patience * 1000))

    def _hung_up(self) -> bool:
        """Whether the peer did. What it left is bounded, so that can all be read up to the end."""
        hung_up = False

        def ask(sock: socket.socket) -> None:
            nonlocal hung_up
            asking = poll()
            asking.register(sock, POLLRDHUP)  # and what poll always tells: POLLHUP and POLLERR
            hung_up = bool(asking.poll(0))

        return not self._reach(ask) or hung_up

    def _see_progress(self, sock: socket.socket) -> None:
        """Of a long message the peer may take a part at a time: the kernel knows how many bytes it has confirmed."""
        if LINUX:
            info = sock.getsockopt(*TCP_INFO, BYTES_ACKED.stop)
            taken = int.from_bytes(info[BYTES_ACKED], byteorder)
            self._progress = self._progress or taken != self._taken
            self._taken = taken
