"""The chat as an ASGI application: `hypercorn -k trio -b 0.0.0.0:8080 tricorn.asgi:app`.

Importing this module reads the environment and loads the agent. If one of them cannot be used, it ends the process with
one line that says why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from multiprocessing import parent_process
from signal import SIG_IGN, SIGTERM, signal
from typing import TYPE_CHECKING, Any

from tricorn.application import asgi_app
from tricorn.chat import SUBPROTOCOLS, Agent, Chat
from tricorn.errors.import_guard import import_at_once
from tricorn.errors.report import report, send_records
from tricorn.service.hypercorn_config import workers_of
from tricorn.service.pages import pages
from tricorn.service.settings import ServiceSettings
from tricorn.service.start_up import check_shared, make_agent, make_log, read_keys, start_chat
from tricorn.settings import SettingError

if TYPE_CHECKING:
    from tricorn.asgi_handler import ASGIApp
    from tricorn.chat.logs.base import Log
    from tricorn.service.loader import AgentFactory
    from tricorn.websocket import WebSocket


class _Service:
    """The chat, from the start of its lifespan to the end."""

    def __init__(self, agent: Agent | AgentFactory, settings: ServiceSettings, log: Log) -> None:
        self._agent = agent
        self._log = log
        self._chat: Chat
        self.settings = settings

    async def session(self, ws: WebSocket) -> None:
        await self._chat.session(ws)

    async def drain(self) -> None:
        await self._chat.drain()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """The pages, with the chat's lifespan."""
        if scope["type"] != "lifespan":
            await pages(self._chat.why_not_ready)(scope, receive, send)
            return
        await receive()
        async with AsyncExitStack() as stack:
            try:
                keys = await read_keys(self.settings)
                starting = start_chat(self._agent, self.settings, self._log, keys)
                self._chat = await stack.enter_async_context(starting)
            except Exception as error:
                report("CRITICAL", f"did not start up: {error}")  # Hypercorn says so as well, under a traceback
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            with _left_alone_by_sigterm():
                await send({"type": "lifespan.startup.complete"})
                await receive()  # lifespan.shutdown
        await send({"type": "lifespan.shutdown.complete"})


@contextmanager
def _left_alone_by_sigterm() -> Iterator[None]:
    """Hypercorn tells its workers by an event to end. It also sends them SIGTERM, as soon as one of them has ended, and
    so does whoever ends a whole group of processes: that would cut off what the others still have to say."""
    if parent_process() is None:
        yield
        return
    before = signal(SIGTERM, SIG_IGN)
    try:
        yield
    finally:
        signal(SIGTERM, before)


def _check_workers(log: Log) -> None:
    """Raise `SettingError` if this is one of several processes, or may be one, and the log is for one only."""
    if parent_process() is None:
        return
    workers = workers_of(sys.argv)
    if workers is None:
        check_shared(log, "a process that another one started")
    elif workers > 1:
        check_shared(log, f"hypercorn -w {workers}")


def _load() -> ASGIApp:
    send_records("stderr", "INFO")  # before the agent is imported, which may choose otherwise
    import_at_once()
    try:
        settings = ServiceSettings.from_environ()
        log = make_log(settings)
        _check_workers(log)
        service = _Service(make_agent(settings), settings, log)
        handlers = {"/ws": service.session}
        return asgi_app(handlers, settings=settings, subprotocols=SUBPROTOCOLS, app=service.app, drain=service.drain)
    except SettingError as error:
        raise SystemExit(f"tricorn: {error}") from None


app = _load()
