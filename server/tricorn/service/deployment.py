"""A deployed chat, as its checks see it: its pages, its WebSocket as bytes, and the client of `tricorn chat`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from secrets import token_hex
from typing import cast
from urllib.parse import SplitResult, urlunsplit

import h11
import trio
from trio_websocket import (
    ConnectionClosed,
    WebSocketConnection,
    wrap_client_stream,
)

from tricorn.chat.client.connect import MAX_MESSAGE_BYTES, ReconnectingClient, ServerMessage
from tricorn.chat.protocol import (
    SUBPROTOCOL,
    AnyEvent,
    Closing,
    ConversationEvent,
    Error,
    Open,
    Opened,
    Post,
    Welcome,
)
from tricorn.errors.reason import reason

QUESTION = "12*(7+5)^2"  # of the demo agent's skills, one with a tool
LOST = 1006  # the close code of a connection that ends without one
MAX_BODY = 2**16  # bytes
CONNECTION = "a connection"


Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class CheckFailed(Exception):
    """A check failed. The text says what was wrong and what would be right."""


class NoConnection(CheckFailed):
    """The server cannot be reached, or lets nobody in: further checks would find the same."""


@dataclass
class Deployment:
    """The server that is checked."""

    url: SplitResult
    token: str | None
    waiting_for: str = field(default="", init=False)  # so that a check that takes too long can say so

    async def open_stream(self) -> Stream:
        """Connect. Raises `NoConnection`."""
        host, port = self.url.hostname or "", self.url.port
        self.waiting_for = CONNECTION
        try:
            if self.url.scheme == "ws":
                return await trio.open_tcp_stream(host, port or 80)
            stream = await trio.open_ssl_over_tcp_stream(host, port or 443, https_compatible=True)
            await stream.do_handshake()
        except (OSError, trio.BrokenResourceError) as error:
            why = reason(error).rpartition(": ")[2].lower()
            raise NoConnection(f"there is no connection to {self.url.netloc}: {why}") from error
        return stream

    async def get(self, path: str, headers: Sequence[tuple[str, str]] = (("Connection", "close"),)) -> tuple[int, str]:
        """Ask for a page, and return the status and the body."""
        connection = h11.Connection(h11.CLIENT)
        request = h11.Request(method="GET", target=path, headers=[("Host", self.url.netloc), *headers])
        body = b""
        async with await self.open_stream() as stream:
            self.waiting_for = f"the answer to GET {path}"
            await stream.send_all((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
            status = 0
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(bytes(await stream.receive_some(MAX_BODY)))
                elif isinstance(event, h11.Response | h11.InformationalResponse):
                    status = event.status_code
                    if status == 101:
                        break
                elif isinstance(event, h11.Data):
                    body = (body + bytes(event.data))[:MAX_BODY]
                else:
                    break
        return status, body.decode(errors="replace")

    def page(self, name: str) -> str:
        """Return the path of a page that is served beside the chat's `/ws`."""
        return f"{self.url.path.removesuffix('/ws') if self.url.path.endswith('/ws') else ''}/{name}"

    @asynccontextmanager
    async def connect(self, *, with_token: bool = True) -> AsyncGenerator[Connection]:
        """Open a WebSocket. When the block ends the connection is dropped."""
        credentials = [(b"Authorization", b"Bearer " + self.token.encode())] if self.token and with_token else []
        async with await self.open_stream() as stream, trio.open_nursery() as nursery:
            self.waiting_for = "the answer to the handshake"
            writable = _Writable(stream)
            ws = await wrap_client_stream(
                nursery,
                cast(Stream, writable),
                self.url.netloc,
                urlunsplit(("", "", self.url.path, self.url.query, "")),
                subprotocols=[SUBPROTOCOL],
                extra_headers=credentials,
                max_message_size=MAX_MESSAGE_BYTES,
            )
            yield Connection(self, ws, writable)
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def visit(self, *, cut: bool = False) -> AsyncGenerator[Visit]:
        """Chat with the client of `tricorn chat`. When the block ends it leaves, or is `cut` off without a word."""
        async with trio.open_nursery() as nursery:
            visit = Visit(self)
            nursery.start_soon(visit.run)
            yield visit
            if cut:
                nursery.cancel_scope.cancel()
            else:
                visit.leave()


class _Writable:
    """A stream that two tasks may write to: what is sent as bytes, and the WebSocket's answers to close frames."""

    def __init__(self, stream: Stream) -> None:
        self.receive_some = stream.receive_some
        self.aclose = stream.aclose
        self._stream = stream
        self._lock = trio.Lock()

    async def send_all(self, data: bytes) -> None:
        async with self._lock:
            await self._stream.send_all(data)


class Connection:
    """A WebSocket on whose stream anything can be written."""

    def __init__(self, deployment: Deployment, ws: WebSocketConnection, stream: _Writable) -> None:
        self.subprotocol = ws.subprotocol
        self._deployment = deployment
        self._ws = ws
        self._stream = stream

    async def receive(self, what: str) -> str:
        """Return the next message. Raises ConnectionClosed."""
        self._deployment.waiting_for = what
        return str(await self._ws.get_message())

    async def write(self, data: bytes) -> None:
        """Write bytes, whatever they are, unless the connection has been closed."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_all(data)

    async def until_closed(self) -> tuple[int, str]:
        """Return the close code and the reason; 1006 if the connection ends without them."""
        try:
            while True:
                await self.receive("the close frame")
        except ConnectionClosed as closed:
            return end_of(closed)


class Visit:
    """A conversation with the client of `tricorn chat`, over one connection."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._client = ReconnectingClient(urlunsplit(deployment.url), deployment.token, patience=0)
        self._heard, self._messages = trio.open_memory_channel[tuple[ServerMessage, str]](inf)
        self._problem: str | None = None
        self.leave = self._client.leave

    async def run(self) -> None:
        """Be connected until `leave`, or until the connection is lost."""
        async with self._heard:
            self._problem = await self._client.run(self._hear, lambda problem, pause: None)

    async def _hear(self, message: ServerMessage, text: str) -> None:
        await self._heard.send((message, text))

    async def receive(self, what: str) -> tuple[ServerMessage, str]:
        """Return the next message, and its JSON."""
        self._deployment.waiting_for = what
        try:
            message, text = await self._messages.receive()
        except trio.EndOfChannel:
            raise CheckFailed(f"{self._problem} while waiting for {what}") from None
        if isinstance(message, Error):
            raise CheckFailed(f"the server refused with `{message.code}`: {message.message}")
        if isinstance(message, Closing):
            raise CheckFailed(f"the server is about to close the connection: {message.reason}")
        return message, text

    async def open(self, conversation: str, after: int = 0, epoch: str | None = None) -> Opened:
        """Open a conversation and return what it is like; on a new connection, after the welcome."""
        message: ServerMessage | None = None
        while not isinstance(message, Welcome):
            message, _ = await self.receive("`welcome`")
        await self._client.send(Open(conversation=conversation, after=after, epoch=epoch))
        while not isinstance(message, Opened):
            message, _ = await self.receive("`opened`")
        return message

    async def post(self, conversation: str) -> None:
        """Ask the question."""
        await self._client.send(Post(id=token_hex(8), conversation=conversation, text=QUESTION))

    async def events(self, last: type[AnyEvent]) -> list[tuple[AnyEvent, str]]:
        """Return the events up to the first of this type, each with its JSON."""
        events: list[tuple[AnyEvent, str]] = []
        while not (events and isinstance(events[-1][0], last)):
            message, text = await self.receive(f"`{tag(last)}`")
            if isinstance(message, ConversationEvent):
                events.append((message, text))
        return events


def end_of(closed: BaseException) -> tuple[int, str]:
    """Return the close code and the reason that a ConnectionClosed has."""
    why = getattr(closed, "reason", None)
    return (LOST, "no close frame") if why is None or why.code == LOST else (int(why.code), why.reason or "no reason")


def tag(kind: type) -> str:
    """Return the `type` of an object of the protocol."""
    return str(kind.__struct_config__.tag)  # type: ignore[attr-defined]
