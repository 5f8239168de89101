"""What a handler holds: one WebSocket, and the message that goes to many of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from inspect import iscoroutine
from typing import TYPE_CHECKING, Any, Generic, Self, cast

import trio
from trio import current_time
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from tricorn.connection import Disconnected
from tricorn.protocol.close import NORMAL, Close, may_be_sent
from tricorn.protocol.prepared import Prepared

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    from tricorn.connection import Connection
    from tricorn.protocol.receiver import Message
    from tricorn.request import Accept, Request

    State = TypeVar("State", default=Any)
else:
    from typing import TypeVar

    State = TypeVar("State")  # its default (PEP 696) is for type checkers: a plain `WebSocket` has any state


class WebSocket(Generic[State]):
    """One connection, as its handler sees it.

    The handler runs in the connection's own nursery, in a context of its own. When it returns, everything that it sent
    goes out, for as long as the peer takes some of it in every `stall_timeout` seconds, and the connection closes with
    1000; when it raises, with 1011 and an error id as the reason.

    When the peer is gone, the handler first receives what the peer had sent. Once it has been told, because its
    iteration ended or a method raised `Disconnected`, it has `close_timeout` seconds to finish, and may await anything
    meanwhile. A handler that is busy elsewhere is cancelled.

    Attributes:
        state: what the hook before the upgrade has put into its `Accept`, else None.
        subprotocol: the subprotocol agreed on, or None.
    """

    __slots__ = ("__weakref__", "_connection", "_in_a_row", "_row", "_since", "_yielded", "state", "subprotocol")

    def __init__(self, connection: Connection, accepted: Accept) -> None:
        self.state: State = accepted.state
        self.subprotocol = accepted.subprotocol
        self._connection = connection
        self._in_a_row = self._row = FIRST_IN_A_ROW  # how many more may be received without a turn for others
        self._since = 0.0  # when others had their turn
        self._yielded = False  # others had their turn since the last send: the receive before it was a checkpoint

    def __repr__(self) -> str:
        connection = self._connection
        return f"<WebSocket {connection.id} {connection.request.path} of {self._peer()}, {connection.phase.value}>"

    @property
    def id(self) -> str:
        """A text that tells this connection from others in reports."""
        return self._connection.id

    @property
    def request(self) -> Request:
        """The request that was upgraded: path, query, headers, peer."""
        return self._connection.request

    @property
    def nursery(self) -> trio.Nursery:
        """The connection's nursery: what you start there ends with the connection.

        It does all that a `trio.Nursery` does. An error that one of its tasks was handling when the end of the
        connection cancelled it is reported.
        """
        return cast("trio.Nursery", TaskNursery(self._connection))

    @property
    def context(self) -> dict[Any, object]:
        """What you want in every record about this connection, for example who the user is."""
        if self._connection.context is None:
            self._connection.context = {}
        return self._connection.context

    @property
    def closed(self) -> Close | None:
        """The close code and the reason once the connection is over, until then None."""
        return self._connection.cause if self._connection.over else None

    def limit_messages(self, max_bytes: int) -> None:
        """Limit each message from the client to `max_bytes` from now on. A longer one is refused with 1009.

        Call this before you know who the client is, with the size of its first message, and again afterwards. Until
        you call it, the limit is `Settings.max_message_bytes`.
        """
        self._connection.transport.limit_messages(max_bytes)

    async def receive(self) -> Message:
        """Return the next message: str for text, bytes for binary.

        Checks for cancellation always. Yields if it has to wait, and else after 16 messages, or fewer if you take a
        millisecond or more for each: others wait a few milliseconds, or for one message. If cancelled, no message is
        lost.

        Raises:
            Disconnected: the connection is over and all that came before was received.
            trio.BusyResourceError: another task is receiving.
        """
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            pass  # raised below, Disconnected has only what the handler is handling as its context
        assert self._connection.cause is not None  # noqa: S101
        raise Disconnected(*self._connection.cause)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        """Return the next message, as `receive` does. Iteration ends when the connection is over."""
        connection = self._connection
        if connection.inbox and self._row:
            self._row -= 1
            await checkpoint_if_cancelled()
        elif connection.inbox or connection.cause is not None:
            await self._let_others_run()
        while not connection.inbox:
            if connection.cause is not None:
                connection.tell()
                raise StopAsyncIteration
            if connection.receiver.waiting is not None:
                raise trio.BusyResourceError("another task is receiving from this connection")
            reading = connection.transport.idle()
            self._row = self._in_a_row
            if reading is None:
                await connection.receiver.wait()
            else:
                await reading
        self._yielded = True
        return connection.inbox.pop()

    async def send(self, message: Message | Iterable[Message]) -> None:
        """Send a message: str as text, bytes as binary, an iterable of either as one fragmented message.

        Waits while the peer does not keep up. Checks for cancellation always, and yields unless the message answers one
        that was received. If cancelled, nothing of a str or bytes was sent. A message once begun is sent whole, or the
        connection ends: a fragmented message that is cancelled, or whose iterable raises, after its first fragment ends
        it with 1011. The iterable is asked for a fragment before the one in front of it is sent, and an empty one sends
        nothing. Other messages wait until a fragmented one is complete.

        Raises:
            Disconnected: the connection is over.
            TypeError: the message, or a fragment, is neither str nor bytes, or fragments are of both kinds.
        """
        if isinstance(message, str):
            payload, text = message.encode(), True
        elif isinstance(message, bytes | bytearray | memoryview):
            payload, text = bytes(message), False
        elif isinstance(message, Iterable):
            await self._send_fragments(message)
            return
        else:
            raise TypeError(f"a message is str or bytes, or an iterable of either, not {type(message).__name__}")
        if self._yielded:
            self._yielded = False
            await checkpoint_if_cancelled()
        else:
            await checkpoint()
        connection = self._connection
        if not connection.put((payload,), text):
            await connection.put_in_turn((payload,), text)

    async def send_texts(self, payloads: Iterable[bytes]) -> None:
        """Send texts that are UTF-8 already, each as one message, all in one write. Otherwise like `send`."""
        whole = list(payloads)
        if self._yielded:
            self._yielded = False
            await checkpoint_if_cancelled()
        else:
            await checkpoint()
        connection = self._connection
        if not connection.put(whole, True):
            await connection.put_in_turn(whole, True)

    def send_texts_nowait(self, payloads: Sequence[bytes]) -> None:
        """Do what `send_texts` does, without its checkpoint. Raises trio.WouldBlock if it would have to wait.

        `Prepared` payloads are framed once for all connections that you send them on.
        """
        if not self._connection.put(payloads, True):
            raise trio.WouldBlock

    async def ping(self) -> float:
        """Ping the peer and return the latency: the seconds until its pong (RFC 6455 §5.5.2).

        If cancelled, the answer is ignored. You need no ping to keep a connection alive: the server sends its own. Go
        on receiving meanwhile, in another task: behind 64 KiB of messages that you have not received no pong is read.

        Raises:
            Disconnected: the connection is over, or ended before the pong came.
            NotImplementedError: this is plain Hypercorn, which shows no pongs.
        """
        await checkpoint_if_cancelled()
        self._connection.require_open()
        try:
            return await self._connection.transport.ping()
        except trio.BrokenResourceError:
            pass
        raise Disconnected(*(self._connection.cause or ABORTED))

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Close the connection, once and for all: the first cause counts. Cancels the connection's nursery.

        Returns when the connection is closed. In a task of the connection itself it therefore does not return: it
        raises `Cancelled`. If cancelled, the connection closes all the same.

        Raises:
            ValueError: the code may not be sent (RFC 6455 §7.4), or the reason has more than 123 bytes.
        """
        if not may_be_sent(code):
            raise ValueError(f"close code {code} may not be sent; 1000 and 3000 to 4999 are for applications")
        if len(reason.encode()) > REASON_MAX:
            raise ValueError(f"a close reason may have at most {REASON_MAX} bytes in UTF-8")
        await self._connection.close(Close(code, reason))

    async def _let_others_run(self) -> None:
        """Yield. From then on receive as many in a row as the handler takes `TURN` for, at its pace up to now."""
        took = current_time() - self._since
        pace = IN_A_ROW if took <= 0 else int((self._in_a_row + 1) * TURN / took) - 1
        self._row = self._in_a_row = max(0, min(pace, IN_A_ROW))
        await checkpoint()
        self._since = current_time()

    async def _send_fragments(self, fragments: Iterable[Message]) -> None:
        iterator = iter(fragments)
        await checkpoint()
        following: object = next(iterator, _END)
        if following is _END:
            return
        connection = self._connection
        await connection.begin_fragments()
        text = isinstance(following, str)
        first: bool | None = text
        try:
            while following is not _END:
                payload = _payload(following, text=text)
                following = next(iterator, _END)
                while not connection.put_fragment(payload, text=first, last=following is _END):
                    await connection.room()
                first = None
                if following is not _END:
                    await checkpoint()
        except BaseException as error:
            connection.end_fragments(error if first is None else None)
            raise
        connection.end_fragments(None)

    def _peer(self) -> str:
        peer = self._connection.request.peer
        return "a Unix socket" if peer is None else f"{peer[0]}:{peer[1]}"


class TaskNursery:
    """A connection's nursery, whose tasks the connection watches. Trio's own would take their cancellations unseen."""

    __slots__ = ("_connection", "_nursery")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._nursery = connection.nursery

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nursery, name)

    def start_soon(self, async_fn: Callable[..., Awaitable[object]], *args: object, name: object = None) -> None:
        """Do what `trio.Nursery.start_soon` does."""
        self._nursery.start_soon(self._watched(async_fn), *args, name=name or async_fn)

    async def start(self, async_fn: Callable[..., Awaitable[object]], *args: object, name: object = None) -> Any:
        """Do what `trio.Nursery.start` does."""
        return await self._nursery.start(self._watched(async_fn), *args, name=name or async_fn)

    def _watched(self, async_fn: Callable[..., Awaitable[object]]) -> Callable[..., Any]:
        """Return a function whose coroutine is watched. What is none of both stays what it is, for Trio to refuse."""
        if not callable(async_fn):
            return async_fn
        connection = self._connection

        def watched(*args: object, **kwargs: object) -> object:
            made = async_fn(*args, **kwargs)
            return connection.watch(made) if iscoroutine(made) else made

        return watched


# Messages that are received without a turn for others: at most, while the handler's pace is unknown, and in seconds.
IN_A_ROW, FIRST_IN_A_ROW, TURN = 16, 4, 0.004
REASON_MAX = 123  # bytes, RFC 6455 §5.5.1
ABORTED = Close(1006)


_END = object()  # of an iterable


def _payload(fragment: object, *, text: bool) -> bytes:
    if isinstance(fragment, str):
        if text:
            return fragment.encode()
    elif not text and isinstance(fragment, bytes | bytearray | memoryview):
        return bytes(fragment)
    raise TypeError("the fragments of a message must all be str or all be bytes")


Handler = Callable[[WebSocket[Any]], Awaitable[None]]  # called with each connection


def broadcast(members: Iterable[WebSocket[Any]], message: Message) -> list[WebSocket[Any]]:
    """Send a message to many connections, and wait for none of them. Return the slow ones, which do not get it.

    A connection is slow if more than 1 MiB waits for its peer to read, or while it is sending a fragmented message.
    What to do about it is up to you: close it, or let it catch up from what you keep. A connection that is over is
    skipped.

    The message is framed once, and compressed once for all connections whose compression keeps no state. It goes out
    behind what was sent before. Not a checkpoint, so that the set of members cannot change meanwhile.

    Raises:
        TypeError: the message is neither str nor bytes.
    """
    if not isinstance(message, str | bytes | bytearray | memoryview):
        raise TypeError(f"a message is str or bytes, not {type(message).__name__}")
    text = isinstance(message, str)
    prepared = Prepared([message.encode() if isinstance(message, str) else bytes(message)], text=text)
    return [ws for ws in members if not ws._connection.broadcast(prepared)]  # noqa: SLF001 (its own module)
