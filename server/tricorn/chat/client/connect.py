"""A client's connection to the chat, which is made anew when it is lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from math import inf
from random import random
from urllib.parse import urlsplit, urlunsplit

import msgspec
import trio
from trio_websocket import (
    CloseReason,
    ConnectionClosed,
    ConnectionRejected,
    HandshakeError,
    WebSocketConnection,
    wrap_client_stream,
)

from tricorn.chat.close_codes import DO_NOT_COME_BACK
from tricorn.chat.protocol import SUBPROTOCOL, AnyEvent, Closing, Opened, Reply, Request, Welcome

CONNECT_TIMEOUT = 10.0  # seconds; for the handshake, and for the first message after it
DISCONNECT_TIMEOUT = 2.0  # seconds
MAX_MESSAGE_BYTES = 2**26  # an event with a whole answer in it can be long
FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 15.0  # seconds; doubles with each attempt
PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that another attempt may not meet

Heard = Reply | AnyEvent
Take = Callable[[Heard, str], Awaitable[None]]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Heard).decode


class Link:
    """At most one connection at a time.

    It comes back after a loss, later each time and at a moment of chance, so that the clients of one server do not come
    back as one; not before the server wants it; and not at all where the server had never opened a conversation, or
    says that nothing would change.
    """

    def __init__(self, url: str, token: str | None, patience: float) -> None:
        """`patience` is how many seconds in a row may pass without a connection."""
        self._url = urlsplit(url)
        self._credentials = [(b"Authorization", b"Bearer " + token.encode())] if token else []
        self._patience = patience
        self._ws: WebSocketConnection | None = None
        self._scope = trio.CancelScope()
        self.left = False
        self._final = False  # coming back would change nothing
        self._ever_opened = False
        self._lost_at = inf
        self._attempts = 0
        self._closing: Closing | None = None

    async def keep(self, take: Take, lost: Callable[[str, float], None]) -> str | None:
        """Be connected and `take` what the server says, until `leave` (None), or until that is no use (why not).

        `lost` is told why a connection ended and in how many seconds the next attempt comes. If cancelled, the
        connection is not closed in the proper way; `leave` does that.
        """
        while True:
            problem = await self._connect(take)
            if self.left:
                return None
            if self._closing is not None and not self._final:
                problem = self._closing.reason
            now = trio.current_time()
            self._lost_at = min(self._lost_at, now)
            if self._final or not self._ever_opened or now - self._lost_at >= self._patience:
                return problem
            pause = self._pause()
            lost(problem, pause)
            with trio.CancelScope(deadline=self._lost_at + self._patience) as self._scope:
                await trio.sleep(pause)
            if self.left:
                return None

    def leave(self) -> None:
        """Close the connection and have `keep` return."""
        self.left = True
        self._scope.cancel()

    async def send(self, request: Request) -> None:
        """Send a request; without a connection, or with one that is being lost, nothing. If cancelled, it is lost."""
        await trio.lowlevel.checkpoint()
        if self._ws is not None:
            with suppress(ConnectionClosed):  # who listens hears of that too
                await self._ws.send_message(_encode(request).decode())

    def _pause(self) -> float:
        self._attempts += 1
        backoff = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** (self._attempts - 1)) * random()  # noqa: S311
        asked, self._closing = 0.0 if self._closing is None else self._closing.retry_after, None
        return asked + backoff

    async def _connect(self, take: Take) -> str:
        """Be connected once, and return why no longer, or why not at all."""
        problem = ""
        with trio.move_on_after(CONNECT_TIMEOUT) as connecting:
            self._scope = connecting
            try:
                async with await self._open_stream() as stream, trio.open_nursery() as nursery:
                    # Not open_websocket_url: its timeout waits for a server that says nothing.
                    ws = await wrap_client_stream(
                        nursery,
                        stream,
                        self._url.netloc,
                        urlunsplit(("", "", self._url.path, self._url.query, "")),
                        subprotocols=[SUBPROTOCOL],
                        extra_headers=self._credentials,
                        max_message_size=MAX_MESSAGE_BYTES,
                    )
                    connecting.deadline = inf
                    try:
                        # Leaving cancels what is in here, so that the connection itself is closed properly.
                        with trio.CancelScope() as self._scope:
                            problem = await self._listen(ws, take)
                    finally:
                        self._ws = None
                    with trio.move_on_after(DISCONNECT_TIMEOUT):
                        await ws.aclose()
                    nursery.cancel_scope.cancel()
            except* ConnectionRejected as errors:
                problem = what_failed(errors)
                self._final = _status(errors) not in PASSING
            except* (HandshakeError, OSError, trio.BrokenResourceError) as errors:
                problem = what_failed(errors)
        if connecting.cancelled_caught and not self.left:
            problem = f"no answer within {CONNECT_TIMEOUT:g} seconds"
        return problem

    async def _open_stream(self) -> trio.SocketStream | trio.SSLStream[trio.SocketStream]:
        host, port = self._url.hostname or "", self._url.port
        if self._url.scheme == "wss":
            return await trio.open_ssl_over_tcp_stream(host, port or 443, https_compatible=True)
        return await trio.open_tcp_stream(host, port or 80)

    async def _listen(self, ws: WebSocketConnection, take: Take) -> str:
        """Take in what the server says until the connection is lost, and return how it was."""
        if ws.subprotocol != SUBPROTOCOL:
            self._final = True
            return f"the server does not speak {SUBPROTOCOL}"
        self._ws = ws
        patience = CONNECT_TIMEOUT
        while True:
            try:
                with trio.fail_after(patience):
                    text = await ws.get_message()
            except trio.TooSlowError:
                return f"connection lost: nothing heard for {patience:g} seconds"
            except ConnectionClosed as closed:
                self._final = closed.reason is not None and closed.reason.code >= DO_NOT_COME_BACK
                return _why_closed(closed.reason)
            try:
                message = _decode(text)
            except msgspec.DecodeError:
                continue  # something newer than this program
            match message:
                case Welcome():
                    patience = 2 * message.heartbeat
                case Closing():
                    self._closing = message
                case Opened():
                    self._ever_opened = True
                    self._lost_at = inf
                    self._attempts = 0
            await take(message, str(text))


def what_failed(error: BaseException) -> str:
    """A few words for people: what the operating system said, which is innermost, once for each address tried."""
    while cause := error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__:
        error = cause
    if isinstance(error, ConnectionRejected):
        return f"the server answered {error.status_code} instead of opening a WebSocket"
    text: str = getattr(error, "strerror", None) or str(error) or "connection lost"
    return text.rpartition(": ")[2].lower()


def _status(errors: BaseException) -> int:
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors.status_code if isinstance(errors, ConnectionRejected) else 0


def _why_closed(reason: CloseReason | None) -> str:
    if reason is None or reason.code == 1006:
        return "connection lost"
    return f"the server closed the connection: {reason.code} {reason.reason or reason.name}"
