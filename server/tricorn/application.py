"""The server as an ASGI application, for `hypercorn -k trio`: its lifespan, what watches over it, and how it ends."""

from __future__ import annotations

from math import inf
from operator import methodcaller
from sys import modules
from typing import TYPE_CHECKING, Any

import trio
from trio import current_time, move_on_at, sleep
from trio.lowlevel import current_task, in_trio_run

from tricorn.errors.report import report_hidden
from tricorn.listening.asgi import AsgiWebSockets
from tricorn.listening.http import lifespans, upgrade_required
from tricorn.listening.site import Site, run_drain
from tricorn.settings import LISTENER, Settings, require_defaults
from tricorn.transport.descriptors import Descriptors, Ends
from tricorn.transport.sockets import shut_down

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tricorn.asgi_handler import ASGIApp
    from tricorn.listening.site import Handlers
    from tricorn.request import BeforeUpgrade
    from tricorn.transport.asgi import Reach

DEFAULTS = Settings()

LOOK = 0.2  # seconds between two looks whether the worker has begun to end
MARGIN = 0.3  # seconds that Hypercorn has left when the last socket is closed
NOT_TRIO = "Tricorn needs Trio: start it with hypercorn -k trio"


def asgi_app(
    handler: Handlers,
    *,
    settings: Settings = DEFAULTS,
    before_upgrade: BeforeUpgrade | None = None,
    subprotocols: Sequence[str] = (),
    app: ASGIApp | None = None,
    drain: Callable[[], Awaitable[None]] | None = None,
) -> ASGIApp:
    """Make an ASGI 3.0 application that serves WebSockets to `handler`, for Hypercorn on Trio.

    The arguments are those of `tricorn.serve`. The application needs its lifespan: an app around it has to pass that
    on. When the worker is told to end, `drain` is awaited and every connection closed with 1012, all within Hypercorn's
    `graceful_timeout` and `settings.drain_timeout`, whichever is shorter; how much of that is for `drain` is what
    `settings.close_timeout` leaves of it, or half.

    `settings.handshake_timeout` is the hook's; how a request head comes in, and compression, is between Hypercorn and
    the client. Pings are Hypercorn's too (`websocket_ping_interval`); that a peer has vanished is found by TCP's
    keepalive, in `ping_interval` and `ping_timeout`. WebSockets over HTTP/2 get 501.

    Raises:
        SettingError: you changed a setting that has no effect here: `deflate`, or one of `settings.LISTENER`.
    """
    require_defaults(settings, ("deflate", *LISTENER), "plain Hypercorn")
    site = Site(handler, settings, before_upgrade=before_upgrade, subprotocols=subprotocols)
    return Application(site, app=app, drain=drain)


class Application:
    """An ASGI application that serves a site.

    Attributes:
        metrics: its counters.
    """

    def __init__(self, site: Site, *, app: ASGIApp | None, drain: Callable[[], Awaitable[None]] | None) -> None:
        self.metrics = site.metrics
        self._site = site
        self._settings = site.settings
        self._app = app or site.app or upgrade_required
        self._state = site.state_of(self._app)
        self._drain = drain
        self._websockets = AsgiWebSockets(site)
        self._descriptors = Descriptors()
        self._answering: set[Reach] = set()  # the ways to the sockets of requests
        self._lives = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if not self._lives:
            raise RuntimeError("Tricorn's application is used without its lifespan: pass that on to it")
        reach = self._way_to_the_socket(scope)
        scope = self._site.proxies.scope(scope)
        if scope["type"] == "websocket":
            await self._websockets.serve(scope, receive, send, reach)
        else:
            self._answering.add(reach)
            try:
                await self._app(scope, receive, send)
            except BaseException as ending:
                report_hidden(ending, path=scope["path"])
                raise
            finally:
                self._answering.discard(reach)

    def _way_to_the_socket(self, scope: Any) -> Reach:
        if scope.get("client") is None or scope.get("server") is None:  # a Unix socket: it cannot be told from others
            return lambda what: True
        return self._descriptors.way(Ends(tuple(scope["client"]), tuple(scope["server"])))

    async def _live(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()  # lifespan.startup
        if not in_trio_run():
            await _fail(send, NOT_TRIO)
            return
        worker = _worker()
        state = scope.get("state", {})
        self._state.update(state)
        async with lifespans(self._site), trio.open_nursery() as nursery:
            state.update(self._state)
            nursery.start_soon(self._site.look_after)
            nursery.start_soon(self._websockets.attend)
            nursery.start_soon(self._end_with, worker)
            self._lives = True
            await send({"type": "lifespan.startup.complete"})
            await receive()  # lifespan.shutdown, when the last connection has ended
            self._lives = False
            nursery.cancel_scope.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _end_with(self, worker: trio.lowlevel.Task) -> None:
        """Drain, and close everything, as soon as the worker has begun to end.

        Hypercorn tells an app of that only when all is over. But then it puts a deadline on the nursery of its
        connections, and what it leaves when that passes are sockets that it cannot close.
        """
        while (deadline := _deadline(worker)) == inf:  # noqa: ASYNC110 (there is nothing that tells)
            await sleep(LOOK)
        deadline = min(deadline, current_time() + self._settings.drain_timeout + MARGIN)
        patience = deadline - MARGIN - current_time()
        with move_on_at(deadline - MARGIN - min(self._settings.close_timeout, patience / 2)):
            await run_drain(self._drain)
        with move_on_at(deadline - MARGIN):
            await self._websockets.close()
        for connection in list(self._site.connections):
            connection.transport.abort()
        for reach in self._answering:
            reach(shut_down)


def _worker() -> trio.lowlevel.Task:
    """The task that runs Hypercorn's worker: the one around this one, which runs the lifespan."""
    nursery = current_task().parent_nursery
    assert nursery is not None, "an application is not the main task"  # noqa: S101
    return nursery.parent_task


def _deadline(worker: trio.lowlevel.Task) -> float:
    return min(nursery.cancel_scope.deadline for nursery in worker.child_nurseries)


async def _fail(send: Any, problem: str) -> None:
    """Tell a server on asyncio that there will be no start, and Hypercorn so that it is one line and no traceback."""
    task = modules["asyncio"].current_task()
    task.add_done_callback(methodcaller("exception"))  # or asyncio shows what it thinks that nobody saw
    try:
        await send({"type": "lifespan.startup.failed", "message": problem})
    except Exception:
        raise SystemExit(f"tricorn: {problem}") from None
