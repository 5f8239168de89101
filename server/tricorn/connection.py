"""One connection: its nursery, what it receives and sends, and how it ends."""

from __future__ import annotations

from math import inf
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import trio
from outcome import Outcome
from trio import Event, current_effective_deadline, current_time, move_on_after
from trio.lowlevel import (
    Abort,
    checkpoint,
    checkpoint_if_cancelled,
    current_task,
    reschedule,
    wait_task_rescheduled,
)

from tricorn.errors.report import report, report_error, trace_id
from tricorn.metrics import CONNECTIONS, TEARDOWN_SECONDS, Totals
from tricorn.protocol.close import FAULTS, INTERNAL_ERROR, NORMAL, SERVICE_RESTART, Close, may_be_sent
from tricorn.protocol.phase import IllegalMove, Phase, move

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping, Sequence

    Handler = Callable[["WebSocket"], Awaitable[None]]

Message = str | bytes  # text or binary, RFC 6455 §5.6


class Woken(Outcome[None]):
    """What a task is rescheduled with that only waits to go on: `outcome.Value(None)`, for any number of times."""

    __slots__ = ()

    def unwrap(self) -> None: ...

    def send(self, gen: Generator[Any, None, object]) -> Any:
        return gen.send(None)

    async def asend(self, agen: AsyncGenerator[Any, None]) -> Any:
        return await agen.asend(None)


WOKEN = Woken()  # one for each wake-up would be a tenth of what an echo costs in Python

LATER_CAUSES = 10  # that are kept; the first cause always is


class Disconnected(Exception):
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
    """What went over the wire since the handshake: bytes, and the codes of the close frames, None where none went."""

    bytes_received: int
    bytes_sent: int
    close_received: int | None
    close_sent: int | None


class Transport(Protocol):
    """What a connection needs of its host. The host calls `deliver`, `end` and `fail` of the connection."""

    def start(self, connection: WebSocket) -> None:
        """Deliver from now on what the peer sends."""

    def idle(self) -> Awaitable[None] | None:
        """The connection has used all that was delivered: send what waits, read on.

        Returns what the receiving task has to await where it is to read itself: that delivers or ends, at most once.
        Raises `trio.BusyResourceError` where another task does so.
        """

    def send(self, payloads: Sequence[bytes], *, text: bool) -> bool:
        """Send messages, and return True; where there is no room, send nothing and return False.

        Raises:
            trio.BrokenResourceError: the peer cannot be reached any more.
        """

    async def room(self) -> None:
        """Wait until there may be room. Cancelling it ends only the waiting."""

    async def close(self, close: Close) -> None:
        """Finish what is on its way and do the closing handshake. If cancelled, whatever is unsent stays so."""

    def abort(self) -> None:
        """Close the socket at once. Never blocks, and may be called again."""

    def traffic(self) -> Traffic:
        """What went over the wire up to now."""


class Kept(Transport, Protocol):
    """A transport, as a server sees it."""

    def keep_alive(self, now: float) -> None:
        """Called now and then: see whether the peer is still there, and give up one that is not or takes nothing."""

    def failed(self, error: Exception) -> None:
        """A bug, or no memory: it ends this connection and nothing else."""


class Cancellable(Protocol):
    """What can be cancelled: a connection, or a scope."""

    def cancel(self) -> None: ...


class WebSocket:
    """One connection, as its handler sees it.

    The handler runs in the connection's own nursery. It is cancelled when the peer is gone, but never before it
    received what the peer had sent. When it returns the connection closes with 1000; when it raises, with 1011 and an
    error id as reason.

    Attributes:
        nursery: the connection's nursery: what is started there ends with the connection.
        id: a text that tells this connection from others in reports.
        peer: the peer's address: host and port.
        path: the request's path, decoded; `query`: what stood behind its `?`, as it came.
        headers: the request's headers, names in lower case.
        subprotocol: the one agreed on, or None.
        context: put in what every record about the connection should say, for example who the user is.
    """

    nursery: trio.Nursery

    def __init__(
        self,
        transport: Transport,
        *,
        peer: tuple[str, int],
        path: str,
        query: str,
        headers: Mapping[str, str],
        subprotocol: str | None,
        close_timeout: float,
    ) -> None:
        self.id = token_hex(6)
        self.peer = peer
        self.path = path
        self.query = query
        self.headers = headers
        self.subprotocol = subprotocol
        self.context: dict[Any, object] = {}
        self._known: dict[str, Any] = {"connection": self.id, "peer": peer, "path": path, "trace": trace_id(headers)}
        self.inbox: list[Message] = []  # what was delivered and not received yet, the last first
        self._transport = transport
        self._close_timeout = close_timeout
        self._phase = Phase.ACCEPTED
        self._receiver: trio.lowlevel.Task | None = None
        self._paid = False  # the next send is no checkpoint: the receive before it was one
        self._cause: Close | None = None
        self._due: Close | None = None  # the cause, if the deadline of the nursery's scope passes
        self._over = False  # nothing more to receive, nothing more may be sent
        self._closed: Event | None = None  # where somebody waits for it
        # For the record of its end.
        self._began = self._ending_since = current_time()
        self._received = self._sent = 0
        self._later_causes: list[str] = []
        self._error_id: str | None = None

    def __repr__(self) -> str:
        return f"<WebSocket {self.id} {self.path} of {self.peer[0]}:{self.peer[1]}, {self._phase.value}>"

    # For handlers

    async def receive(self) -> Message:
        """Return the next message: str for text, bytes for binary.

        Checks for cancellation always, and yields if it has to wait. If cancelled, no message is lost.

        Raises:
            Disconnected: the connection is over and all that came before was received.
            trio.BusyResourceError: another task is receiving.
        """
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            assert self._cause is not None  # noqa: S101
            raise Disconnected(*self._cause) from None

    async def send(self, message: Message) -> None:
        """Send a message: str as text, bytes as binary. Waits while the peer does not keep up.

        A checkpoint, but for the first send behind a receive, which was one. If cancelled, nothing of the message was
        sent; once begun, a message is sent whole or the connection is aborted.

        Raises:
            Disconnected: the connection is over.
            TypeError: the message is neither str nor bytes.
        """
        if isinstance(message, str):
            payloads, text = (message.encode(),), True
        elif isinstance(message, bytes | bytearray | memoryview):
            payloads, text = (bytes(message),), False
        else:
            raise TypeError(f"a message is str or bytes, not {type(message).__name__}")
        if self._paid:
            self._paid = False
        else:
            await checkpoint()
        while not self._put(payloads, text):
            await self._transport.room()

    async def send_text(self, payloads: Iterable[bytes]) -> None:
        """Send texts that are UTF-8 already, each as one message, all in one write. Otherwise like `send`."""
        whole = list(payloads)
        if self._paid:
            self._paid = False
        else:
            await checkpoint()
        while not self._put(whole, True):
            await self._transport.room()

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Close the connection, once and for all: the first cause counts. Cancels the connection's nursery.

        Returns when the connection is closed. In a task of the connection itself it therefore does not return: it
        raises `Cancelled`. If cancelled, the connection closes all the same.

        Raises:
            ValueError: the code may not be sent (RFC 6455 §7.4), or the reason has more than 123 bytes.
        """
        self._end(_close(code, reason))
        self._stop()
        if self._closed is None:
            self._closed = Event()
            if self._phase is Phase.CLOSED:
                self._closed.set()
        await self._closed.wait()

    def close_at(self, deadline: float, code: int, reason: str = "") -> None:
        """Close the connection at `deadline`, in Trio's time; what this was told before is forgotten, `inf` is never.

        Not a checkpoint. Does nothing where the connection is ending already. Raises ValueError like `close`.
        """
        due = _close(code, reason)
        if self._cause is None:
            self._due = due
            self.nursery.cancel_scope.deadline = deadline

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        """The next message, as `receive` gives it. Iteration ends when the connection is over."""
        if self.inbox or self._cause is not None:
            await checkpoint_if_cancelled()
        while not self.inbox:
            if self._cause is not None:
                self._stop()
                raise StopAsyncIteration
            if self._receiver is not None:
                raise trio.BusyResourceError("another task is receiving from this connection")
            reading = self._transport.idle()
            if reading is None:
                self._receiver = current_task()
                await wait_task_rescheduled(self._stop_waiting)
            else:
                await reading
        self._paid = True
        return self.inbox.pop()

    # For hosts

    async def run(self, handler: Handler) -> None:
        """Run the connection from the handler's first step to the closed socket. Raises only what is not an Exception.

        If cancelled, the connection closes with 1012, within `close_timeout`.
        """
        CONNECTIONS.opened(self)
        try:
            async with trio.open_nursery() as self.nursery:
                self._phase = move(self._phase, Phase.OPEN)
                self._transport.start(self)
                await handler(self)
                if self._cause is None:
                    self._end(Close(NORMAL))
                self._stop()
        except* Exception as errors:
            self._failed(errors)
        finally:
            await self._tear_down()

    def deliver(self, messages: list[Message]) -> None:
        """Take messages from the peer, and the list that they are in."""
        self._received += len(messages)
        messages.reverse()
        self.inbox = messages + self.inbox if self.inbox else messages
        self._wake_receiver()

    def end(self, cause: Close) -> None:
        """The peer is gone or to be got rid of.

        The handler is cancelled once it has received what came before, but within `close_timeout`.
        """
        if not self._end(cause):
            return
        self._wake_receiver()  # first, so that it gets to know why
        if self.inbox:
            scope = self.nursery.cancel_scope
            scope.deadline = min(scope.deadline, current_time() + self._close_timeout)
        else:
            self._stop()

    def cancel(self) -> None:
        """Close it with 1012, as cancelling what is around it does."""
        self._end(Close(SERVICE_RESTART))
        self._stop()

    def fail(self, error: Exception) -> None:
        """A bug, or no memory: it is reported, and ends this connection and nothing else."""
        self.end(self._report(error))

    # For metrics

    @property
    def phase(self) -> Phase:
        """Where it is in its life."""
        return self._phase

    def totals(self) -> Totals:
        """What went over it so far."""
        traffic = self._transport.traffic()
        return Totals(self._received, self._sent, traffic.bytes_received, traffic.bytes_sent)

    # How it ends

    def _end(self, cause: Close) -> bool:
        """Keep the first cause, and the others as notes on it; say whether this is the first."""
        if self._cause is not None:
            # In the closing handshake nothing new comes: what the peer does then shows in the codes.
            if self._phase is Phase.OPEN and len(self._later_causes) < LATER_CAUSES:
                self._later_causes.append(f"{cause.code} {cause.reason}".rstrip())
            return False
        self._cause = cause
        self._ending_since = current_time()
        return True

    def _wake_receiver(self) -> None:
        if self._receiver is not None:
            reschedule(self._receiver, WOKEN)
            self._receiver = None

    def _stop(self) -> None:
        self._over = True
        self.nursery.cancel_scope.cancel()

    def _look_at_deadline(self) -> None:
        if self._due is not None and self.nursery.cancel_scope.deadline <= current_time():
            self._end(self._due)

    def _failed(self, errors: BaseExceptionGroup[BaseException]) -> None:
        self._look_at_deadline()
        rest = errors.split(Disconnected)[1] if self._cause is not None else errors
        if rest is not None:
            self._end(self._report(rest))

    def _report(self, error: BaseException) -> Close:
        code = None if self._cause is None else self._cause.code
        error_id = report_error(error, context=self.context, **self._known, phase=self._phase.value, code=code)
        if self._error_id is None:
            self._error_id = error_id
        return Close(INTERNAL_ERROR, error_id)

    def _move(self, to: Phase) -> None:
        """Go on to `to`. Where that is refused it is a bug of ours, but no reason to stop tearing down."""
        try:
            self._phase = move(self._phase, to)
        except IllegalMove as error:
            self._report(error)
            self._phase = to

    async def _tear_down(self) -> None:
        self._look_at_deadline()
        cause = self._cause
        if cause is None:
            # What is around the connection was cancelled, or else the handler has cancelled its own nursery.
            cause = Close(SERVICE_RESTART if current_effective_deadline() == -inf else NORMAL)
            self._end(cause)
        self._over = True
        reached = self._phase
        self._move(Phase.CLOSING)
        self.inbox.clear()
        try:
            with move_on_after(self._close_timeout, shield=True):
                await self._transport.close(cause)
        except Exception as error:
            self._report(error)
        finally:
            self._transport.abort()
            self._wake_receiver()  # a task that is not the connection's own
            self._move(Phase.CLOSED)
            if self._closed is not None:
                self._closed.set()
            CONNECTIONS.closed(self, cause.code)
            TEARDOWN_SECONDS.observe(current_time() - self._ending_since)
            self._record_end(cause, reached)

    def _record_end(self, cause: Close, reached: Phase) -> None:
        report(
            "WARNING" if cause.code in FAULTS else "INFO",
            "connection closed",
            context=self.context,
            **self._known,
            phase=reached.value,
            code=cause.code,
            reason=cause.reason,
            notes="; ".join(self._later_causes) or None,
            seconds=round(current_time() - self._began, 3),
            messages_received=self._received,
            messages_sent=self._sent,
            **self._transport.traffic()._asdict(),
            error_id=self._error_id,
        )

    # Inside

    def _put(self, payloads: Sequence[bytes], text: bool) -> bool:
        """Have messages sent if there is room for them, and say whether there was."""
        if self._over and self._cause is not None:
            raise Disconnected(*self._cause)
        try:
            if not self._transport.send(payloads, text=text):
                return False
        except trio.BrokenResourceError:
            return True  # no error yet: something that came before may still be worth receiving
        self._sent += len(payloads)
        return True

    def _stop_waiting(self, _: object) -> Abort:
        self._receiver = None
        return Abort.SUCCEEDED


def _close(code: int, reason: str) -> Close:
    if not may_be_sent(code):
        raise ValueError(f"close code {code} may not be sent; 1000 and 3000 to 4999 are for applications")
    if len(reason.encode()) > 123:
        raise ValueError("a close reason may have at most 123 bytes in UTF-8")
    return Close(code, reason)
