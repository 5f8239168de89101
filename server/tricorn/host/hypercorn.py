"""The guarded hand-over: everything that is not a plain WebSocket upgrade is served by Hypercorn, on our stream.

Hypercorn 0.18 shields its writes without a deadline, and lets some of its errors out. Here each connection has a stream
whose writes are bounded and which is aborted when the connection is cancelled, and its errors end it alone.
`TCPServer`, `WorkerContext` and `ConnectionState` are not its public interface: the version range in pyproject.toml is
tight, and the tests of this module use them against the real thing.
"""

from __future__ import annotations

from contextlib import suppress
from socket import SO_LINGER, SOL_SOCKET
from typing import TYPE_CHECKING, Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from trio import Event

from ..report import report_error
from .native import RESET

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from socket import socket as Socket

    from ..settings import Settings

    ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]  # ASGI 3.0; frameworks differ in how they type it


class Hypercorn:
    """Serves HTTP/1.1 and HTTP/2 connections whose first bytes have been read already, to an ASGI app."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = ASGIWrapper(_guarded(app))
        self._stall_timeout = settings.stall_timeout
        self._config = Config()
        self._config.include_server_header = False
        self._config.h11_max_incomplete_size = settings.max_head_bytes
        self._config.accesslog = None
        self._config.errorlog = None
        self._context = WorkerContext(None)
        self._serving = 0  # connections
        self._one_ended = Event()

    async def drain(self) -> None:
        """Close what is idle, and everything else behind its next response, and wait for that. May be cancelled."""
        await self._context.terminated.set()
        while self._serving:
            self._one_ended = Event()
            await self._one_ended.wait()

    async def serve(self, sock: Socket, peer: tuple[str, int], head: bytes) -> None:
        """Serve one connection until it ends. If cancelled, the socket is aborted."""
        stream = _Guarded(sock, head, self._stall_timeout)
        self._serving += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.abort_when_cancelled)
                await TCPServer(
                    self._app,
                    self._config,
                    self._context,
                    ConnectionState({}),
                    stream,  # type: ignore[arg-type]
                ).run()
                nursery.cancel_scope.cancel()
        except* Exception as errors:
            report_error(errors, peer=peer)
        finally:
            stream.abort()
            self._serving -= 1
            self._one_ended.set()


class _Guarded(trio.abc.HalfCloseableStream):
    """A socket as a Trio stream: begins with bytes read before, bounds each send, and can be aborted."""

    def __init__(self, sock: Socket, head: bytes, stall_timeout: float) -> None:
        self.socket = trio.socket.from_stdlib_socket(sock)
        self._stream = trio.SocketStream(self.socket)
        self._head = head
        self._stall_timeout = stall_timeout

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            await trio.lowlevel.checkpoint()
            return head
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
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

    def abort(self) -> None:
        with suppress(OSError):
            self.socket.setsockopt(SOL_SOCKET, SO_LINGER, RESET)
        self.socket.close()

    async def abort_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.abort()


def _guarded(app: ASGIApp) -> ASGIApp:
    """Report what the app raises, for which Hypercorn answers with 500, and deny the WebSockets inside what is handed
    over: those of HTTP/2, and upgrades behind another request."""

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000, "reason": None})
            return
        try:
            await app(scope, receive, send)
        except Exception as error:
            report_error(error, path=scope["path"])
            raise

    return guarded
