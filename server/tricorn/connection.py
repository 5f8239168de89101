"""The life of one connection: its nursery, the first cause of its end, its teardown, its record."""

from __future__ import annotations

from math import inf
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import trio
from trio import (
    CancelScope,
    Event,
    StrictFIFOLock,
    current_effective_deadline,
    current_time,
    move_on_after,
    sleep,
)

from tricorn.errors.chain import Interruption, first_of, hides_an_error, in_order, is_any
from tricorn.errors.failures import PASSING, forget_contexts, leaves, passing
from tricorn.errors.report import report, report_error, trace_id
from tricorn.errors.stuck import stuck
from tricorn.metrics import Totals
from tricorn.protocol.close import FAULTS, INTERNAL_ERROR, NORMAL, SERVICE_RESTART, Close
from tricorn.protocol.phase import IllegalMove, Phase, move
from tricorn.waiter import Waiter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tricorn.metrics import ServerMetrics
    from tricorn.protocol.prepared import Prepared
    from tricorn.protocol.receiver import Message
    from tricorn.request import Request
    from tricorn.settings import Settings


class Reaper(Protocol):
    """Closes sockets whose tasks do not end."""

    def watch(self, connection: Connection) -> None:
        """See to it that the connection's tasks have ended at its `patience`."""

    def forget(self, connection: Connection) -> None:
        """They have."""


LITTLE = 8192  # bytes
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.2  # seconds between two looks at what the peer has confirmed
IN_VAIN_MAX = 1000  # messages
LATER_CAUSES = 10  # that are kept; the first cause always is

Handed = TypeVar("Handed")


class Disconnected(Interruption):
    """The connection is over.

    Attributes:
        code: the peer's close code; 1005 if it sent none, 1006 if it went without a close frame, else why we closed.
        reason: the text that came with it.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}".strip())
        self.code = code
        self.reason = reason


class Traffic(NamedTuple):
    """The traffic since the handshake: bytes, and the codes of the close frames, None where there was no such frame."""

    bytes_received: int
    bytes_sent: int
    close_received: int | None
    close_sent: int | None


class Transport(Protocol):
    """The carrier of a connection. It calls `deliver`, `end` and `fail` of the connection."""

    def start(self, connection: Connection) -> None:
        """Deliver from now on what the peer sends."""

    def idle(self) -> Awaitable[None] | None:
        """The connection has used all that was delivered: send what waits, read on.

        Returns an awaitable if the receiving task is to read itself: that delivers or ends, at most once.
        Raises `trio.BusyResourceError` if another task reads.
        """

    def send(self, payloads: Sequence[bytes], *, text: bool, more: bool) -> bool:
        """Send messages and return True, or if there is no room send nothing and return False.

        `Prepared` payloads may be sent as they were framed for another connection.

        `more`: the connection still has messages to receive, so that more answers are likely to follow at once.

        Raises:
            trio.BrokenResourceError: the peer cannot be reached any more.
        """

    def send_fragment(self, payload: bytes, *, text: bool | None, last: bool) -> bool:
        """Send one frame of a fragmented message, like `send`. `text` is None behind the first (RFC 6455 §5.4)."""

    def limit_messages(self, max_bytes: int) -> None:
        """Refuse longer messages with 1009 from now on, also one that has begun to arrive."""

    def broadcast(self, message: Prepared) -> bool:
        """Send a message without waiting; False, and nothing is sent, if too much waits for the peer already."""

    async def room(self) -> None:
        """Wait until there may be room, as one task at a time does. Cancelling it ends only the waiting."""

    async def ping(self) -> float:
        """Ping the peer and return how many seconds its answer took.

        Raises trio.BrokenResourceError if the connection ends first, and NotImplementedError if the transport shows no
        pongs. Cancelling it ends only the waiting.
        """

    async def close(self, close: Close) -> None:
        """Finish what is on its way and do the closing handshake. If cancelled, whatever is unsent stays so."""

    async def flushed(self) -> None:
        """Wait until the kernel has all that was sent, or nothing can be sent. Cancelling it ends only the waiting."""

    def waiting(self) -> int:
        """Return how many bytes the peer's kernel has not confirmed; 0 if the connection is lost."""

    def taken(self) -> object:
        """Return a value that changes when the peer's kernel has confirmed more of what was sent."""

    def abort(self, close: Close | None = None) -> None:
        """Close the socket at once, behind a close frame if there is room for it. Never blocks; may be called again."""

    def traffic(self) -> Traffic:
        """Return the traffic up to now."""

    def keep_alive(self, now: float, blocked: float) -> None:
        """Called now and then: see whether the peer is still there, and give up one that is not or takes nothing.

        `blocked` is for how many seconds since the last call the loop stood still, which is not the peer's fault.
        """

    def failed(self, error: Exception) -> None:
        """There is a bug, or no memory: it ends this connection and nothing else."""


class Connection:
    """One connection, as its host sees it. A handler has a `tricorn.WebSocket` that stands before it.

    Attributes:
        id: a text that tells this connection from others in reports.
        request: the request that was upgraded.
        transport: the carrier.
        context: what every record about the connection has in its `context`; the program's own.
        nursery: the connection's nursery, from `run` on.
        inbox: the messages that were delivered and not received yet, the last first.
        receiver: the task that waits for one.
        cause: why the connection ends, once that is certain.
        over: nothing more can be received or sent.
        patience: when the tasks must have ended, once there is a cause, in Trio's time.
        phase: where the connection is in its life.
    """

    __slots__ = (
        "_began",
        "_close_timeout",
        "_ended",
        "_ending_since",
        "_error_id",
        "_flushes",
        "_flushing",
        "_fragmenting",
        "_in_vain",
        "_later_causes",
        "_metrics",
        "_reaper",
        "_received",
        "_reported",
        "_sent",
        "_stall_timeout",
        "_stalled",
        "_turn",
        "cause",
        "context",
        "id",
        "inbox",
        "nursery",
        "over",
        "patience",
        "phase",
        "receiver",
        "request",
        "transport",
    )

    nursery: trio.Nursery

    def __init__(
        self, transport: Transport, request: Request, settings: Settings, metrics: ServerMetrics, reaper: Reaper
    ) -> None:
        self.id = token_hex(6)
        self.request = request
        self.transport = transport
        self.context: dict[Any, object] | None = None
        self.inbox: list[Message] = []
        self.receiver = Waiter()
        self.cause: Close | None = None
        self.over = False
        self.phase = Phase.ACCEPTED
        self.patience = inf
        self._close_timeout = settings.close_timeout
        self._stall_timeout = settings.stall_timeout
        self._metrics = metrics
        self._reaper = reaper
        self._in_vain = 0  # messages sent to a peer that is gone, before the handler is told
        self._flushes = False  # what is unsent goes out before the close frame
        self._flushing: CancelScope | None = None
        self._stalled: CancelScope | None = None  # of the task that waits for room
        self._turn: StrictFIFOLock | None = None  # of the tasks that send, as soon as one had to wait
        self._fragmenting = False  # who has the turn sends a fragmented message
        self._ended: Event | None = None  # if somebody waits for it
        # For the record of its end.
        self._began = self._ending_since = current_time()
        self._received = self._sent = 0
        self._later_causes: list[str] | None = None
        self._error_id: str | None = None
        self._reported: Exception | None = None  # what a handler raises again

    # For the host

    async def run(self, handler: Callable[[Handed], Awaitable[None]], websocket: Handed) -> BaseException | None:
        """Run the connection from the handler's first step to the closed socket.

        Returns the exceptions of the handler's nursery, which have been reported. Raises only cancellations and
        KeyboardInterrupt. If cancelled, the connection closes with 1012, within `close_timeout`.
        """
        failure = through = None
        try:
            self.phase = move(self.phase, Phase.OPEN)
        except IllegalMove as error:
            self._report(error)
            return None
        self._metrics.opened.add()
        try:
            try:
                async with trio.open_nursery() as self.nursery:
                    if self.cause is not None:  # the end came before the handler
                        self.stop()
                    self.transport.start(self)
                    try:
                        await handler(websocket)
                    except BaseException as error:  # noqa: ASYNC103 - the nursery's scope takes cancellations
                        failure = self._hidden(error)
                        raise
                    if self.cause is None:
                        self._end(Close(NORMAL))
                        self._flushes = True
                    self.stop()
            except BaseException as error:  # noqa: ASYNC103 - what has to go on is raised again
                failure = self._failed(error) or failure
                through = passing(error)
            if through is not None:
                forget_contexts(through)  # they have been reported, and are not below what goes on
                raise through
        finally:
            through = None  # its traceback has this frame: the garbage collector need not free it
            await self._tear_down()
        return failure

    def cancel(self) -> None:
        """Close the connection with 1012, within `close_timeout`, as cancelling what is around it does."""
        self._end(Close(SERVICE_RESTART))
        self._flushes = False
        if self._flushing is not None:
            self._flushing.cancel()
        else:
            self.stop()

    def give_up(self) -> None:
        """Close the socket though the tasks have not ended, and report where they are."""
        if self.phase not in (Phase.ACCEPTED, Phase.OPEN):
            return
        self.transport.abort(self.cause)
        report(
            "ERROR",
            "a connection's tasks do not end when they are cancelled; its socket was closed",
            context=self.context,
            **self._about(),
            seconds=round(current_time() - self._ending_since, 3),
            tasks=tuple(stuck(self.nursery.parent_task)),
        )

    def totals(self) -> Totals:
        """Return the traffic so far."""
        traffic = self.transport.traffic()
        return Totals(self._received, self._sent, traffic.bytes_received, traffic.bytes_sent)

    # For the transport

    def deliver(self, messages: list[Message]) -> bool:
        """Take messages from the peer, and the list that they are in; say whether the handler is behind with them."""
        self._received += len(messages)
        messages.reverse()
        self.inbox = messages + self.inbox if self.inbox else messages
        self.receiver.wake()
        return bool(messages)

    def end(self, cause: Close) -> None:
        """The peer is gone or to be got rid of.

        A handler that waits for the peer is told. One that has something to receive is told behind that. Both have
        `close_timeout`; one that is busy elsewhere is cancelled.
        """
        waits = self.receiver.waiting is not None
        sends = self._in_vain > 0 or (self._turn is not None and self._turn.locked())
        if not self._end(cause):
            return
        self.receiver.wake()
        if self._stalled is not None and not self.inbox:
            self._stalled.cancel()
        if waits or sends or self.inbox:
            self._bound_tasks()
        else:
            self.stop()

    def fail(self, error: Exception) -> None:
        """Report a bug, or that there is no memory, and end this connection and nothing else."""
        self.end(self._report(error))

    # For the WebSocket

    def stop(self) -> None:
        """Cancel the nursery: there is nothing more to receive."""
        self.over = True
        if self.phase is not Phase.ACCEPTED:
            self.nursery.cancel_scope.cancel()

    def tell(self) -> None:
        """The handler gets to know that the connection is over: it has `close_timeout` from now on."""
        if not self.over:
            self.over = True
            self._bound_tasks()

    def _bound_tasks(self) -> None:
        self.patience = current_time() + self._close_timeout
        if self.phase is not Phase.ACCEPTED:
            self.nursery.cancel_scope.deadline = self.patience

    async def watch(self, task: Awaitable[object]) -> None:
        """Await what a task of the nursery does, and report an error that its cancellation hides (E9)."""
        try:
            await task
        except BaseException as error:
            self._hidden(error)
            raise

    async def close(self, cause: Close) -> None:
        """Close the connection unless it is ending already, and wait until it is closed."""
        self._metrics.know_code(cause.code)
        if self._end(cause):
            self._flushes = True
        self.stop()
        if self._ended is None:
            self._ended = Event()
            if self.phase is Phase.CLOSED:
                self._ended.set()
        await self._ended.wait()

    def put(self, payloads: Sequence[bytes], text: bool, *, in_turn: bool = False) -> bool:
        """Send messages if there is room for them, and say whether there was. Raises Disconnected.

        Without `in_turn` there is no room while other tasks wait for some, or send a fragmented message.
        """
        if self.over:
            self.require_open()
        if self._turn is not None and not in_turn and self._turn.locked():
            return False
        more = True if self.inbox else False  # noqa: SIM210 (a call for each message costs more)
        try:
            if not self.transport.send(payloads, text=text, more=more):
                return False
        except trio.BrokenResourceError:
            return self._sent_in_vain()
        self._sent += len(payloads)
        return True

    async def put_in_turn(self, payloads: Sequence[bytes], text: bool) -> None:
        """Send messages when those that wait already are on their way and there is room. Raises Disconnected.

        If cancelled, nothing was sent.
        """
        if not self._fragmenting:
            self._metrics.send_stalls.add()
        async with self._turns():
            while not self.put(payloads, text, in_turn=True):
                await self.room()

    async def room(self) -> None:
        """Wait until there may be room. Raises Disconnected if the connection ends with nothing to receive."""
        with CancelScope() as self._stalled:
            await self.transport.room()
        if self._stalled.cancelled_caught and self.cause is not None:
            self.tell()
            raise Disconnected(*self.cause)

    async def begin_fragments(self) -> None:
        """Wait for the turn, and have no other message between the fragments that follow. Raises Disconnected."""
        self.require_open()
        await self._turns().acquire()
        self._fragmenting = True

    def put_fragment(self, payload: bytes, *, text: bool | None, last: bool) -> bool:
        """Send a fragment if there is room for it, and say whether there was. Raises Disconnected."""
        self.require_open()
        try:
            sent = self.transport.send_fragment(payload, text=text, last=last)
        except trio.BrokenResourceError:
            return self._sent_in_vain()
        self._sent += sent and last
        return sent

    def _sent_in_vain(self) -> bool:
        """Raise Disconnected, but not before it is certain why, and all that came before was received.

        A handler that sends on and on and receives nothing is told as well.
        """
        self._in_vain += 1
        if self.cause is None or (self.inbox and self._in_vain < IN_VAIN_MAX):
            return True
        self.tell()
        raise Disconnected(*self.cause)

    def end_fragments(self, error: BaseException | None) -> None:
        """Let others send again; an error that left the message incomplete ends the connection."""
        self._fragmenting = False
        self._turns().release()
        if error is None or isinstance(error, Disconnected):
            return
        if isinstance(error, Exception):
            self._reported = error
            self._end(self._report(error))
        else:
            self._end(Close(INTERNAL_ERROR, "a fragmented message was not finished"))
        self.stop()

    def broadcast(self, message: Prepared) -> bool:
        """Send a message unless that needs waiting, and say whether it does not. One that ends gets nothing."""
        if self.over or self.cause is not None:
            return True
        if self._fragmenting:
            return False
        try:
            sent = self.transport.broadcast(message)
        except trio.BrokenResourceError:
            return True
        self._sent += sent
        return sent

    def require_open(self) -> None:
        """Raise Disconnected if the connection is over."""
        if self.over and self.cause is not None:
            raise Disconnected(*self.cause)

    def _turns(self) -> StrictFIFOLock:
        if self._turn is None:
            self._turn = StrictFIFOLock()
        return self._turn

    # How it ends

    def _end(self, cause: Close) -> bool:
        """Keep the first cause, and the others as notes on it; say whether this is the first."""
        if self.cause is not None:
            # In the closing handshake nothing new comes: what the peer does then shows in the codes.
            if self.phase is Phase.OPEN:
                self._later_causes = self._later_causes or []
                if len(self._later_causes) < LATER_CAUSES:
                    self._later_causes.append(f"{cause.code} {cause.reason}".rstrip())
            return False
        self.cause = cause
        self._ending_since = current_time()
        self.patience = self._ending_since + self._close_timeout
        self._reaper.watch(self)
        return True

    def _failed(self, error: BaseException) -> BaseException | None:
        """Report all that is not the consequence of the connection's end, and return it."""
        reported, self._reported = self._reported, None
        expected = PASSING if self.cause is None else (*PASSING, Disconnected)
        failures = [leaf for leaf in leaves(error) if not is_any(leaf, expected)]
        if not failures and not hides_an_error(error):
            return None
        new = [leaf for leaf in failures or [first_of(in_order(error))] if leaf is not reported]
        if new and self._end(self._report(error)):
            self._flushes = True
        return error

    def _hidden(self, error: BaseException) -> BaseException | None:
        """Report the error below what only ends a task, for Trio's nursery takes both (E9). Return what is reported."""
        return self._failed(error) if all(isinstance(leaf, PASSING) for leaf in leaves(error)) else None

    def _report(self, error: BaseException) -> Close:
        code = None if self.cause is None else self.cause.code
        error_id = report_error(error, context=self.context, **self._about(), phase=self.phase.value, code=code)
        if self._error_id is None:
            self._error_id = error_id
        return Close(INTERNAL_ERROR, error_id)

    def _about(self) -> dict[str, Any]:
        """What every record about the connection says of it."""
        request = self.request
        return {
            "connection": self.id,
            "peer": request.peer,
            "path": request.path,
            "trace": trace_id(request.headers),
        }

    def _move(self, to: Phase) -> None:
        """Go on to `to`. If that is refused it is a bug of ours, but no reason to stop tearing down."""
        try:
            self.phase = move(self.phase, to)
        except IllegalMove as error:
            self._report(error)
            self.phase = to

    async def _tear_down(self) -> None:
        cause = self.cause
        if cause is None:
            # What is around the connection was cancelled, or else the handler has cancelled its own nursery.
            cause = Close(SERVICE_RESTART if current_effective_deadline() == -inf else NORMAL)
            self._end(cause)
        self.over = True
        self._reaper.forget(self)
        reached = self.phase
        self._move(Phase.CLOSING)
        self.inbox.clear()
        try:
            try:
                if self._flushes:
                    await self._flush()
            finally:
                with move_on_after(self._close_timeout, shield=True):
                    await self.transport.close(cause)
        except Exception as error:
            self._report(error)
        finally:
            self.transport.abort()
            self.receiver.wake()  # a task that is not the connection's own
            self._move(Phase.CLOSED)
            if self._ended is not None:
                self._ended.set()
            self._metrics.count_end(self, cause.code, current_time() - self._ending_since)
            self._record_end(cause, reached)

    async def _flush(self) -> None:
        """Have the peer take what it was sent, as long as it takes some of it in every `stall_timeout`.

        May be cancelled. A little of it may be on its way when this returns: as much as the time for the closing
        handshake is enough for.
        """
        transport, pause = self.transport, FIRST_PAUSE
        with CancelScope() as self._flushing:
            taken, since = transport.taken(), current_time()
            while (waiting := transport.waiting()) and current_time() - since < self._stall_timeout:
                with move_on_after(pause):
                    await transport.flushed()
                    if waiting <= LITTLE:
                        break
                    await sleep(pause)  # the kernel does not tell when the peer has confirmed
                pause = min(2 * pause, LONGEST_PAUSE)
                if transport.taken() != taken:
                    taken, since = transport.taken(), current_time()
        self._flushing = None

    def _record_end(self, cause: Close, reached: Phase) -> None:
        report(
            "WARNING" if cause.code in FAULTS else "INFO",
            "connection closed",
            context=self.context,
            **self._about(),
            phase=reached.value,
            code=cause.code,
            reason=cause.reason,
            notes="; ".join(self._later_causes or ()) or None,
            seconds=round(current_time() - self._began, 3),
            messages_received=self._received,
            messages_sent=self._sent,
            **self.transport.traffic()._asdict(),
            error_id=self._error_id,
        )
