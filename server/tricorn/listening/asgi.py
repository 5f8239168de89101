"""WebSockets that an ASGI server holds, up to where a transport takes over (ASGI 3.0, scope `websocket`)."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from trio import CancelScope, Event
from trio.lowlevel import checkpoint

from tricorn.connection import WebSocket
from tricorn.listening.capacity import require_capacity
from tricorn.protocol.handshake import Refused, Request, check_entry
from tricorn.transport.asgi import AsgiTransport, Unattended

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tricorn.connection import Cancellable, Handler, Kept
    from tricorn.settings import Settings
    from tricorn.transport.asgi import Reach, Receive, Send

# Behind a request that came with more bytes Hypercorn answers 400, and the worker ends if it is told to accept before
# that is through, which takes its reader some passes of Trio's scheduler.
PASSES = 10


class AsgiWebSockets:
    """What becomes of a WebSocket that an ASGI server holds."""

    def __init__(
        self,
        handler: Handler,
        transports: dict[Kept, Cancellable],
        settings: Settings,
        *,
        subprotocols: Sequence[str],
        path: str | None,
    ) -> None:
        self._handler = handler
        self._transports = transports
        self._settings = settings
        self._subprotocols = subprotocols
        self._path = path
        self._serving: set[AsgiTransport] = set()
        self._unattended = Unattended()
        self._one_ended = Event()
        self._closed = False

    async def serve(self, scope: Any, receive: Receive, send: Send, reach: Reach) -> None:
        """Serve one connection until it has ended. If cancelled, closes it in the proper way.

        `reach` is called only as long as this lasts.
        """
        await receive()  # websocket.connect
        request = _request(scope)
        try:
            if self._closed:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the server is going away")
            check_entry(request, self._path, self._settings.origins)
            require_capacity(len(self._transports), self._settings.max_connections, "max_connections")
            await self._serve(scope, request, receive, send, reach)
        except Refused as refused:
            await _deny(scope, send, refused)

    async def _serve(self, scope: Any, request: Request, receive: Receive, send: Send, reach: Reach) -> None:
        offered = scope.get("subprotocols", ())
        subprotocol = next((name for name in offered if name in self._subprotocols), None)
        transport = AsgiTransport(receive, send, reach, self._unattended, self._settings)
        websocket = WebSocket(
            transport,
            peer=_peer(scope),
            path=request.path,
            query=request.query,
            headers=request.headers,
            subprotocol=subprotocol,
            close_timeout=self._settings.close_timeout,
        )
        self._serving.add(transport)
        try:
            with CancelScope() as scope:
                self._transports[transport] = scope
                for _ in range(PASSES):
                    await checkpoint()
                await send({"type": "websocket.accept", "subprotocol": subprotocol})
                await transport.run(websocket, self._handler)
        finally:
            del self._transports[transport]
            self._serving.discard(transport)
            self._one_ended.set()

    async def attend(self) -> None:
        """See to it that every connection is read, also while its handler is busy. Runs until cancelled."""
        await self._unattended.attend()

    async def close(self) -> None:
        """Close every connection with 1012, let nobody else in, and wait until all have ended.

        A checkpoint only where it waits. Cancelling it ends only the waiting.
        """
        self._closed = True
        for transport in self._serving:
            self._transports[transport].cancel()
        while self._serving:
            self._one_ended = Event()
            await self._one_ended.wait()


async def _deny(scope: Any, send: Send, refused: Refused) -> None:
    if "websocket.http.response" not in scope.get("extensions", ()):
        await send({"type": "websocket.close"})  # a server makes it 403
        return
    body = f"{refused}\n".encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in refused.headers.items()]
    headers += [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    await send({"type": "websocket.http.response.start", "status": refused.status.value, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


def _request(scope: Any) -> Request:
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Request("GET", scope["path"], scope["query_string"].decode("latin-1"), scope["http_version"], headers)


def _peer(scope: Any) -> tuple[str, int]:
    """The peer's address; where there is none, as over a Unix socket, one that no rule takes for this machine's."""
    client = scope.get("client")
    return ("unknown", 0) if client is None else (client[0], client[1])
