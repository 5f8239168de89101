"""A client of the chat that reconnects when its connection is lost."""

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

from tricorn.chat.backoff import Backoff
from tricorn.chat.close_codes import DO_NOT_COME_BACK
from tricorn.chat.protocol import SUBPROTOCOL, AnyEvent, ClientRequest, Closing, Opened, Reply, Welcome
from tricorn.errors.reason import innermost, reason

CONNECT_TIMEOUT = 10.0  # seconds; for the handshake, and for the first message after it
DISCONNECT_TIMEOUT = 2.0  # seconds
MAX_MESSAGE_BYTES = 2**26  # an event with a whole answer in it can be long
FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 15.0  # seconds
PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that another attempt may not meet

ServerMessage = Reply | AnyEvent
OnMessage = Callable[[ServerMessage, str], Awaitable[None]]  # takes the message, and its JSON
OnLoss = Callable[[str, float], None]  # takes why the connection is lost, and the seconds until the next attempt

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ServerMessage).decode


class ReconnectingClient:
    """A client with at most one connection at a time.

    After a loss it reconnects, each time later and at a random moment, so that the clients of a server do not all come
    back at once; and not before the server wants it. It gives up if the server has never opened a conversation, or says
    that another attempt would change nothing.
    """

    def __init__(self, url: str, token: str | None, patience: float) -> None:
        """Give up after `patience` seconds in a row without a connection."""
        self._url = urlsplit(url)
        self._credentials = [(b"Authorization", b"Bearer " + token.encode())] if token else []
        self._patience = patience
        self._ws: WebSocketConnection | None = None
        self._scope = trio.CancelScope()  # around what `leave` interrupts
        self.left = False
        self._final = False  # another attempt would change nothing
        self._ever_opened = False
        self._lost_at = inf
        self._backoff = Backoff(FIRST_BACKOFF, LONGEST_BACKOFF)
        self._closing: Closing | None = None

    async def run(self, on_message: OnMessage, on_loss: OnLoss) -> str | None:
        """Stay connected until `leave`, then return None; or until it is time to give up, then return why.

        If cancelled, the connection is dropped without a closing handshake; use `leave` for that.
        """
        while True:
            problem = await self._connect(on_message)
            if self.left:
                return None
            if self._closing is not None and not self._final:
                problem = self._closing.reason
            now = trio.current_time()
            self._lost_at = min(self._lost_at, now)
            if self._final or not self._ever_opened or now - self._lost_at >= self._patience:
                return problem
            pause = self._pause()
            on_loss(problem, pause)
            with trio.CancelScope(deadline=self._lost_at + self._patience) as self._scope:
                await trio.sleep(pause)
            if self.left:
                return None

    def leave(self) -> None:
        """Close the connection, and have `run` return."""
        self.left = True
        self._scope.cancel()

    async def send(self, request: ClientRequest) -> None:
        """Send a request, unless there is no connection or it is being lost. If cancelled, the connection is lost."""
        await trio.lowlevel.checkpoint()
        if self._ws is not None:
            with suppress(ConnectionClosed):  # `_listen` learns of that too
                await self._ws.send_message(_encode(request).decode())

    def _pause(self) -> float:
        asked, self._closing = 0.0 if self._closing is None else self._closing.retry_after, None
        return asked + self._backoff.next() * random()  # noqa: S311

    async def _connect(self, on_message: OnMessage) -> str:
        """Connect once. Return why the connection ended, or why there was none."""
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
                        # `leave` cancels only this, so that the connection is closed properly.
                        with trio.CancelScope() as self._scope:
                            problem = await self._listen(ws, on_message)
                    finally:
                        self._ws = None
                    with trio.move_on_after(DISCONNECT_TIMEOUT):
                        await ws.aclose()
                    nursery.cancel_scope.cancel()
            except* ConnectionRejected as errors:
                status = getattr(innermost(errors), "status_code", 0)
                problem = f"the server answered {status} instead of opening a WebSocket"
                self._final = status not in PASSING
            except* (HandshakeError, OSError, trio.BrokenResourceError) as errors:
                said = str(innermost(errors))
                problem = reason(errors).rpartition(": ")[2].lower() if said else "connection lost"
        if connecting.cancelled_caught and not self.left:
            problem = f"no answer within {CONNECT_TIMEOUT:g} seconds"
        return problem

    async def _open_stream(self) -> trio.SocketStream | trio.SSLStream[trio.SocketStream]:
        host, port = self._url.hostname or "", self._url.port
        if self._url.scheme == "wss":
            return await trio.open_ssl_over_tcp_stream(host, port or 443, https_compatible=True)
        return await trio.open_tcp_stream(host, port or 80)

    async def _listen(self, ws: WebSocketConnection, on_message: OnMessage) -> str:
        """Receive messages until the connection is lost, and return why it was."""
        if ws.subprotocol != SUBPROTOCOL:
            self._final = True
            return f"the server does not speak {SUBPROTOCOL}"
        self._ws = ws
        silence = CONNECT_TIMEOUT
        while True:
            try:
                with trio.fail_after(silence):
                    text = await ws.get_message()
            except trio.TooSlowError:
                return f"connection lost: nothing heard for {silence:g} seconds"
            except ConnectionClosed as closed:
                self._final = closed.reason is not None and closed.reason.code >= DO_NOT_COME_BACK
                return _why_closed(closed.reason)
            try:
                message = _decode(text)
            except msgspec.DecodeError:
                continue  # from a newer protocol than this program's
            match message:
                case Welcome():
                    silence = 2 * message.heartbeat
                case Closing():
                    self._closing = message
                case Opened():
                    self._ever_opened = True
                    self._lost_at = inf
                    self._backoff.reset()
            await on_message(message, str(text))


def _why_closed(reason: CloseReason | None) -> str:
    if reason is None or reason.code == 1006:
        return "connection lost"
    return f"the server closed the connection: {reason.code} {reason.reason or reason.name}"
