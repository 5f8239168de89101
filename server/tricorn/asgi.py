"""The chat as an ASGI application: `hypercorn -k trio -b 0.0.0.0:8080 tricorn.asgi:app`.

Importing this module reads the environment and loads the agent; where that cannot be used, it ends the process with one
line that says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from multiprocessing import current_process, parent_process
from signal import SIG_IGN, SIGTERM, signal
from typing import TYPE_CHECKING, Any

import trio

from tricorn.application import asgi_app
from tricorn.chat import SUBPROTOCOLS, Agent, Chat
from tricorn.errors.import_guard import guarded
from tricorn.errors.report import report, send_records
from tricorn.server import settle
from tricorn.service.cli import check_shared, load_agent, make_gate, open_log
from tricorn.service.drill import drill
from tricorn.service.pages import pages
from tricorn.settings import SettingError, Settings

if TYPE_CHECKING:
    from tricorn.chat.identity import Gate
    from tricorn.chat.logs.base import Log
    from tricorn.connection import WebSocket
    from tricorn.service.jwt_keys import Keys


class _Service:
    """The chat, from the start of its lifespan to the end."""

    def __init__(self, agent: Agent, settings: Settings, log: Log) -> None:
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
                keys, gate = await make_gate(self.settings)
                await stack.enter_async_context(self._log)
                await drill()
            except Exception as error:
                report("CRITICAL", f"did not start up: {error}")  # Hypercorn says so as well, under a traceback
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            settle()
            with _left_alone_by_sigterm(), guarded(self.settings.import_guard):
                await self._serve(keys, gate, receive, send)
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, keys: Keys, gate: Gate, receive: Any, send: Any) -> None:
        async with trio.open_nursery() as support:
            support.start_soon(keys.stay_fresh)
            async with Chat(self._agent, settings=self.settings, log=self._log, gate=gate) as self._chat:
                await send({"type": "lifespan.startup.complete"})
                await receive()  # lifespan.shutdown
            support.cancel_scope.cancel()


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


def _workers() -> int:
    """How many processes serve: Hypercorn starts each as a `multiprocessing.Process` that is given its options."""
    options = getattr(current_process(), "_kwargs", {}).get("config")
    return getattr(options, "workers", 1)


def _load() -> _Service:
    send_records("stderr", "INFO")  # before the agent is imported, which may choose otherwise
    try:
        settings = Settings.from_environ()
        log = open_log(settings)
        check_shared(log, _workers(), "hypercorn -w")
        return _Service(load_agent(settings.agent), settings, log)
    except SettingError as error:
        raise SystemExit(f"tricorn: {error}") from None


_service = _load()

app = asgi_app(
    _service.session,
    settings=_service.settings,
    subprotocols=SUBPROTOCOLS,
    path="/ws",
    app=_service.app,
    drain=_service.drain,
)
