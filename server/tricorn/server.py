"""The server: what runs beside the connections, and the order in which all of it ends."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, TypedDict, Unpack

import trio
from trio import current_time, move_on_after, sleep

from tricorn.errors.report import report_error
from tricorn.listening.accept import Acceptor, accept_forever, listen
from tricorn.listening.asgi import AsgiWebSockets
from tricorn.listening.http import Hypercorn, upgrade_required
from tricorn.settings import Settings
from tricorn.transport.native import keep_alive
from tricorn.transport.poller import best_poller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from socket import socket as Socket

    from hypercorn.config import Config

    from tricorn.connection import Cancellable, Handler, Kept
    from tricorn.listening.accept import Address
    from tricorn.listening.http import ASGIApp

DEFAULTS = Settings()

BATCH = 100  # connections that are closed together
BATCH_PAUSE = 0.005  # seconds between two batches, in which the one before is through


class Server:
    """Connections, what watches over them, and their end.

    The connections live in a nursery that is shielded from whatever cancels the server, so that they can be ended in
    order: no more are accepted, `drain` is awaited, then every connection is closed with 1012, all in `drain_timeout`.
    Where they are many it is in batches, so that their clients do not come back all at once.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        settings: Settings = DEFAULTS,
        subprotocols: Sequence[str] = (),
        path: str | None = None,
        app: ASGIApp | None = None,
        drain: Callable[[], Awaitable[None]] | None = None,
        config: Config | None = None,
    ) -> None:
        self._settings = settings
        self._drain = drain
        self._transports: dict[Kept, Cancellable] = {}  # with what closes it with 1012
        self._http = None
        # WebSockets inside TLS and HTTP/2
        self._inside = AsgiWebSockets(handler, self._transports, settings, subprotocols=subprotocols, path=path)
        if app is not None or config is not None:
            self._http = Hypercorn(app or upgrade_required, self._inside, settings, config)
        self._readiness = best_poller()
        self._router = Acceptor(
            handler,
            self._readiness,
            self._transports,
            settings,
            subprotocols=subprotocols,
            path=path,
            http=self._http,
        )
        self._draining = trio.CancelScope(shield=True)
        self._holding = trio.CancelScope()

    async def serve(self, listeners: list[Socket], task_status: trio.TaskStatus[list[Address]]) -> None:
        """Serve on listening sockets until cancelled, and close them; the started value is their addresses."""
        try:
            async with trio.open_nursery() as nursery:
                with trio.CancelScope(shield=True):  # cancelled, this start would leave its shielded task behind
                    connections: trio.Nursery = await nursery.start(self._hold_connections)
                try:
                    async with trio.open_nursery() as accepting:
                        for listener in listeners:
                            accepting.start_soon(accept_forever, listener, connections, self._router.serve)
                        task_status.started([listener.getsockname()[:2] for listener in listeners])
                finally:
                    self._holding.deadline = current_time() + self._settings.drain_timeout
                    _close(listeners)
                    await self._wind_down()
                    connections.cancel_scope.cancel()
        finally:
            _close(listeners)

    def abort(self) -> None:
        """Close every socket at once. For the second signal."""
        self._draining.cancel()
        self._holding.cancel()
        for transport in list(self._transports):
            transport.abort()

    async def _hold_connections(self, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        """The connections' nursery inside that of what they need until the last of them has ended."""
        with trio.CancelScope(shield=True):  # ends with the connections, and those have a deadline
            async with trio.open_nursery() as support:
                await support.start(self._readiness.run)
                support.start_soon(keep_alive, self._transports, self._settings)
                support.start_soon(self._inside.attend)
                app = nullcontext() if self._http is None else self._http.lifespan()
                with self._holding:
                    async with app, trio.open_nursery() as connections:
                        task_status.started(connections)
                        await trio.sleep_forever()
                support.cancel_scope.cancel()

    async def _wind_down(self) -> None:
        """Let the program's own `drain` and HTTP end what they have going, then close connections, batch by batch.

        Leaves `close_timeout` for the last of them. The batches have at least half of the time, where they need it.
        """
        time = self._settings.drain_timeout - self._settings.close_timeout
        with self._draining:
            self._draining.deadline = current_time() + time
            with move_on_after(time - min(time / 2, self._pauses() * BATCH_PAUSE)):
                await self._run_drain()
            await self._close_in_batches()

    async def _run_drain(self) -> None:
        try:
            if self._drain is not None:
                await self._drain()
        except Exception as error:
            report_error(error, phase="draining")
        if self._http is not None:
            await self._http.drain()

    def _pauses(self) -> int:
        """How many pauses there are between the batches."""
        return max(len(self._transports) - 1, 0) // BATCH

    async def _close_in_batches(self) -> None:
        scopes = list(self._transports.values())
        left = max(self._draining.deadline - current_time(), 0.0)
        pause = min(BATCH_PAUSE, left / max(self._pauses(), 1))
        for index, scope in enumerate(scopes):
            if index and index % BATCH == 0:
                await sleep(pause)
            scope.cancel()


class Options(TypedDict, total=False):
    """The options of `serve`, `serve_until_signal` and `run`.

    settings: times and limits of the server.
    subprotocols: those that the handler speaks; the first that a client offers of them is agreed on.
    path: the one path where WebSockets are, other upgrades get 404; None, the default, is any path.
    app: an ASGI app for every request that is not an upgrade; without one they get 426. Its lifespan is run.
    drain: is awaited when accepting has stopped and before connections are closed.
    config: Hypercorn's, for TLS and HTTP: what of it counts is in docs/operations.md.
    """

    settings: Settings
    subprotocols: Sequence[str]
    path: str | None
    app: ASGIApp | None
    drain: Callable[[], Awaitable[None]] | None
    config: Config | None


async def serve(
    handler: Handler,
    port: int,
    host: str = "127.0.0.1",
    *,
    task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
    **options: Unpack[Options],
) -> None:
    """Serve WebSockets in a program's own nursery: `addresses = await nursery.start(tricorn.serve, handler, 8080)`.

    `handler` is called with each `WebSocket`, in that connection's own nursery. Port 0 takes a free one; the started
    value is the list of (host, port) listened on. The options are those of `Options`.

    Cancelling it is closing it: accepting stops, `drain` is awaited, every connection is closed with 1012, and after at
    most `settings.drain_timeout` seconds it is over, whatever the peers do.

    Raises:
        OSError: an address cannot be found or bound, or a file of `config` cannot be read.
        LifespanFailureError: of Hypercorn, in an ExceptionGroup: the app did not start up.
    """
    server = Server(handler, **options)
    await server.serve(await listen(port, host), task_status)


async def serve_until_signal(
    handler: Handler,
    listeners: list[Socket],
    *,
    task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
    **options: Unpack[Options],
) -> None:
    """Like `serve`, on listening sockets, until SIGTERM or SIGINT; a second signal aborts every socket at once."""
    server = Server(handler, **options)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as serving:
                nursery.start_soon(_obey, signals, serving, server)
                await server.serve(listeners, task_status)
            nursery.cancel_scope.cancel()


def run(handler: Handler, port: int, host: str = "127.0.0.1", **options: Unpack[Options]) -> None:
    """Serve WebSockets until SIGTERM or SIGINT: `trio.run` of `serve` with signals. The arguments are those of `serve`.

    Returns once everything is closed, within `settings.drain_timeout` seconds of the signal; a second signal closes
    every socket at once.

    Neither this nor `serve` watches what a program imports after start-up. If yours should be watched, await
    `tricorn.errors.drill.drill` first, and call this in a block of `tricorn.errors.import_guard.guarded`.

    Raises:
        OSError: an address cannot be found or bound.
    """
    trio.run(partial(_run, handler, port, host, **options))


async def _run(handler: Handler, port: int, host: str, **options: Unpack[Options]) -> None:
    await serve_until_signal(handler, await listen(port, host), **options)


async def _obey(signals: AsyncIterator[int], serving: trio.CancelScope, server: Server) -> None:
    async for _ in signals:
        if serving.cancel_called:
            server.abort()
        serving.cancel()


def _close(listeners: list[Socket]) -> None:
    for listener in listeners:
        listener.close()
