"""The server: what runs beside the connections, and the order in which all of it ends."""

from __future__ import annotations

import signal
from functools import partial
from socket import SO_ACCEPTCONN, SOL_SOCKET
from typing import TYPE_CHECKING, Any

import trio
from trio import current_time, move_on_after, sleep

from tricorn.errors.last_resort import LastResort, exit_in_time
from tricorn.errors.report import report_error
from tricorn.listening.accept import Acceptor, accept_forever
from tricorn.listening.binds import addresses, close_all, listen, listen_on
from tricorn.listening.http import Hypercorn, lifespans, upgrade_required
from tricorn.listening.site import Site, run_drain
from tricorn.protocol.phase import Phase
from tricorn.settings import Settings
from tricorn.transport.poller import best_poller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from socket import socket as Socket
    from ssl import SSLContext

    from hypercorn.config import Config

    from tricorn.asgi_handler import ASGIApp
    from tricorn.listening.binds import Address
    from tricorn.listening.site import Drain, Handlers
    from tricorn.metrics import ServerMetrics
    from tricorn.request import BeforeUpgrade
    from tricorn.websocket import WebSocket

DEFAULTS = Settings()

BATCH = 100  # connections that are closed together
BATCH_PAUSE = 0.005  # seconds between two batches, in which the one before is through


class Server:
    """A server that runs: the value that `nursery.start(tricorn.serve, …)` returns.

    The connections live in a nursery that is shielded from whatever cancels the server, so that they can be ended in
    order: no more are accepted, `drain` is awaited, then every connection is closed with 1012, all in `drain_timeout`.
    Many connections are closed in batches, so that their clients do not come back all at once.

    Attributes:
        addresses: what the server listens on: (host, port) for each address, or the path of a Unix socket.
    """

    def __init__(
        self,
        site: Site,
        listeners: list[Socket],
        *,
        app: ASGIApp | None = None,
        drain: Drain | None = None,
        config: Config | None = None,
        ssl_context: SSLContext | None = None,
    ) -> None:
        self.addresses: list[Address] = addresses(listeners)
        for listener in listeners:
            listener.setblocking(False)
        self._site = site
        self._settings = site.settings
        self._listeners = listeners
        self._drain = drain
        self._http = None
        app = app or site.app
        if app is not None or config is not None:
            app = app or upgrade_required
            self._http = Hypercorn(app, site.state_of(app), site.settings, site.metrics, config)
        self._config = config if self._http is None else self._http.config
        self._poller = best_poller()
        self._make_tls = None if ssl_context or config is None else config.create_ssl_context
        tls = self._make_tls() if self._make_tls else ssl_context
        self._acceptor = Acceptor(site, self._poller, self._http, tls)
        self._serving = trio.CancelScope()
        self._draining = trio.CancelScope(shield=True)
        self._holding = trio.CancelScope()
        self._over = trio.Event()

    @property
    def connections(self) -> frozenset[WebSocket[Any]]:
        """The connections that are open now, as their handlers hold them."""
        connections = self._site.connections.items()
        return frozenset(websocket for connection, websocket in connections if connection.phase is Phase.OPEN)

    @property
    def metrics(self) -> ServerMetrics:
        """The counters of this server."""
        return self._site.metrics

    async def close(self) -> None:
        """Close the server as cancelling it does, and wait until it is closed, for at most `drain_timeout` seconds.

        If cancelled, the server closes all the same. Closing it again only waits.
        """
        self._serving.cancel()
        await self._over.wait()

    def reload(self) -> None:
        """Read the certificate of `config` again, for connections that come from now on. Not a checkpoint.

        If it cannot be used, the one before stays, and the error is reported.
        """
        if self._make_tls is None or self._acceptor.tls is None:
            return
        try:
            self._acceptor.tls = self._make_tls()
        except Exception as error:
            report_error(error, action="reading the certificate again; the one before stays")

    def begin_closing(self) -> None:
        """Have the server close; the second time, close every socket at once. Not a checkpoint."""
        if self._serving.cancel_called:
            self._draining.cancel()
            self._holding.cancel()
            for connection in list(self._site.connections):
                connection.transport.abort()
        self._serving.cancel()

    async def serve(self, task_status: trio.TaskStatus[Server]) -> None:
        """Serve until cancelled or closed."""
        try:
            with self._serving:
                await self._serve(task_status)
        finally:
            close_all(self._listeners)
            self._over.set()

    async def _serve(self, task_status: trio.TaskStatus[Server]) -> None:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope(shield=True):  # cancelled, this start would leave its shielded task behind
                connections: trio.Nursery = await nursery.start(self._hold_connections)
            try:
                async with trio.open_nursery() as accepting:
                    for listener in self._listeners:
                        accepting.start_soon(accept_forever, listener, connections, self._acceptor.serve)
                    task_status.started(self)
            finally:
                self._holding.deadline = current_time() + self._settings.drain_timeout
                close_all(self._listeners)
                await self._wind_down()
                connections.cancel_scope.cancel()

    async def _hold_connections(self, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        """The connections' nursery inside that of what they need until the last of them has ended."""
        with trio.CancelScope(shield=True):  # ends with the connections, and those have a deadline
            async with trio.open_nursery() as support:
                await support.start(self._poller.run)
                support.start_soon(self._site.look_after)
                with self._holding:
                    async with lifespans(self._site, self._config), trio.open_nursery() as connections:
                        task_status.started(connections)
                        await trio.sleep_forever()
                support.cancel_scope.cancel()

    async def _wind_down(self) -> None:
        """Let the program's own `drain` and HTTP end what they have going, then close connections, batch by batch.

        Leaves `close_timeout` for the last of them. The batches have at least half of the time, if they need it.
        """
        time = self._settings.drain_timeout - self._settings.close_timeout
        with self._draining:
            self._draining.deadline = current_time() + time
            with move_on_after(time - min(time / 2, self._pauses() * BATCH_PAUSE)):
                await run_drain(self._drain)
                if self._http is not None:
                    await self._http.drain()
            await self._close_in_batches()

    def _pauses(self) -> int:
        """How many pauses there are between the batches."""
        return max(len(self._site.connections) - 1, 0) // BATCH

    async def _close_in_batches(self) -> None:
        connections = list(self._site.connections)
        left = max(self._draining.deadline - current_time(), 0.0)
        pause = min(BATCH_PAUSE, left / max(self._pauses(), 1))
        for index, connection in enumerate(connections):
            if index and index % BATCH == 0:
                await sleep(pause)
            connection.cancel()


async def serve(
    handler: Handlers,
    port: int | None = None,
    host: str = "127.0.0.1",
    *,
    bind: Sequence[str] = (),
    listeners: Sequence[Socket] = (),
    settings: Settings = DEFAULTS,
    before_upgrade: BeforeUpgrade | None = None,
    subprotocols: Sequence[str] = (),
    app: ASGIApp | None = None,
    ssl_context: SSLContext | None = None,
    config: Config | None = None,
    drain: Drain | None = None,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve WebSockets in a nursery of yours: `server = await nursery.start(tricorn.serve, handler, 8080)`.

    The started value is the `Server`. Cancelling this, or `server.close()`, closes it: accepting stops, `drain` is
    awaited, every connection is closed with 1012, and after at most `settings.drain_timeout` seconds it is over,
    whatever the peers do.

    Args:
        handler: called with each `WebSocket`, in that connection's own nursery; or what `asgi_handler` returns, for the
            WebSockets of an ASGI application; or a mapping of either by path, with 404 for every other path.
        port: the port to listen on; 0 takes a free one.
        host: an address or a host name; every address that it has is listened on, on one port. `localhost` has one of
            IPv4 and one of IPv6; "" is every address of the machine.
        bind: further addresses: `HOST:PORT`, `[IPV6]:PORT`, `:PORT` for every address of the machine, `unix:PATH`,
            or `fd:N` for a socket that another program has opened.
        listeners: sockets that are bound and listen. The server closes them.
        settings: times and limits.
        before_upgrade: asked before each upgrade, for at most `settings.handshake_timeout` seconds: returns `Accept` or
            `Refuse`, or raises `Refuse`. Its place is to authenticate, and to choose subprotocol, headers and state.
        subprotocols: those that the handler speaks, if there is no `before_upgrade`: the first that a client offers of
            them is agreed on.
        app: an ASGI 3.0 application for every request that is not an upgrade; without one they get 426. If the handler
            is an `asgi_handler` (and not a mapping), its application by default. The lifespan of each application is
            run once: an application that also has WebSockets has to be the same object here and there.
        ssl_context: for TLS on all listeners. WebSockets come by HTTP/1.1; pages also by HTTP/2, if `h2` is among the
            context's ALPN protocols.
        config: Hypercorn's, for pages and TLS: what of it counts is in docs/operations.md.
        drain: awaited when accepting has stopped, before connections are closed.

    Raises:
        OSError: an address cannot be found or bound, or a file of `config` cannot be read.
        ValueError: there is nothing to listen on, or a text in `bind` is not an address.
        LifespanFailureError: of Hypercorn, in an ExceptionGroup: an application did not start up.
    """
    site = Site(handler, settings, before_upgrade=before_upgrade, subprotocols=subprotocols)
    make = partial(Server, site, app=app, ssl_context=ssl_context, config=config, drain=drain)
    server = await _bind(make, port, host, bind, listeners)
    await server.serve(task_status)


def run(
    handler: Handlers,
    port: int | None = None,
    host: str = "127.0.0.1",
    *,
    bind: Sequence[str] = (),
    listeners: Sequence[Socket] = (),
    settings: Settings = DEFAULTS,
    before_upgrade: BeforeUpgrade | None = None,
    subprotocols: Sequence[str] = (),
    app: ASGIApp | None = None,
    ssl_context: SSLContext | None = None,
    config: Config | None = None,
    drain: Drain | None = None,
) -> None:
    """Serve WebSockets until SIGTERM or SIGINT: `trio.run` of `serve`, with the same arguments, and signals.

    Returns once everything is closed, within `settings.drain_timeout` seconds of the signal; a second signal closes
    every socket at once. If a task or a thread does not end, the process exits with status 1 a second later, and a
    record and the stacks of all threads on stderr say which. SIGHUP has the certificate of `config` read again.

    Neither this nor `serve` watches what a program imports after start-up. If yours should be watched, await
    `tricorn.errors.drill.drill` first, and call this in a block of `tricorn.errors.import_guard.guarded`.

    Raises:
        OSError, ValueError: as `serve` does.
    """
    site = Site(handler, settings, before_upgrade=before_upgrade, subprotocols=subprotocols)
    make = partial(Server, site, app=app, ssl_context=ssl_context, config=config, drain=drain)

    async def main() -> None:
        server = await _bind(make, port, host, bind, listeners)
        async with exit_in_time(settings.drain_timeout) as last_resort:
            await serve_until_signal(server, last_resort)

    trio.run(main)


async def serve_until_signal(
    server: Server,
    last_resort: LastResort,
    *,
    reload: Callable[[], None] = lambda: None,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until SIGTERM or SIGINT; a second signal closes every socket at once. If cancelled, the server closes.

    At SIGHUP the server reloads, and `reload` is called for what else is to be read again.
    """
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        last_resort.watch_signals()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, signals, server, reload)
            await server.serve(task_status)
            nursery.cancel_scope.cancel()


async def _obey(signals: AsyncIterator[int], server: Server, reload: Callable[[], None]) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            server.reload()
            reload()
        else:
            server.begin_closing()


async def _bind(
    make: Callable[[list[Socket]], Server],
    port: int | None,
    host: str,
    bind: Sequence[str],
    listeners: Sequence[Socket],
) -> Server:
    """Make a server that has everything it is to listen on. If that fails, nothing stays open."""
    bound = list(listeners)
    try:
        if port is not None:
            bound += await listen(port, host)
        bound += await listen_on(bind)
        if not bound:
            raise ValueError("there is nothing to listen on: give a port, `bind` or `listeners`")
        if not all(listener.getsockopt(SOL_SOCKET, SO_ACCEPTCONN) for listener in bound):
            raise ValueError("a socket in `listeners` does not listen")
        return make(bound)
    except BaseException:
        close_all(bound)
        raise
