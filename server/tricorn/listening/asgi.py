"""WebSockets that an ASGI server holds, up to where a transport takes over (ASGI 3.0, scope `websocket`)."""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from trio import Event
from trio.lowlevel import checkpoint

from tricorn.asgi_handler import AsgiHandler
from tricorn.protocol.handshake import join_headers, refusal
from tricorn.request import Refuse, Request
from tricorn.transport.asgi import AsgiTransport, Unattended

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tricorn.connection import Connection
    from tricorn.listening.site import Site
    from tricorn.request import Accept
    from tricorn.transport.asgi import Reach, Receive, Send
    from tricorn.websocket import Handler

# Behind a request that came with more bytes Hypercorn answers 400, and the worker ends if it is told to accept before
# that is through, which takes its reader some passes of Trio's scheduler.
PASSES = 10

# Hypercorn 0.18 keeps all that is sent to a peer whose window is closed, and has one stream's end end all of them.
NO_HTTP2 = "WebSockets are served over HTTP/1.1 only: set Hypercorn's alpn_protocols to http/1.1"


class AsgiWebSockets:
    """Serves the WebSockets that an ASGI server hands over."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._serving: set[Connection] = set()
        self._unattended = Unattended()
        self._one_ended = Event()

    async def serve(self, scope: Any, receive: Receive, send: Send, reach: Reach) -> None:
        """Serve one connection until it has ended. If cancelled, closes it in the proper way.

        `reach` is called only as long as this lasts.
        """
        await receive()  # websocket.connect
        site = self._site
        request = _request(scope)
        try:
            if request.http_version == "2":
                raise Refuse(HTTPStatus.NOT_IMPLEMENTED, NO_HTTP2)
            handler, accepted = await site.admit(request)
            if isinstance(handler, AsgiHandler):
                upgrade = partial(self._upgrade, request, receive, send, reach)
                state = site.state_of(handler.app)
                await handler.serve(scope, accepted, upgrade, state=state, settings=site.settings)
            else:
                await self._upgrade(request, receive, send, reach, accepted, handler)
        except Refuse as refused:
            await _deny(scope, send, refused)

    async def _upgrade(
        self, request: Request, receive: Receive, send: Send, reach: Reach, accepted: Accept, handler: Handler
    ) -> None:
        site = self._site
        site.require_capacity()  # others may have come while an application decided
        transport = AsgiTransport(receive, send, reach, self._unattended, site.settings, site.metrics)
        connection, websocket = site.connect(transport, request, accepted)
        transport.carry(connection)
        self._serving.add(connection)
        try:
            for _ in range(PASSES):
                await checkpoint()
            headers = _raw(accepted.headers.items())
            await send({"type": "websocket.accept", "subprotocol": accepted.subprotocol, "headers": headers})
            await transport.run(handler, websocket)
        finally:
            site.forget(connection)
            self._serving.discard(connection)
            self._one_ended.set()

    async def attend(self) -> None:
        """See to it that every connection is read, also while its handler is busy. Runs until cancelled."""
        await self._unattended.attend()

    async def close(self) -> None:
        """Close every connection with 1012, let nobody else in, and wait until all have ended.

        A checkpoint only if it waits. Cancelling it ends only the waiting.
        """
        self._site.closing = True
        for connection in self._serving:
            connection.cancel()
        while self._serving:
            self._one_ended = Event()
            await self._one_ended.wait()


async def _deny(scope: Any, send: Send, refused: Refuse) -> None:
    if "websocket.http.response" not in scope.get("extensions", ()):
        await send({"type": "websocket.close"})  # a server makes it 403
        return
    headers, body = refusal(refused)
    await send({"type": "websocket.http.response.start", "status": refused.status.value, "headers": _raw(headers)})
    await send({"type": "websocket.http.response.body", "body": body})


def _raw(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]


def _request(scope: Any) -> Request:
    client = scope.get("client")
    return Request(
        "GET",
        scope["path"],
        scope["query_string"].decode("latin-1"),
        scope["http_version"],
        join_headers(scope["headers"]),
        None if client is None else (client[0], client[1]),
        (scope.get("raw_path") or b"").decode("latin-1"),
        scope.get("scheme") == "wss",
    )
