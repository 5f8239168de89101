"""The guarded hand-over: everything that is not a plain WebSocket upgrade is served by Hypercorn, on our stream.

Hypercorn 0.18 shields its writes without a deadline, and lets some of its errors out. Here each connection has a stream
whose writes are bounded and which is aborted when the connection is cancelled, and its errors end it alone.
`TCPServer`, `Lifespan`, `WorkerContext` and `ConnectionState` are not its public interface: the version range in
pyproject.toml is tight, and the tests of this module use them against the real thing.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager, suppress
from copy import copy
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from trio import CancelScope, Event, move_on_after, sleep_forever
from trio.lowlevel import checkpoint

from tricorn.errors.chain import ENDINGS, in_order, is_any, is_group, traceback_of
from tricorn.errors.failures import leaves
from tricorn.errors.report import report, report_error, report_hidden
from tricorn.errors.text import title
from tricorn.listening.asgi import PASSES
from tricorn.transport.sockets import reset_when_closed, shut_down

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from socket import socket as Socket
    from ssl import SSLContext

    from tricorn.asgi_handler import ASGIApp as ASGIApp
    from tricorn.listening.asgi import AsgiWebSockets
    from tricorn.listening.site import Site
    from tricorn.settings import Settings

# Past max_message_bytes the connection ends with 1009 and a record; past so many times as much Hypercorn has already
# closed it with 1009 by itself, and tells nobody.
SPARE_MESSAGE = 2

OURS = "tricorn"
BELOW = ("hypercorn", "h2", "h11", "hpack", "hyperframe", "priority", "wsproto")  # packages that read what a peer sends
REASON_MAX = 200  # characters of what a peer did wrong


class Hypercorn:
    """Serves connections whose first bytes have been read already: HTTP to an ASGI app, WebSockets to the router.

    `state` is what the app's lifespan shares with its requests; somebody else runs that. `config` is Hypercorn's own.
    What the settings bound as well goes by the settings.
    """

    def __init__(
        self,
        app: ASGIApp,
        state: dict[str, Any],
        websockets: AsgiWebSockets,
        settings: Settings,
        config: Config | None,
        ssl_context: SSLContext | None,
    ) -> None:
        self._app = app
        self._state = state
        self._websockets = websockets
        self._settings = settings
        config = Config() if config is None else copy(config)
        config.include_server_header = False
        config.h11_max_incomplete_size = settings.max_head_bytes
        config.websocket_max_message_size = SPARE_MESSAGE * settings.max_message_bytes
        config.websocket_ping_interval = None if settings.ping_interval == inf else settings.ping_interval
        config.ssl_handshake_timeout = settings.handshake_timeout
        config.accesslog = None
        config.errorlog = None
        self._config = config
        self._ssl_context = ssl_context or config.create_ssl_context()
        self._context = WorkerContext(None)
        self._serving: set[_Guarded] = set()  # those that carry requests only
        self._one_ended = Event()

    @property
    def does_tls(self) -> bool:
        """Whether connections begin with a TLS handshake, which is then Hypercorn's to do."""
        return self._ssl_context is not None

    async def drain(self) -> None:
        """Close what is idle, and everything else behind its next response, and wait for that. May be cancelled.

        What carries a WebSocket ends with that.
        """
        await self._context.terminated.set()
        while self._serving:
            self._one_ended = Event()
            await self._one_ended.wait()

    async def serve(self, sock: Socket, peer: tuple[str, int] | None, head: bytes) -> None:
        """Serve one connection until it ends. If cancelled, its WebSockets are closed with 1012, and it is aborted."""
        stream = _Guarded(sock, head, self._settings.stall_timeout)
        self._serving.add(stream)
        try:
            async with trio.open_nursery() as nursery:
                with CancelScope(shield=True) as serving:
                    nursery.start_soon(self._end_when_cancelled, serving, stream)
                    try:
                        await self._serve(stream)
                    finally:
                        serving.cancel()
                nursery.cancel_scope.cancel()
        except* Exception as errors:
            if is_of_a_peer(errors):
                _report_peer(errors, peer=peer)
            else:
                report_error(errors, peer=peer)
        finally:
            stream.abort()
            self._leave(stream)

    async def _serve(self, stream: _Guarded) -> None:
        app = ASGIWrapper(partial(self._answer, stream))
        wire: Any = stream
        if self._ssl_context is not None:
            wire = trio.SSLStream(stream, self._ssl_context, server_side=True, https_compatible=True)
        await TCPServer(app, self._config, self._context, ConnectionState(self._state.copy()), wire).run()

    async def _answer(self, stream: _Guarded, scope: Any, receive: Any, send: Any) -> None:
        try:
            if scope["type"] == "http":
                await self._app(scope, receive, send)
            elif scope["http_version"] == "2" or not await stream.was_refused():
                self._leave(stream)
                await self._websockets.serve(scope, receive, send, stream.reach)
        except Exception as error:  # for which Hypercorn answers with 500
            if scope["type"] == "websocket" and is_of_a_peer(error):  # our own application makes no mistake here
                _report_peer(error, path=scope["path"])
            else:
                report_error(error, path=scope["path"])
            raise
        except BaseException as ending:
            report_hidden(ending, path=scope["path"])
            raise

    def _leave(self, stream: _Guarded) -> None:
        self._serving.discard(stream)
        self._one_ended.set()

    async def _end_when_cancelled(self, serving: CancelScope, stream: _Guarded) -> None:
        try:
            await sleep_forever()
        finally:
            if not serving.cancel_called:
                with move_on_after(self._settings.close_timeout, shield=True):
                    await self._websockets.close()
                serving.cancel()
                stream.abort()


class _Guarded(trio.abc.HalfCloseableStream):
    """A socket as a Trio stream: begins with bytes read before, bounds each send, and can be aborted."""

    def __init__(self, sock: Socket, head: bytes, stall_timeout: float) -> None:
        self.socket = trio.socket.from_stdlib_socket(sock)
        self._stall_timeout = stall_timeout
        self._sent = 0  # writes
        self._stream = trio.SocketStream(self.socket)
        self._head = head

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            await trio.lowlevel.checkpoint()
            return head
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._sent += 1
        with trio.move_on_after(self._stall_timeout) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            self.abort()
            raise trio.BrokenResourceError("the peer stopped reading")

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def was_refused(self) -> bool:
        """For a WebSocket that has the stream to itself: whether Hypercorn refuses it, because of bytes behind it.

        Then it would tell nobody, and not close the stream either. Else the WebSocket watches over what is sent.
        """
        before = self._sent
        for _ in range(PASSES):
            await checkpoint()
        if self._sent == before:
            self._stall_timeout = inf
            return False
        self.reach(shut_down)
        return True

    def reach(self, what: Callable[[Any], None]) -> bool:
        """Call `what` with the socket; False where that failed as sockets do."""
        try:
            what(self.socket)
        except OSError:
            return False
        return True

    def abort(self) -> None:
        with suppress(OSError):
            reset_when_closed(self.socket)
        self.socket.close()


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
    ended = trio.Event()
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
