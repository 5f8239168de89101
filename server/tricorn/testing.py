"""Test a handler without a server: connect to it in memory, in the test's own Trio::

    async def test_echo(autojump_clock):
        async with tricorn.testing.connect(echo) as client:
            await client.send("hi")
            assert await client.receive() == "hi"

Everything but the network is real: the handshake with its hook and limits, the codec, keepalive, backpressure, and the
closing of a connection in all its steps. The client's codec is that of `websockets`. There are no sockets and no
threads, so with `trio.testing.MockClock` timeouts cost no time and a test does the same each time. The plugin
`pytest_tricorn` has a fixture for tests that want several clients without nesting blocks.

If the handler fails, so does the test: `receive` and `send` raise `Disconnected` with 1011, and its `__cause__` is what
the handler raised, in an ExceptionGroup. If neither has told you, leaving the block raises the group itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, NoReturn, Self

import trio
from trio import current_effective_deadline
from trio.lowlevel import ParkingLot, checkpoint
from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from tricorn.asgi_handler import AsgiHandler
from tricorn.connection import Disconnected
from tricorn.listening.accept import upgrade
from tricorn.listening.site import Site
from tricorn.protocol.close import ABNORMAL, NORMAL, Close
from tricorn.protocol.handshake import Head, check_upgrade
from tricorn.settings import Settings
from tricorn.transport.memory import MemoryWire

__all__ = ["Client", "Connect", "connect", "open_clients"]

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from tricorn.connection import Connection
    from tricorn.listening.site import Handlers
    from tricorn.protocol.receiver import Message
    from tricorn.request import BeforeUpgrade
    from tricorn.transport.native import NativeTransport
    from tricorn.websocket import Handler, WebSocket

DEFAULTS = Settings()
PEER = ("127.0.0.1", 50000)

READ_AHEAD = 65536  # bytes of messages that the client reads before the test receives them


@asynccontextmanager
async def connect(
    handler: Handlers,
    path: str = "/",
    *,
    headers: Mapping[str, str] | None = None,
    subprotocols: Sequence[str] = (),
    settings: Settings = DEFAULTS,
    before_upgrade: BeforeUpgrade | None = None,
    peer: tuple[str, int] | None = PEER,
) -> AsyncGenerator[Client]:
    """Connect to a handler: `async with tricorn.testing.connect(handler) as client`.

    Leaving the block closes the connection with 1000, unless it is closed, and waits until the handler and everything
    in its nursery have ended, as they do within `settings.close_timeout` of being told. If cancelled, the connection
    closes with 1012, as it does when a server is cancelled.

    Args:
        handler: as in `tricorn.serve`: a handler, or a mapping of handlers by path.
        path: the path to connect to, with a query if you like.
        headers: further headers of the request. A `Host` or an `Origin` replaces the client's own.
        subprotocols: those that the client offers, its favourite first. Without `before_upgrade` the handler speaks
            all of them.
        settings: times and limits. The client offers compression, as browsers do: `settings.deflate` decides.
        before_upgrade: as in `tricorn.serve`.
        peer: the client's address, as `ws.request.peer` tells it.

    Raises:
        Refuse: the handshake was refused: with this status, these headers, this body.
        TypeError: the handler is an `asgi_handler`.
        ExceptionGroup: what the handler raised, or tasks in its nursery, unless the block raises something itself, or
            a `Disconnected` had it as its cause.
    """
    await checkpoint()
    protocol = ClientProtocol(
        parse_uri(f"ws://localhost{path}"),
        subprotocols=[Subprotocol(name) for name in subprotocols] or None,
        extensions=[ClientPerMessageDeflateFactory()],
        max_size=None,
    )
    head = Head(settings.max_head_bytes)
    request = head.receive_data(_request(protocol, headers or {}), peer)
    assert request is not None, "the head is complete"  # noqa: S101
    check_upgrade(request)
    site = Site(handler, settings, before_upgrade=before_upgrade, subprotocols=subprotocols)
    chosen, accepted = await site.admit(request)
    if isinstance(chosen, AsgiHandler):
        raise TypeError("an ASGI application cannot be tested in memory: its framework has a test client for that")
    wire = MemoryWire()
    failures: list[BaseException] = []
    transport, connection, websocket = upgrade(wire, wire, site, head, request, accepted)
    client = Client(wire, protocol, websocket, failures)
    support = trio.CancelScope(shield=True)
    raised: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_support, support, wire, site)
        await nursery.start(_serve, site, transport, connection, chosen, websocket, failures, support)
        try:
            yield client
        except BaseException as error:  # noqa: ASYNC103 (raised again below: the nursery would put it into a group)
            raised = error
        if current_effective_deadline() > -inf:
            await client.close()
    try:
        if raised is not None:
            raise raised
        for failure in failures:
            raise failure
    finally:
        del raised  # or its traceback, which knows this frame, would make a circle


Connect = Callable[..., Awaitable["Client"]]
"""Connects as `connect` does, and needs no block."""


@asynccontextmanager
async def open_clients() -> AsyncGenerator[Connect]:
    """Open several clients without nesting: `async with open_clients() as connect`, then `client = await connect(…)`.

    `connect` takes the arguments of `tricorn.testing.connect` and raises as that does. Leaving the block closes all
    connections as that does too.
    """
    leaving = trio.Event()

    async def hold(handler: Handlers, path: str, task_status: trio.TaskStatus[Client], **options: Any) -> None:
        async with connect(handler, path, **options) as client:
            task_status.started(client)
            await leaving.wait()

    async with trio.open_nursery() as nursery:

        async def connect_soon(handler: Handlers, path: str = "/", **options: Any) -> Client:
            client: Client = await nursery.start(partial(hold, handler, path, **options))
            return client

        yield connect_soon
        leaving.set()


async def _support(scope: trio.CancelScope, wire: MemoryWire, site: Site) -> None:
    """Run what a connection needs until its end, which may come later than a cancellation."""
    with scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.run)
            nursery.start_soon(site.look_after)


async def _serve(
    site: Site,
    transport: NativeTransport,
    connection: Connection,
    handler: Handler,
    websocket: WebSocket[Any],
    failures: list[BaseException],
    support: trio.CancelScope,
    task_status: trio.TaskStatus[None],
) -> None:
    async def begin(websocket: WebSocket[Any]) -> None:
        task_status.started()
        await handler(websocket)

    try:
        failure = await connection.run(begin, websocket)
        if failure is not None:
            failures.append(failure)
    finally:
        site.forget(connection)
        transport.forget()
        support.cancel()


def _request(protocol: ClientProtocol, headers: Mapping[str, str]) -> bytes:
    request = protocol.connect()
    for name, value in headers.items():
        request.headers.pop(name, None)
        request.headers[name] = value
    return request.serialize()


class Client:
    """The client's end of a connection in memory. Get one from `connect`.

    The client answers pings and close frames by itself, as browsers do, whatever the test does. It reads messages ahead
    of `receive`, but only 64 KiB of them: after that it is a slow client, whose handler has to wait when it sends.

    Attributes:
        websocket: what the handler holds.
        subprotocol: the subprotocol agreed on, or None.
    """

    def __init__(
        self, wire: MemoryWire, protocol: ClientProtocol, websocket: WebSocket[Any], failures: list[BaseException]
    ) -> None:
        self.websocket = websocket
        self.subprotocol: str | None = None
        self._wire = wire
        self._failures = failures  # what the handler raised, until the test is told
        self._protocol = protocol
        self._messages: deque[Message] = deque()
        self._fragments: list[Frame] = []  # of the message that is coming in
        self._ahead = 0  # bytes of `_messages`
        self._unsent = b""  # what the wire has not taken yet
        self._stalled = False
        self._over = False  # the server has closed the connection, or the client has vanished
        self._changed = ParkingLot()  # tasks that wait for anything to happen here
        wire.notify = self._advance
        self._advance()  # the response has come
        if protocol.handshake_exc is not None:
            raise protocol.handshake_exc
        self.subprotocol = protocol.subprotocol

    @property
    def closed(self) -> Close | None:
        """The close code and the reason that the client got once the connection is over, until then None.

        The code is 1006 if there was no close frame, and 1005 if there was no code in it (RFC 6455 §7.1.5).
        """
        if not self._over:
            return None
        close = self._protocol.close_rcvd
        return Close(ABNORMAL) if close is None else Close(close.code, close.reason)

    async def send(self, message: Message) -> None:
        """Send a message: str as text, bytes as binary. Waits while the handler does not keep up.

        A checkpoint. If cancelled while it waits, the message is sent all the same. If the connection ends while it
        waits, the message may be lost.

        Raises:
            Disconnected: the connection is over, or being closed; waits for the end and raises it as `receive` does.
        """
        await checkpoint()
        if self._over or self._protocol.state is not State.OPEN:
            await self._disconnected()
        if isinstance(message, str):
            self._protocol.send_text(message.encode())
        else:
            self._protocol.send_binary(message)
        self._write()
        while self._unsent:
            await self._changed.park()

    async def receive(self) -> Message:
        """Return the next message: str for text, bytes for binary. A client that was stalled reads again.

        A checkpoint. If cancelled, no message is lost.

        Raises:
            Disconnected: the server has closed the connection, all that came before was received, and the handler has
                ended. If it failed, what it raised is the `__cause__`. Or the client has vanished.
        """
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            pass
        return await self._disconnected()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        """Return the next message, as `receive` does. Iteration ends when the connection is over."""
        await checkpoint()
        self._stalled = False
        self._advance()
        while not self._messages:
            if self._over:
                raise StopAsyncIteration
            await self._changed.park()
        message = self._messages.popleft()
        self._ahead -= len(message) + 1
        self._advance()
        return message

    async def close(self, code: int = NORMAL, reason: str = "") -> int:
        """Close the connection, unless that is done or under way, and return the code of the server's close frame.

        Returns when the server has closed the connection and the handler has ended. Messages that come before that can
        be received afterwards. A client that was stalled reads again. If cancelled, the connection closes all the same.
        """
        self._stalled = False
        if self._protocol.state is State.OPEN and not self._over:
            self._protocol.send_close(code, reason)
        self._advance()
        await checkpoint()
        while (closed := self.closed) is None:
            await self._changed.park()
        return closed.code

    def vanish(self) -> None:
        """Lose the connection without a close frame, as with a TCP RST: both sides see 1006. Not a checkpoint.

        What the client has sent still reaches the handler, as far as it had to wait for nothing. What it has not
        received is lost.
        """
        self._messages.clear()
        self._unsent = b""
        self._wire.hang_up()
        self._end()

    def stall(self) -> None:
        """Read nothing from now on, until `receive` or `close` is called. Not a checkpoint.

        No ping and no close frame is answered, and once 64 KiB are on their way the handler has to wait when it sends.
        """
        self._stalled = True

    # Inside

    def _advance(self) -> None:
        """Read what there is to read, unless the client is slow, and answer it."""
        wire, protocol = self._wire, self._protocol
        while not self._over and not self._stalled and (self._ahead < READ_AHEAD or protocol.state is not State.OPEN):
            data = wire.take()
            if data:
                protocol.receive_data(data)
                for event in protocol.events_received():
                    if isinstance(event, Frame):
                        self._take(event)
            elif wire.ended:
                protocol.receive_eof()
                wire.hang_up()
                self._unsent = b""
                self._end()
            else:
                break
        self._write()

    def _take(self, frame: Frame) -> None:
        if frame.opcode not in DATA:
            return
        self._fragments.append(frame)
        if frame.fin:
            data = b"".join(fragment.data for fragment in self._fragments)
            text = self._fragments[0].opcode is Opcode.TEXT
            self._fragments.clear()
            self._messages.append(data.decode() if text else data)
            self._ahead += len(self._messages[-1]) + 1
            self._changed.unpark_all()

    def _write(self) -> None:
        """Send what the protocol has to say, as far as there is room."""
        self._unsent += b"".join(self._protocol.data_to_send())
        if self._unsent:
            self._unsent = self._unsent[self._wire.give(self._unsent) :]
            if not self._unsent:
                self._changed.unpark_all()

    def _end(self) -> None:
        self._over = True
        self._changed.unpark_all()

    async def _disconnected(self) -> NoReturn:
        """Wait until the connection is over, and raise Disconnected."""
        self._stalled = False
        self._advance()
        while (closed := self.closed) is None:
            await self._changed.park()
        raise Disconnected(*closed) from (self._failures.pop() if self._failures else None)


DATA = frozenset({Opcode.TEXT, Opcode.BINARY, Opcode.CONT})
