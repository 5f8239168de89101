"""Connections for programs that embed trio-websocket: `serve_websocket(adapt(handler), …)`.

trio-websocket 0.12 accepts, does TLS and reads the request head. There it is taken over: the codec, the connection and
all that they promise are those of the native host, on trio-websocket's stream. Its own connection lets a crash in a
handler, and a ping behind its close frame, end the whole server, and a cancelled send leave half a frame.

What is used is not all its public interface: the version range in pyproject.toml is tight, and the tests of this module
use it against the real thing.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, cast

import trio
from trio.lowlevel import checkpoint, notify_closing
from trio_websocket import ConnectionClosed

from tricorn.asgi_handler import AsgiHandler
from tricorn.errors.report import report_error
from tricorn.listening.site import Site
from tricorn.protocol.handshake import accept, as_request, check_upgrade, refusal
from tricorn.request import Refuse
from tricorn.settings import LISTENER, Settings, require_defaults
from tricorn.transport.keep_alive import Reaper, keep_alive
from tricorn.transport.native import NativeTransport
from tricorn.transport.stream import StreamSocket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from trio_websocket import WebSocketConnection, WebSocketRequest

    from tricorn.connection import Connection
    from tricorn.listening.site import Handlers
    from tricorn.protocol.deflate import Agreement
    from tricorn.request import Accept, BeforeUpgrade, Request
    from tricorn.websocket import Handler

DEFAULTS = Settings()


def adapt(
    handler: Handlers,
    *,
    settings: Settings = DEFAULTS,
    before_upgrade: BeforeUpgrade | None = None,
    subprotocols: Sequence[str] = (),
) -> Callable[[WebSocketRequest], Awaitable[None]]:
    """Make a handler for trio-websocket of one for Tricorn. The arguments are those of `tricorn.serve`.

    What it returns raises no Exception, but for a TypeError where the stream is not on a socket. If it is cancelled, as
    by whatever cancels `serve_websocket`, the connection is closed with 1012, within `settings.close_timeout`.

    What happens before the request is there is trio-websocket's: its `connect_timeout` holds, not
    `settings.handshake_timeout`, which is the hook's. After that, `max_message_size`, `message_queue_size` and
    `receive_buffer_size` have no effect. Neither has `settings.drain_timeout`: your program decides when it ends.

    Raises:
        TypeError: the handler is an `asgi_handler`, or one of them is: nothing here runs an application's lifespan.
        SettingError: you changed a setting that has no effect here, one of `settings.LISTENER`.
    """
    require_defaults(settings, LISTENER, "trio-websocket")
    site = Site(handler, settings, before_upgrade=before_upgrade, subprotocols=subprotocols)
    if site.apps:
        raise TypeError("trio-websocket cannot serve an ASGI application, whose lifespan it does not run: use serve")

    async def serve(request: WebSocketRequest) -> None:
        sock = _socket(request._connection._stream)
        refused = False
        try:
            asked = site.proxies.request(_as_asked(request, _peer(sock)))
            try:
                check_upgrade(asked)
                admitted, accepted = await site.admit(asked)
                assert not isinstance(admitted, AsgiHandler)  # noqa: S101
            except Refuse as refusal:
                refused = True  # and what is left is trio-websocket's to do
                await _reject(request, refusal)
            else:
                agreement = site.agree(asked)
                connection = request._connection
                stream, connection._stream = connection._stream, cast(trio.abc.Stream, _Gone())
                notify_closing(sock)  # so that trio-websocket's reader ends; it stays open
                await _serve(_TakenOver(stream, connection), sock, asked, admitted, accepted, agreement)
        except* (OSError, trio.BrokenResourceError, ConnectionClosed):
            pass  # the peer is gone
        except* Exception as errors:  # a bug of ours: it ends this connection and nothing else
            report_error(errors, path=request.path)
        finally:
            if not refused:
                sock.close()

    async def _serve(
        stream: _TakenOver,
        sock: trio.socket.SocketType,
        request: Request,
        admitted: Handler,
        accepted: Accept,
        agreement: Agreement | None,
    ) -> None:
        # Nothing was sent before, so there is room.
        await stream.send_all(accept(request, accepted, agreement.header() if agreement else None))
        wire = StreamSocket(stream, sock)
        transport = NativeTransport(wire, b"", wire, settings, site.metrics, agreement)
        reaper = Reaper()
        connection, websocket = site.connect(transport, request, accepted, reaper)
        try:
            async with trio.open_nursery() as support:
                with trio.CancelScope(shield=True):  # cancelled, this start would leave its shielded task behind
                    supporting = await support.start(partial(_support, wire, connection, reaper, settings))
                try:
                    await connection.run(admitted, websocket)
                finally:
                    supporting.cancel()
        finally:
            site.forget(connection)

    return serve


async def _reject(request: WebSocketRequest, refused: Refuse) -> None:
    headers, body = refusal(refused)
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    await request.reject(refused.status, extra_headers=raw, body=body)


async def _support(
    wire: StreamSocket,
    connection: Connection,
    reaper: Reaper,
    settings: Settings,
    task_status: trio.TaskStatus[trio.CancelScope],
) -> None:
    """What a connection needs until it has ended, also when it is cancelled."""
    with trio.CancelScope(shield=True) as scope:  # ends with the connection, and that has a deadline
        async with trio.open_nursery() as nursery:
            await nursery.start(wire.run)
            nursery.start_soon(keep_alive, {connection}, settings)
            nursery.start_soon(reaper.run)
            task_status.started(scope)


class _TakenOver:
    """trio-websocket's stream, behind what its reader has read of it.

    That stays in h11, since the handshake is never finished there.
    """

    def __init__(self, stream: trio.abc.Stream, connection: WebSocketConnection) -> None:
        self.send_all = stream.send_all
        self._stream = stream
        self._connection: WebSocketConnection | None = connection  # as long as its reader may read

    async def receive_some(self, max_bytes: int) -> bytes | bytearray:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(ConnectionClosed):
                await connection.get_message()  # there is none: this waits for the reader's end
            rest: bytes = connection._wsproto.handshake._h11_connection.trailing_data[0]
            if rest:
                return rest
        return await self._stream.receive_some(max_bytes)


class _Gone:
    """What trio-websocket has instead of its stream: closed."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        raise trio.ClosedResourceError

    async def aclose(self) -> None:
        await checkpoint()


def _socket(stream: trio.abc.Stream) -> trio.socket.SocketType:
    if isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    if not isinstance(stream, trio.SocketStream):
        raise TypeError(f"connections are on sockets, with TLS or without, not on a {type(stream).__name__}")
    return stream.socket


def _peer(sock: trio.socket.SocketType) -> tuple[str, int] | None:
    name = sock.getpeername()
    return name[:2] if isinstance(name, tuple) else None  # a Unix socket


def _as_asked(request: WebSocketRequest, peer: tuple[str, int] | None) -> Request:
    """The request's head as the client sent it, which trio-websocket has taken apart."""
    headers = [(b"host", request._event.host.encode("latin-1")), *request.headers]
    if request.proposed_subprotocols:
        headers.append((b"sec-websocket-protocol", ", ".join(request.proposed_subprotocols).encode()))
    if request._event.extensions:
        headers.append((b"sec-websocket-extensions", ", ".join(map(str, request._event.extensions)).encode("latin-1")))
    return as_request(b"GET", request.path, b"1.1", headers, peer)
