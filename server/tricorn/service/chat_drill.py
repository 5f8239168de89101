"""The drill with the chat: its pages, HTTP/2, tokens, and an agent that fails."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tricorn.chat import SUBPROTOCOLS, Chat
from tricorn.chat.logs.memory import MemoryLog
from tricorn.errors.drill import CLOSE, EXCHANGES, PING, TEXT, Exchange, drill, fail_when_told, failure, frame, upgrade
from tricorn.server import serve
from tricorn.service.auth import rehearse
from tricorn.service.pages import pages

if TYPE_CHECKING:
    from tricorn.chat import Run
    from tricorn.websocket import WebSocket

_TO_THE_CHAT = upgrade(b"/ws", b"Sec-WebSocket-Protocol: tricorn.v1\r\n")

CHAT_EXCHANGES = (
    *EXCHANGES,
    Exchange(b"GET / HTTP/1.1\r\nHost: drill\r\n\r\n", b"</html>"),
    Exchange(b"GET /readyz HTTP/1.1\r\nHost: drill\r\n\r\n", b'"ok"'),
    Exchange(
        # HTTP/2 (RFC 9113): the preface, SETTINGS without any, HEADERS of GET http / on the host x, which is all
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + bytes.fromhex("000000 04 00 00000000")
        + bytes.fromhex("000006 01 05 00000001 82 86 84 41 01 78"),
        b"</html>",
    ),
    Exchange(
        _TO_THE_CHAT
        + frame(PING, b"")
        + frame(TEXT, b"{}")
        + frame(TEXT, b'{"type":"open","conversation":"drill"}')
        + frame(TEXT, b'{"type":"post","conversation":"drill","id":"1","text":"x"}'),
        b'"agent_completed"',
    ),
    Exchange(_TO_THE_CHAT + frame(CLOSE, b"\x03\xe8"), b"\x88\x02\x03\xe8"),
)


async def drill_chat() -> None:
    """Run the drill with a chat and its pages. Raises like `drill`, always in an ExceptionGroup."""
    rehearse()
    async with Chat(_failing_agent, log=MemoryLog()) as chat:

        async def handler(ws: WebSocket) -> None:
            await (fail_when_told(ws) if ws.subprotocol is None else chat.session(ws))

        start = partial(serve, handler, 0, subprotocols=SUBPROTOCOLS, app=pages(chat.why_not_ready), drain=chat.drain)
        await drill(start, CHAT_EXCHANGES)


async def _failing_agent(run: Run) -> None:
    await run.think("of failing")
    async with run.tool("failure"):
        raise failure() from LookupError("a cause")
