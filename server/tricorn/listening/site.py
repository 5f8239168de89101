"""What a server serves, whatever the way in: handlers by path, the hook before an upgrade, limits, connections."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from trio import move_on_after, open_nursery

from tricorn.asgi_handler import AsgiHandler
from tricorn.connection import Connection
from tricorn.errors.report import report, report_error, report_hidden
from tricorn.listening.capacity import require_capacity
from tricorn.metrics import ServerMetrics
from tricorn.protocol.deflate import negotiate
from tricorn.protocol.forwarded import TrustedProxies
from tricorn.protocol.handshake import (
    check_answer,
    check_origin,
    choose_subprotocol,
    offered_extensions,
    offered_subprotocols,
)
from tricorn.request import Accept, Refuse
from tricorn.transport.keep_alive import Reaper, keep_alive
from tricorn.websocket import Handler, WebSocket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tricorn.asgi_handler import ASGIApp
    from tricorn.connection import Transport
    from tricorn.protocol.deflate import Agreement
    from tricorn.request import BeforeUpgrade, Request
    from tricorn.settings import Settings


Handlers = Handler | AsgiHandler | Mapping[str, Handler | AsgiHandler]  # one for every path, or by path
Drain = Callable[[], Awaitable[None]]  # what ends in order before connections are closed


class Site:
    """What a server serves.

    Attributes:
        settings: times and limits.
        metrics: the counters of the server.
        proxies: those that are trusted.
        connections: the connections that there are, with what their handlers hold.
        reaper: closes their sockets if their tasks do not end.
        closing: no more are let in.
        app: the application that handles every WebSocket, if it is one application.
    """

    def __init__(
        self,
        handlers: Handlers,
        settings: Settings,
        *,
        before_upgrade: BeforeUpgrade | None = None,
        subprotocols: Sequence[str] = (),
    ) -> None:
        self.settings = settings
        self.connections: dict[Connection, WebSocket[Any]] = {}
        self.metrics = ServerMetrics(self.connections)
        self.proxies = TrustedProxies(settings.trusted_proxies)
        self.reaper = Reaper()
        self.closing = False
        self.app = handlers.app if isinstance(handlers, AsgiHandler) else None
        self._handlers = handlers
        self._before_upgrade = before_upgrade
        self._subprotocols = subprotocols
        self._apps: dict[int, tuple[ASGIApp, dict[str, Any]]] = {}  # by identity
        for handler in handlers.values() if isinstance(handlers, Mapping) else (handlers,):
            if isinstance(handler, AsgiHandler):
                self.state_of(handler.app)

    @property
    def apps(self) -> list[tuple[ASGIApp, dict[str, Any]]]:
        """The applications whose lifespans are to be run, each once, and the state that each keeps."""
        return list(self._apps.values())

    def state_of(self, app: ASGIApp) -> dict[str, Any]:
        """Return the state that the lifespan of an application shares with its requests and WebSockets."""
        return self._apps.setdefault(id(app), (app, {}))[1]

    async def admit(self, request: Request) -> tuple[Handler | AsgiHandler, Accept]:
        """Find out who handles a request, and how it is to be answered. Not a checkpoint without a hook.

        An `AsgiHandler` has the last word on the answer.

        Raises:
            Refuse: it is not to be upgraded.
        """
        handler = self._route(request.path)
        check_origin(request, self.settings.origins)
        self.require_capacity()
        if self._before_upgrade is None:
            return handler, Accept(choose_subprotocol(request, self._subprotocols))
        answer = await self._ask(self._before_upgrade, request)
        self.require_capacity()  # others may have come meanwhile
        return handler, answer

    def require_capacity(self) -> None:
        """Raise Refuse if no more connections are let in."""
        if self.closing:
            raise Refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the server is going away")
        require_capacity(len(self.connections), self.settings.max_connections, "max_connections", self.metrics)

    def agree(self, request: Request) -> Agreement | None:
        """Return the compression that the settings and the client agree on, or None.

        Raises:
            Refuse: the client's header of extensions is malformed.
        """
        offers = offered_extensions(request)
        deflate = self.settings.deflate
        return None if deflate == "off" else negotiate(offers, takeover=deflate == "takeover")

    def connect(
        self, transport: Transport, request: Request, accepted: Accept, reaper: Reaper | None = None
    ) -> tuple[Connection, WebSocket[Any]]:
        """Make the connection of a request that is upgraded, and count it; end that with `forget`."""
        connection = Connection(transport, request, self.settings, self.metrics, reaper or self.reaper)
        websocket = self.connections[connection] = WebSocket(connection, accepted)
        return connection, websocket

    def forget(self, connection: Connection) -> None:
        """Count a connection no longer."""
        del self.connections[connection]

    async def look_after(self) -> None:
        """Keep the connections alive or give them up, and close the sockets of those that do not end.

        Runs until cancelled: not before the last connection has ended.
        """
        async with open_nursery() as nursery:
            nursery.start_soon(keep_alive, self.connections, self.settings)
            nursery.start_soon(self.reaper.run)

    def _route(self, path: str) -> Handler | AsgiHandler:
        if not isinstance(self._handlers, Mapping):
            return self._handlers
        handler = self._handlers.get(path)
        if handler is None:
            raise Refuse(HTTPStatus.NOT_FOUND, f"there is no WebSocket at {path}")
        return handler

    async def _ask(self, hook: BeforeUpgrade, request: Request) -> Accept:
        """Have the hook decide. Its failure is ours and not the client's: 500 with an error id, 503 if it is late."""
        try:
            with move_on_after(self.settings.handshake_timeout):
                answer = await _answer_of(hook, request)
                check_answer(answer, offered_subprotocols(request))
                if isinstance(answer, Accept):
                    return answer
                raise answer
        except Refuse:
            raise
        except Exception as error:
            error_id = report_error(error, path=request.path, peer=request.peer)
            raise Refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"internal server error {error_id}") from None
        report("WARNING", "before_upgrade did not decide in time", path=request.path, peer=request.peer)
        raise Refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the server could not decide in time")


async def _answer_of(hook: BeforeUpgrade, request: Request) -> Accept | Refuse:
    try:
        answer = await hook(request)
    except Refuse as refused:
        return refused
    except BaseException as ending:
        report_hidden(ending, path=request.path, peer=request.peer)
        raise
    if not isinstance(answer, Accept | Refuse):
        raise TypeError(f"before_upgrade must return Accept or Refuse, not {type(answer).__name__}")
    return answer


async def run_drain(drain: Drain | None) -> None:
    """Await a program's own `drain`. Its failure is reported, and so is one that a cancellation would hide."""
    try:
        if drain is not None:
            await drain()
    except Exception as error:
        report_error(error, phase="draining")
    except BaseException as ending:
        report_hidden(ending, phase="draining")
        raise
