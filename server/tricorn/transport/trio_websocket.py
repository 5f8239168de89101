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

from tricorn.connection import WebSocket
from tricorn.errors.report import report_error
from tricorn.protocol.handshake import Refused, accept, as_request, check, choose_subprotocol
from tricorn.settings import Settings
from tricorn.transport.native import NativeTransport, keep_alive
from tricorn.transport.stream import StreamSocket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from trio_websocket import WebSocketConnection, WebSocketRequest

    from tricorn.connection import Handler
    from tricorn.protocol.handshake import Request

DEFAULTS = Settings()


def adapt(
    handler: Handler, *, settings: Settings = DEFAULTS, subprotocols: Sequence[str] = (), path: str | None = None
) -> Callable[[WebSocketRequest], Awaitable[None]]:
    """Make a handler for trio-websocket of one for Tricorn. The arguments are those of `tricorn.serve`.

    What it returns raises no Exception, but for a TypeError where the stream is not on a socket. If it is cancelled, as
    by whatever cancels `serve_websocket`, the connection is closed with 1012, within `settings.close_timeout`.

    What happens before the request is there is trio-websocket's: its `connect_timeout` holds, not
    `settings.handshake_timeout`, and it bounds neither heads nor how many connections there are. Of what comes after,
    `max_message_size`, `message_queue_size` and `receive_buffer_size` mean nothing.
    """

    async def serve(request: WebSocketRequest) -> None:
        try:
            asked = _as_asked(request)
            check(asked, path, settings.origins)
        except Refused as refused:
            headers = [(name.encode(), value.encode()) for name, value in refused.headers.items()]
            with suppress(ConnectionClosed):
                await request.reject(refused.status, extra_headers=headers, body=f"{refused}\n".encode())
            return
        connection = request._connection
        stream, connection._stream = connection._stream, cast(trio.abc.Stream, _Gone())
        sock = _socket(stream)
        notify_closing(sock)  # so that trio-websocket's reader ends; it stays open
        try:
            await _serve(_TakenOver(stream, connection), sock, asked)
        except* (OSError, trio.BrokenResourceError):
            pass  # the peer is gone
        except* Exception as errors:  # a bug of ours: it ends this connection and nothing else
            report_error(errors, path=asked.path)
        finally:
            sock.close()

    async def _serve(stream: _TakenOver, sock: trio.socket.SocketType, request: Request) -> None:
        peer = sock.getpeername()[:2]
        subprotocol = choose_subprotocol(request, subprotocols)
        await stream.send_all(accept(request, subprotocol))  # nothing was sent before, so there is room
        wire = StreamSocket(stream, sock)
        transport = NativeTransport(wire, b"", wire, settings)
        websocket = WebSocket(
            transport,
            peer=peer,
            path=request.path,
            query=request.query,
            headers=request.headers,
            subprotocol=subprotocol,
            close_timeout=settings.close_timeout,
        )
        async with trio.open_nursery() as support:
            with trio.CancelScope(shield=True):  # cancelled, this start would leave its shielded task behind
                supporting = await support.start(partial(_support, wire, transport, settings))
            try:
                await websocket.run(handler)
            finally:
                supporting.cancel()

    return serve


async def _support(
    wire: StreamSocket, transport: NativeTransport, settings: Settings, task_status: trio.TaskStatus[trio.CancelScope]
) -> None:
    """What a connection needs until it has ended, also when it is cancelled."""
    with trio.CancelScope(shield=True) as scope:  # ends with the connection, and that has a deadline
        async with trio.open_nursery() as nursery:
            await nursery.start(wire.run)
            nursery.start_soon(keep_alive, {transport}, settings)
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


def _as_asked(request: WebSocketRequest) -> Request:
    """The request's head as the client sent it, which trio-websocket has taken apart."""
    headers = [(b"host", request._event.host.encode("latin-1")), *request.headers]
    if request.proposed_subprotocols:
        headers.append((b"sec-websocket-protocol", ", ".join(request.proposed_subprotocols).encode()))
    return as_request(b"GET", request.path, b"1.1", headers)
