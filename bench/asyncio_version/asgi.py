"""The chat as an ASGI application: `hypercorn -k asyncio bench.asyncio_version.asgi:app`, or uvicorn.

ASGI has neither `broadcast` nor a way to tell whether a peer keeps up, so every session has a task that sends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from secrets import token_hex
from typing import Any

from bench.asyncio_version.chat import Chat, make_chat
from tricorn.chat.protocol import SUBPROTOCOLS
from tricorn.errors.report import report, send_records, trace_id
from tricorn.protocol.close import Close
from tricorn.protocol.handshake import as_request, check_origin, choose_subprotocol
from tricorn.request import Refuse
from tricorn.service.pages import pages
from tricorn.service.settings import ServiceSettings
from tricorn.settings import SettingError

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class AsgiConnection:
    """A WebSocket that an ASGI server holds."""

    keeps_up = False  # so that nothing is written to it, only sent
    deflates = False

    def __init__(self, scope: Scope, headers: dict[str, str], subprotocol: str | None, receive: Receive, send: Send):
        self.peer = scope["client"][0]
        self.subprotocol = subprotocol
        self.request_headers = headers
        self.gone: Close | None = None
        self.context: dict[str, object] = {}
        self.known: dict[str, Any] = {
            "connection": token_hex(6),
            "peer": tuple(scope["client"]),
            "path": scope["path"],
            "trace": trace_id(headers),
        }
        self._receive = receive
        self._send = send

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        while (event := await self._receive())["type"] != "websocket.disconnect":
            text = event.get("text")
            yield event["bytes"] if text is None else text
        self.gone = Close(event.get("code", 1005), event.get("reason") or "")

    def write_frames(self, frames: bytes) -> None:
        raise NotImplementedError

    def write_texts(self, texts: list[bytes]) -> None:
        raise NotImplementedError

    async def send_texts(self, texts: list[bytes]) -> None:
        for text in texts:
            await self._send({"type": "websocket.send", "text": text.decode()})

    async def end(self, close: Close) -> None:
        if self.gone is None:
            await self._send({"type": "websocket.close", "code": close.code, "reason": close.reason})


class App:
    """The application, from the start of its lifespan to the end."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._chat: Chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "lifespan":
                await self._live(receive, send)
            case "http":
                await pages(self._chat.why_not_ready)(scope, receive, send)
            case "websocket":
                await self._handle(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        async with make_chat(self._settings) as self._chat:
            await send({"type": "lifespan.startup.complete"})
            await receive()  # lifespan.shutdown
        await send({"type": "lifespan.shutdown.complete"})

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        request = as_request(b"GET", scope["path"], b"1.1", scope["headers"])
        try:
            if request.path != "/ws":
                raise Refuse(HTTPStatus.NOT_FOUND)
            check_origin(request, self._settings.origins)
        except Refuse:
            await send({"type": "websocket.close"})  # which is a 403
            return
        subprotocol = choose_subprotocol(request, SUBPROTOCOLS)
        await send({"type": "websocket.accept", "subprotocol": subprotocol})
        ws = AsgiConnection(scope, dict(request.headers), subprotocol, receive, send)
        close = await self._chat.session(ws)
        await ws.end(close)
        close = ws.gone or close
        report("INFO", "connection closed", context=ws.context, **ws.known, code=close.code, reason=close.reason)


def _settings() -> ServiceSettings:
    send_records("stderr", "INFO")
    try:
        return ServiceSettings.from_environ()
    except SettingError as error:
        raise SystemExit(f"tricorn: {error}") from None


app = App(_settings())
