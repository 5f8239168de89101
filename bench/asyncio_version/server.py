"""The chat on `websockets`: handshakes, pages, and the end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from signal import SIGINT, SIGTERM
from typing import Any
from urllib.parse import unquote

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.typing import Subprotocol

from bench.asyncio_version.chat import Chat
from tricorn.chat.protocol import SUBPROTOCOLS
from tricorn.errors.report import report, trace_id
from tricorn.listening.binds import parse_bind
from tricorn.protocol.close import FAULTS, NORMAL, SERVICE_RESTART, STALLED, Close
from tricorn.protocol.handshake import check_origin, wants_websocket
from tricorn.request import Refuse
from tricorn.request import Request as OpeningRequest
from tricorn.service.pages import pages


class WebSocket(ServerConnection):
    """A connection of `websockets` that knows whether it can be written to without waiting."""

    keeps_up = True
    request_headers: dict[str, str]
    context: dict[str, object]
    known: dict[str, Any]

    def pause_writing(self) -> None:
        super().pause_writing()
        self.keeps_up = False

    def resume_writing(self) -> None:
        super().resume_writing()
        self.keeps_up = True

    @property
    def deflates(self) -> bool:
        return bool(self.protocol.extensions)

    @property
    def peer(self) -> str:
        return str(self.remote_address[0])

    def write_frames(self, frames: bytes) -> None:
        if self.protocol.state is State.OPEN and not self.transport.is_closing():
            self.transport.write(frames)

    def write_texts(self, texts: list[bytes]) -> None:
        if self.protocol.state is State.OPEN:
            for text in texts:
                self.protocol.send_text(text)
            self.write_frames(b"".join(self.protocol.data_to_send()))

    async def send_texts(self, texts: list[bytes]) -> None:
        async with self.send_context():  # which waits for room at its end
            self.write_texts(texts)

    async def end(self, close: Close) -> None:
        """Do the closing handshake, and close the socket after `close_timeout` in any case."""
        if close.code != STALLED:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.close_timeout):  # its own is not for a peer that reads nothing
                    await self.close(*close)
        self.transport.abort()

    async def discard(self) -> None:
        """Read to the end: what `websockets` has queued keeps it from reading the answer to our close frame."""
        with suppress(ConnectionClosed):
            async for _ in self:
                pass


class Server:
    """Serves the chat until SIGTERM or SIGINT; a second signal aborts every socket at once."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._settings = chat.settings
        self._pages = pages(chat.why_not_ready)
        self._connections: set[WebSocket] = set()
        self._signalled = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Listen, print the address, and serve. Raises OSError where the address cannot be bound."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        server = await serve(
            self._handle,
            *parse_bind(settings.binds[0]),
            create_connection=WebSocket,
            process_request=self._process_request,
            select_subprotocol=_select_subprotocol,
            compression=None if settings.deflate == "off" else "deflate",
            server_header=None,
            open_timeout=settings.handshake_timeout,
            ping_interval=settings.ping_interval,
            ping_timeout=settings.ping_timeout,
            close_timeout=settings.close_timeout,
            max_size=settings.max_message_bytes,
        )
        for signal in (SIGTERM, SIGINT):
            loop.add_signal_handler(signal, self._obey)
        host, port = server.sockets[0].getsockname()[:2]
        print(f"Tricorn is listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        if settings.service is not None:
            report(
                "INFO",
                "an instance has started",
                service=settings.service,
                revision=settings.revision,
                configuration=settings.configuration,
            )
        await self._signalled.wait()
        server.close(close_connections=False)
        await self._drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(settings.close_timeout):
                await server.wait_closed()

    def _obey(self) -> None:
        if self._signalled.is_set():
            for ws in self._connections:
                ws.transport.abort()
            if self._draining is not None:
                self._draining.cancel()
        self._signalled.set()

    async def _drain(self) -> None:
        """Let runs end and clients hear of it, then close with 1012; all in `drain_timeout`."""
        settings = self._settings
        async with asyncio.TaskGroup() as tasks:
            self._draining = tasks.create_task(self._chat.drain())
            await asyncio.wait([self._draining], timeout=settings.drain_timeout - settings.close_timeout)
            self._draining.cancel()
        async with asyncio.TaskGroup() as tasks:
            for ws in self._connections:
                tasks.create_task(ws.end(Close(SERVICE_RESTART)))

    async def _handle(self, connection: ServerConnection) -> None:
        assert isinstance(connection, WebSocket)
        ws, loop = connection, asyncio.get_running_loop()
        began = loop.time()
        self._connections.add(ws)
        try:
            close = await self._chat.session(ws)
            if close.code != NORMAL:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(ws.end(close))
                    await ws.discard()
        finally:
            self._connections.discard(ws)
        if close.code == NORMAL:  # it is the peer's end, or the server's
            close = Close(int(ws.close_code or NORMAL), ws.close_reason or "")
        report(
            "WARNING" if close.code in FAULTS else "INFO",
            "connection closed",
            context=ws.context,
            **ws.known,
            code=close.code,
            reason=close.reason,
            seconds=round(loop.time() - began, 3),
        )

    async def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer with a page, refuse, or go on with the handshake."""
        assert isinstance(connection, WebSocket)
        headers: dict[str, str] = {}
        for name, value in request.headers.raw_items():
            name = name.lower()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        path, _, query = request.path.partition("?")
        asked = OpeningRequest("GET", unquote(path), query, "1.1", headers)
        if not wants_websocket(asked):
            return await self._page(asked.path)
        try:
            if asked.path != "/ws":
                raise Refuse(HTTPStatus.NOT_FOUND, f"there is no WebSocket at {asked.path}")
            check_origin(asked, self._settings.origins)
        except Refuse as refused:
            return connection.respond(refused.status, f"{refused}\n")
        if len(self._connections) >= self._settings.max_connections:
            response = connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
            response.headers["Retry-After"] = "1"
            return response
        connection.request_headers = headers
        connection.context = {}
        connection.known = {
            "connection": connection.id.hex[:12],
            "peer": connection.remote_address[:2],
            "path": asked.path,
            "trace": trace_id(headers),
        }
        return None

    async def _page(self, path: str) -> Response:
        """What the ASGI application of the pages answers."""
        sent: list[dict[str, Any]] = []
        await self._pages({"type": "http", "method": "GET", "path": path}, _never, partial(_collect, sent))
        start, body = sent
        headers = Headers([(name.decode(), value.decode()) for name, value in start["headers"]])
        headers["Connection"] = "close"
        return Response(start["status"], HTTPStatus(start["status"]).phrase, headers, body["body"])


def _select_subprotocol(connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """The first that the client offers and the chat knows."""
    return next((name for name in offered if name in SUBPROTOCOLS), None)


async def _never() -> dict[str, Any]:
    raise RuntimeError("there is no body to receive")


async def _collect(sent: list[dict[str, Any]], event: dict[str, Any]) -> None:
    sent.append(event)
