"""Pages: every request that is no WebSocket upgrade is answered by an ASGI app, with Hypercorn's HTTP in between.

Hypercorn never sees a WebSocket: it gets one HTTP/1.1 request at a time, whose head has been read and judged like that
of every other. Reading and writing are ours: each wait for a peer has a deadline, an error ends its connection alone,
and after each answer the next request may go another way.

`H11Protocol`, `TaskGroup`, `Lifespan`, `WorkerContext` and `ConnectionState` are not Hypercorn's public interface: the
version range in pyproject.toml is tight, and the tests of this module use them against the real thing.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager, suppress
from copy import copy
from functools import partial
from math import inf
from socket import SHUT_WR
from typing import TYPE_CHECKING, Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from trio import CancelScope, Event, fail_after, move_on_after, sleep_forever
from trio.lowlevel import checkpoint, notify_closing, wait_readable, wait_writable

from tricorn.errors.chain import ENDINGS, in_order, is_any, is_group, traceback_of
from tricorn.errors.failures import leaves
from tricorn.errors.report import report, report_error, report_hidden
from tricorn.errors.text import title
from tricorn.protocol.forwarded import TrustedProxies
from tricorn.transport.flow_control import READ_DEFLATED, READ_SIZE
from tricorn.transport.sockets import reset_when_closed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tricorn.asgi_handler import ASGIApp as ASGIApp
    from tricorn.listening.site import Site
    from tricorn.metrics import ServerMetrics
    from tricorn.protocol.handshake import Head
    from tricorn.settings import Settings
    from tricorn.transport.native import Wire

    Address = tuple[str, int] | None

OURS = "tricorn"
BELOW = ("hypercorn", "h2", "h11", "hpack", "hyperframe", "priority", "wsproto")  # packages that read what a peer sends
REASON_MAX = 200  # characters of what a peer did wrong


class Hypercorn:
    """What answers requests that are no WebSocket upgrades.

    `config` is Hypercorn's own. What the settings bound as well goes by the settings. Somebody else runs the app's
    lifespan.

    Attributes:
        config: the same with that.
        context: whether the server drains, as Hypercorn wants it.
        state: what the app's lifespan shares with its requests.
    """

    def __init__(
        self, app: ASGIApp, state: dict[str, Any], settings: Settings, metrics: ServerMetrics, config: Config | None
    ) -> None:
        config = Config() if config is None else copy(config)
        self._app = app
        self._proxies = TrustedProxies(settings.trusted_proxies)
        self._server_names = frozenset(config.server_names)
        config.server_names = []  # Hypercorn would never end a connection that asks for another name
        config.include_server_header = False
        config.h11_max_incomplete_size = settings.max_head_bytes
        config.h2_max_header_list_size = settings.max_head_bytes
        config.accesslog = None
        config.errorlog = None
        self.config = config
        self.settings = settings
        self.metrics = metrics
        self.context = WorkerContext(None)
        self.state = state
        self._exchanges: set[Exchange] = set()  # those that draining waits for
        self._one_left = Event()

    async def drain(self) -> None:
        """Close what is idle, and everything else after its next response, and wait for that. May be cancelled."""
        await self.context.terminated.set()
        for exchange in self._exchanges:
            exchange.drain()
        while self._exchanges:
            self._one_left = Event()
            await self._one_left.wait()

    def enter(self, exchange: Exchange) -> None:
        """Have draining wait for an exchange."""
        self._exchanges.add(exchange)

    def leave(self, exchange: Exchange) -> None:
        """Have draining not wait for it any more."""
        self._exchanges.discard(exchange)
        self._one_left.set()

    def serves(self, host: str) -> bool:
        """Whether a Host is among Hypercorn's `server_names`, or there are none."""
        return not self._server_names or host in self._server_names

    async def answer(self, exchange: Exchange, scope: Any, receive: Any, send: Any) -> None:
        """Have the app answer a request. Raises what the app raises, for which Hypercorn answers with 500."""
        scope = self._proxies.scope(scope)
        try:
            if scope["type"] != "http":  # RFC 8441, which is not offered
                await send({"type": "websocket.close"})
            elif not self.serves(_host(scope)):
                await send({"type": "http.response.start", "status": 421, "headers": [(b"content-length", b"0")]})
                await send({"type": "http.response.body", "body": b""})
            else:
                await self._app(scope, exchange.in_time(receive), send)
        except Exception as error:
            report_error(error, path=scope["path"])
            raise
        except BaseException as ending:
            report_hidden(ending, path=scope["path"])
            raise


def _host(scope: Any) -> str:
    for name, value in scope["headers"]:
        if name.lower() in (b"host", b":authority"):
            return str(value, "latin-1")
    return ""


class Exchange:
    """Requests and responses on one connection."""

    def __init__(self, http: Hypercorn, wire: Wire, peer: Address, local: Address, *, secure: bool) -> None:
        self._http = http
        self._wire = wire
        self._peer = peer
        self._local = local
        self._secure = secure
        self._stall_timeout = http.settings.stall_timeout
        self._over = False  # nothing more is to be sent or received
        self._reading = CancelScope()  # around waiting for what comes
        self._writing = trio.Lock()
        self._tasks: TaskGroup

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Hold what answers the requests. Raises no Exception, and whatever happened, the connection is closed then.

        If cancelled, it is aborted.
        """
        http = self._http
        http.enter(self)
        try:
            async with TaskGroup() as self._tasks:
                try:
                    protocol = await self._start()
                    yield
                    self._close()
                    await protocol.handle(Closed())
                except trio.Cancelled:
                    self._abort()
                    raise
                finally:
                    http.leave(self)
        except* Exception as errors:
            if is_of_a_peer(errors):
                _report_peer(errors, peer=self._peer)
            else:
                report_error(errors, peer=self._peer)
        finally:
            self._close()

    async def _start(self) -> Any:
        """Make and start the protocol."""
        raise NotImplementedError

    def drain(self) -> None:
        """Close the connection if it is idle."""
        raise NotImplementedError

    def in_time(self, receive: Any) -> Any:
        """Return `receive` for an app, bounded as long as that waits for the peer: until the request is complete."""
        complete = False
        patience = min(self._stall_timeout, self._http.config.read_timeout or inf)

        async def receive_in_time() -> Any:
            nonlocal complete
            with move_on_after(inf if complete else patience):
                event = await receive()
                complete = not event.get("more_body")
                return event
            self._abort()
            return {"type": "http.disconnect"}

        return receive_in_time

    def _arguments(self) -> tuple[Any, ...]:
        """What Hypercorn makes its protocols of."""
        http = self._http
        return (
            ASGIWrapper(partial(http.answer, self)),
            http.config,
            http.context,
            self._tasks,
            ConnectionState(http.state.copy()),
            self._secure,
            self._peer,
            self._local,
            self._event,
        )

    async def _event(self, event: object) -> None:
        """What Hypercorn's protocols tell their server."""
        if isinstance(event, RawData):
            with CancelScope(shield=True):  # an app that is cancelled leaves no half of a response
                async with self._writing:
                    await self._write(event.data)
        elif isinstance(event, Closed):
            self._end()
        elif isinstance(event, Updated):
            self._updated(idle=event.idle)

    def _updated(self, *, idle: bool) -> None:
        raise NotImplementedError

    async def _write(self, data: bytes) -> None:
        await checkpoint()
        view = memoryview(data)
        try:
            while view and not self._over:
                with suppress(BlockingIOError):
                    view = view[self._wire.send(view) :]
                if view:
                    with fail_after(self._stall_timeout):
                        await wait_writable(self._wire.fileno())
        except trio.TooSlowError:
            self._abort()
        except (OSError, trio.ClosedResourceError):
            self._end()

    async def _read(self, size: int) -> bytes:
        """Return what comes next; b"" if nothing does."""
        try:
            while True:
                await wait_readable(self._wire.fileno())
                with suppress(BlockingIOError):
                    return self._wire.recv(size)
        except (OSError, trio.ClosedResourceError):
            return b""

    def _end(self) -> None:
        self._over = True
        self._reading.cancel()

    def _abort(self) -> None:
        with suppress(OSError):
            reset_when_closed(self._wire)
        self._close()

    def _close(self) -> None:
        self._end()
        if self._wire.fileno() >= 0:
            notify_closing(self._wire.fileno())
            self._wire.close()


class Pages(Exchange):
    """The requests of an HTTP/1.1 connection, one after the other."""

    _protocol: H11Protocol

    async def _start(self) -> H11Protocol:
        self._protocol = H11Protocol(*self._arguments())
        self._waits = False  # for the next request
        self._answered = False
        self._following = b""  # what came of the next request
        await self._protocol.initiate()
        return self._protocol

    async def answer(self, head: Head) -> bool:
        """Have a request answered; return whether the connection can carry another one."""
        self._http.enter(self)
        self._answered = False
        with CancelScope() as self._reading:
            data = head.request()
            while data:
                if head.complete:
                    self._following = head.finish()
                await self._protocol.handle(RawData(data))
                if head.complete:
                    await self._watch()
                    break
                data = await self._read(READ_SIZE)
                if data:
                    data = head.request(data)
            self._over = True
        if not head.complete:
            await self._linger()
        return self._answered and not self._over

    async def following(self) -> bytes:
        """Return the beginning of the next request; b"" if there is none within `keep_alive_timeout`, or ever."""
        data, self._following = self._following, b""
        if not data and not self._http.context.terminated.is_set():
            self._waits = True
            with move_on_after(self._http.config.keep_alive_timeout) as self._reading:
                data = await self._read(READ_DEFLATED)
            self._waits = False
        self._http.leave(self)
        return data

    def give_away(self) -> None:
        """Have nothing to do with the connection any more."""
        self._over = True

    def drain(self) -> None:
        if self._waits:
            self._reading.cancel()

    def _updated(self, *, idle: bool) -> None:
        if idle:
            self._answered = True
            self._reading.cancel()

    async def _watch(self) -> None:
        """Look out for the peer's end until the answer is complete, and keep what comes of the next request."""
        while len(self._following) < self._http.settings.max_head_bytes:
            data = await self._read(READ_DEFLATED)
            if not data:
                self._over = True
                return
            self._following += data
        await sleep_forever()

    async def _linger(self) -> None:
        """Wait for the peer's end: closed with something unread, the socket would take the response back."""
        with move_on_after(self._http.settings.close_timeout), suppress(OSError):
            self._wire.shutdown(SHUT_WR)
            while await self._read(READ_SIZE):
                pass


def is_of_a_peer(error: BaseException) -> bool:
    """Return whether an error came about in Hypercorn, or below it, on nothing but what a peer has sent.

    Hypercorn does not handle all that its protocols raise, and loses track of streams in a flood.
    """
    errors = [each for each in in_order(error) if not is_group(each) and not is_any(each, ENDINGS)]
    return all(_came_about_below_us(each) and not is_any(each, (MemoryError,)) for each in errors)


def _came_about_below_us(error: BaseException) -> bool:
    package, place = None, traceback_of(error)
    while place is not None:
        name = str(place.tb_frame.f_globals.get("__name__")).partition(".")[0]
        if name in BELOW or name == OURS:
            package = name
        place = place.tb_next
    return package in BELOW


def _report_peer(error: BaseException, **fields: Any) -> None:
    """Report a mistake of a peer: no stack trace, and the last error, as those before it quote what was sent."""
    reason = title(next(leaves(error)))
    report("WARNING", f"the peer broke the protocol: {reason[:REASON_MAX]}", **fields)


@asynccontextmanager
async def lifespans(site: Site, config: Config | None = None) -> AsyncIterator[None]:
    """Run the lifespan of each of a site's applications around the block. Raises what `lifespan` raises."""
    async with AsyncExitStack() as stack:
        for app, state in site.apps:
            await stack.enter_async_context(lifespan(app, state, config))
        yield


@asynccontextmanager
async def lifespan(app: ASGIApp, state: dict[str, Any], config: Config | None = None) -> AsyncIterator[None]:
    """An app's lifespan, around the block; `state` is what it shares with its requests. An app may have none.

    Raises, in a group as nurseries do, what keeps the app from starting up or from shutting down.
    """
    if config is None:
        config = Config()
        config.errorlog = None
    ended = Event()
    async with trio.open_nursery() as nursery:
        living = Lifespan(ASGIWrapper(app), config, state)
        await nursery.start(_live, living, ended)
        await living.wait_for_startup()
        if living.shutdown.is_set():  # the app returned, has no lifespan, or failed to start up
            await ended.wait()
        yield
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # it has returned already
            await living.wait_for_shutdown()
        nursery.cancel_scope.cancel()


async def _live(living: Lifespan, ended: trio.Event, task_status: trio.TaskStatus[None]) -> None:
    await living.handle_lifespan(task_status=task_status)
    ended.set()


async def upgrade_required(scope: Any, receive: Any, send: Any) -> None:
    """The app of a server that has none."""
    if scope["type"] == "lifespan":
        while True:
            await send({"type": f"{(await receive())['type']}.complete"})
    body = b"this is a WebSocket server\n"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    if scope["http_version"] == "1.1":  # RFC 9113 §8.2.2: HTTP/2 has no such header
        headers.append((b"upgrade", b"websocket"))
    await send({"type": "http.response.start", "status": 426, "headers": headers})
    await send({"type": "http.response.body", "body": body})
