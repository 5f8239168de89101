"""Accept sockets, read request heads, and route: WebSocket upgrades to the codec, the rest to the ASGI app."""

from __future__ import annotations

import socket
from contextlib import suppress
from errno import EMFILE, ENFILE, ENOBUFS, ENOMEM
from functools import partial
from http import HTTPStatus
from socket import AF_UNIX, IPPROTO_TCP, SHUT_WR, TCP_NODELAY
from typing import TYPE_CHECKING, Any

import trio
from trio import move_on_after, sleep
from trio.lowlevel import wait_readable, wait_writable

from tricorn.asgi_handler import AsgiHandler, websocket_scope
from tricorn.errors.report import report, report_error
from tricorn.listening.capacity import AtCapacity, Capacity, PeerCapacity
from tricorn.protocol.deflate import negotiate
from tricorn.protocol.handshake import (
    UPGRADE,
    Head,
    accept,
    check_upgrade,
    offered_extensions,
    refuse,
    wants_websocket,
)
from tricorn.request import Refuse
from tricorn.transport.flow_control import READ_DEFLATED, READ_SIZE
from tricorn.transport.native import NativeTransport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from tricorn.asgi_handler import Handler
    from tricorn.connection import Connection
    from tricorn.listening.http import Hypercorn
    from tricorn.listening.site import Site
    from tricorn.request import Accept, Request
    from tricorn.transport.native import Wire
    from tricorn.transport.poller import Poller
    from tricorn.websocket import WebSocket

    Peer = tuple[str, int] | None  # None on a Unix socket

READ_HEAD = READ_DEFLATED  # bytes: behind the head there may be messages already
HEAD_TOO_LARGE = (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, HTTPStatus.REQUEST_URI_TOO_LONG)
ACCEPT_AT_ONCE = 64  # then others get their turn
PAUSE = 0.1  # seconds without accepting when descriptors or memory ran out
SPARE = 128  # sockets beyond max_connections: to read heads from, and for pages and health


async def accept_forever(
    listener: socket.socket,
    connections: trio.Nursery,
    serve: Callable[[socket.socket, tuple[str, int] | None], Awaitable[None]],
) -> None:
    """Start a task in `connections` for every socket accepted. Runs until cancelled."""
    short = False
    while True:
        await wait_readable(listener)
        for _ in range(ACCEPT_AT_ONCE):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in (EMFILE, ENFILE, ENOBUFS, ENOMEM):
                    if not short:
                        report("WARNING", f"cannot accept connections for now: {error}")
                    short = True
                    await sleep(PAUSE)
                    break
                continue  # this peer is gone already
            short = False
            sock.setblocking(False)
            connections.start_soon(serve, sock, address[:2] if isinstance(address, tuple) else None)


class Acceptor:
    """Serves accepted sockets, each from its first byte to its end."""

    def __init__(self, site: Site, poller: Poller, http: Hypercorn | None) -> None:
        settings, metrics = site.settings, site.metrics
        self._site = site
        self._poller = poller
        self._http = http
        self._sockets = Capacity(settings.max_connections + SPARE, "max_connections", metrics)
        self._peers = PeerCapacity(settings.peer_connections, metrics)
        self._handshakes = _Handshakes(settings.max_handshakes, "max_handshakes", metrics)

    async def serve(self, sock: socket.socket, peer: Peer) -> None:
        """Serve one socket until it is closed. Raises no Exception. If cancelled, closes it in the proper way.

        A socket for which there is no room is answered and closed at once, which is not a checkpoint.
        """
        site = self._site
        head = Head(site.settings.max_head_bytes)
        try:
            with self._sockets, self._peers.of(peer):
                upgraded = await self._answer(sock, peer, head)
                if upgraded is not None:
                    transport, connection, websocket, handler = upgraded
                    del upgraded  # it would be kept as long as the connection
                    try:
                        await connection.run(handler, websocket)
                    finally:
                        site.forget(connection)
                        transport.forget()
        except AtCapacity as full:
            _turn_away(sock, refuse(full, head))
        except OSError:
            pass  # the peer is gone
        except Exception as error:  # a bug of ours: it ends this connection and nothing else
            report_error(error, peer=peer)
        finally:
            sock.close()

    async def _answer(
        self, sock: socket.socket, peer: Peer, head: Head
    ) -> tuple[NativeTransport, Connection, WebSocket[Any], Handler] | None:
        """Answer the request on a socket. If that upgraded it, return what is to be run, with the head forgotten."""
        if self._http is not None and self._http.does_tls:
            await self._http.serve(sock, peer, b"")
            return None
        asked = None  # an application, which decides by itself and stays until the connection has ended
        try:
            with self._handshakes:
                request = await self._read_head(sock, peer, head)
                if request is not None and wants_websocket(request):
                    check_upgrade(request)
                    handler, accepted = await self._site.admit(request)
                    if sock.family != AF_UNIX:
                        sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
                    if not isinstance(handler, AsgiHandler):
                        return *upgrade(sock, self._poller, self._site, head, request, accepted), handler
                    asked = request, handler, accepted
            if asked is not None:
                await self._serve_asgi(sock, head, *asked)
            elif request is None and not head.is_http2:
                pass  # the peer went before it had said what it wants
            elif self._http is not None:
                await self._http.serve(sock, peer, head.data)
            else:
                raise Refuse(HTTPStatus.UPGRADE_REQUIRED, "this is a WebSocket server", UPGRADE)
        except AtCapacity:
            raise
        except Refuse as refused:
            if refused.status in HEAD_TOO_LARGE:
                self._site.metrics.limit_hits.add("max_head_bytes")
            await self._refuse(sock, refuse(refused, head))
        return None

    async def _serve_asgi(
        self, sock: socket.socket, head: Head, request: Request, handler: AsgiHandler, accepted: Accept
    ) -> None:
        site = self._site
        await handler.serve(
            websocket_scope(request, sock.getsockname()),
            accepted,
            partial(self._run_upgraded, sock, head, request),
            state=site.state_of(handler.app),
            settings=site.settings,
            deciding=self._handshakes,
        )

    async def _run_upgraded(
        self, sock: socket.socket, head: Head, request: Request, accepted: Accept, handler: Handler
    ) -> None:
        site = self._site
        site.require_capacity()  # others may have come while the application decided
        transport, connection, websocket = upgrade(sock, self._poller, site, head, request, accepted)
        try:
            await connection.run(handler, websocket)
        finally:
            site.forget(connection)
            transport.forget()

    async def _read_head(self, sock: socket.socket, peer: Peer, head: Head) -> Request | None:
        """Return None if there will be no head that we can read: the stream ended, or it is HTTP/2."""
        with move_on_after(self._site.settings.handshake_timeout):
            while True:
                await wait_readable(sock)
                data = sock.recv(READ_HEAD)
                if not data:
                    return None
                request = head.receive_data(data, peer)
                if request is not None or head.is_http2:
                    return request
        if not head.data:
            return None
        raise Refuse(HTTPStatus.REQUEST_TIMEOUT, "the request head did not come in time")

    async def _refuse(self, sock: socket.socket, response: bytes) -> None:
        """Send a response and wait for the peer's end: closed with something unread, the socket would take it back."""
        with move_on_after(self._site.settings.close_timeout):
            while response := response[sock.send(response) :]:  # nothing was sent before, so there is room for some
                await wait_writable(sock)
            sock.shutdown(SHUT_WR)
            while True:
                await wait_readable(sock)
                if not sock.recv(READ_SIZE):
                    return


class _Handshakes(Capacity):
    """Room for sockets in their handshake, which are counted as connecting."""

    def __enter__(self) -> None:
        super().__enter__()
        self._metrics.connecting += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._metrics.connecting -= 1


def upgrade(
    wire: Wire, poller: Poller, site: Site, head: Head, request: Request, accepted: Accept
) -> tuple[NativeTransport, Connection, WebSocket[Any]]:
    """Send the 101 response to a request that was admitted, and make its connection; end that with `site.forget`.

    Raises:
        Refuse: its header of extensions is malformed.
    """
    agreement = None
    offers = offered_extensions(request)
    if site.settings.deflate != "off":
        agreement = negotiate(offers, takeover=site.settings.deflate == "takeover")
    extensions = agreement.header() if agreement else None
    wire.send(accept(request, accepted, extensions))  # nothing was sent before, so there is room
    transport = NativeTransport(wire, head.finish(), poller, site.settings, site.metrics, agreement)
    return transport, *site.connect(transport, request, accepted)


def _turn_away(sock: socket.socket, response: bytes) -> None:
    """Send a response and wait for nothing: where there is no room, nothing more may be spent.

    What has come is read first, since what is closed with something unread may take the response back.
    """
    with suppress(OSError):
        sock.recv(READ_SIZE)
    with suppress(OSError):
        sock.send(response)
