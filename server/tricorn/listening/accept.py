"""Accept sockets, read request heads, and route: WebSocket upgrades to the codec, the rest to the ASGI app."""

from __future__ import annotations

import socket
from contextlib import suppress
from errno import EMFILE, ENFILE, ENOBUFS, ENOMEM
from http import HTTPStatus
from socket import SHUT_WR
from typing import TYPE_CHECKING

import trio
from trio import move_on_after, sleep
from trio.lowlevel import wait_readable

from tricorn.connection import WebSocket
from tricorn.errors.report import report, report_error
from tricorn.listening.capacity import AtCapacity, Capacity, PeerCapacity, require_capacity
from tricorn.metrics import CONNECTIONS, LIMIT_HITS
from tricorn.protocol.deflate import negotiate
from tricorn.protocol.handshake import (
    UPGRADE,
    Head,
    Refused,
    accept,
    check,
    choose_subprotocol,
    offered_extensions,
    refuse,
    wants_websocket,
)
from tricorn.transport.native import READ_DEFLATED, READ_SIZE, NativeTransport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tricorn.connection import Cancellable, Handler, Kept
    from tricorn.listening.http import Hypercorn
    from tricorn.protocol.handshake import Request
    from tricorn.settings import Settings
    from tricorn.transport.poller import Poller

Address = tuple[str, int]

BACKLOG = 4096
READ_HEAD = READ_DEFLATED  # bytes: behind the head there may be messages already
HEAD_TOO_LARGE = (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, HTTPStatus.REQUEST_URI_TOO_LONG)
ACCEPT_AT_ONCE = 64  # then others get their turn
PAUSE = 0.1  # seconds without accepting when descriptors or memory ran out
SPARE = 128  # sockets beyond max_connections: to read heads from, and for pages and health


async def listen(port: int, host: str) -> list[socket.socket]:
    """Bind and listen on every address that the host has. Raises OSError like `bind`."""
    listeners = await bind(port, host)
    try:
        for listener in listeners:
            listener.listen(BACKLOG)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


async def bind(port: int, host: str) -> list[socket.socket]:
    """Bind every address that the host has.

    Raises:
        OSError: an address cannot be found or bound.
    """
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in found:
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setblocking(False)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


async def accept_forever(
    listener: socket.socket, connections: trio.Nursery, serve: Callable[[socket.socket, Address], Awaitable[None]]
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
            connections.start_soon(serve, sock, address[:2])


class Acceptor:
    """What becomes of an accepted socket."""

    def __init__(
        self,
        handler: Handler,
        readiness: Poller,
        transports: dict[Kept, Cancellable],
        settings: Settings,
        *,
        subprotocols: Sequence[str],
        path: str | None,
        http: Hypercorn | None,
    ) -> None:
        self._handler = handler
        self._readiness = readiness
        self._transports = transports
        self._settings = settings
        self._subprotocols = subprotocols
        self._path = path
        self._http = http
        self._sockets = Capacity(settings.max_connections + SPARE, "max_connections")
        self._peers = PeerCapacity(settings.peer_connections)
        self._handshakes = Capacity(settings.max_handshakes, "max_handshakes")

    async def serve(self, sock: socket.socket, peer: Address) -> None:
        """Serve one socket until it is closed. Raises no Exception. If cancelled, closes it in the proper way.

        Where there is no room for it, it is answered and closed at once, and no checkpoint.
        """
        head = Head(self._settings.max_head_bytes)
        try:
            with self._sockets, self._peers.of(peer[0]):
                upgraded = await self._answer(sock, peer, head)
                if upgraded is not None:
                    transport, websocket = upgraded
                    self._transports[transport] = websocket
                    try:
                        await websocket.run(self._handler)
                    finally:
                        del self._transports[transport]
                        transport.forget()
        except AtCapacity as full:
            _turn_away(sock, refuse(full, head))
        except OSError:
            pass  # the peer is gone
        except Exception as error:  # a bug of ours: it ends this connection and nothing else
            report_error(error, peer=peer)
        finally:
            sock.close()

    async def _answer(self, sock: socket.socket, peer: Address, head: Head) -> tuple[NativeTransport, WebSocket] | None:
        """Answer the request on a socket. Return what is to be run where that upgraded it, with the head forgotten."""
        if self._http is not None and self._http.does_tls:
            await self._http.serve(sock, peer, b"")
            return None
        try:
            with self._handshakes, CONNECTIONS.connecting():
                request = await self._read_head(sock, head)
            if request is not None and wants_websocket(request):
                check(request, self._path, self._settings.origins)
                require_capacity(len(self._transports), self._settings.max_connections, "max_connections")
                return self._upgrade(sock, peer, request, head)
            if request is None and not head.is_http2:
                pass  # the peer went before it had said what it wants
            elif self._http is not None:
                await self._http.serve(sock, peer, head.data)
            else:
                raise Refused(HTTPStatus.UPGRADE_REQUIRED, "this is a WebSocket server", UPGRADE)
        except AtCapacity:
            raise
        except Refused as refused:
            if refused.status in HEAD_TOO_LARGE:
                LIMIT_HITS.add("max_head_bytes")
            await self._refuse(sock, refuse(refused, head))
        return None

    async def _read_head(self, sock: socket.socket, head: Head) -> Request | None:
        """Return None where there will be no head that we can read: the stream ended, or it is HTTP/2."""
        with move_on_after(self._settings.handshake_timeout):
            while True:
                await wait_readable(sock)
                data = sock.recv(READ_HEAD)
                if not data:
                    return None
                request = head.receive_data(data)
                if request is not None or head.is_http2:
                    return request
        if not head.data:
            return None
        raise Refused(HTTPStatus.REQUEST_TIMEOUT, "the request head did not come in time")

    def _upgrade(
        self, sock: socket.socket, peer: Address, request: Request, head: Head
    ) -> tuple[NativeTransport, WebSocket]:
        subprotocol = choose_subprotocol(request, self._subprotocols)
        agreement = None
        offers = offered_extensions(request)
        if self._settings.deflate != "off":
            agreement = negotiate(offers, takeover=self._settings.deflate == "takeover")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        extensions = agreement.header() if agreement else None
        sock.send(accept(request, subprotocol, extensions))  # nothing was sent before, so there is room
        transport = NativeTransport(sock, head.finish(), self._readiness, self._settings, agreement)
        websocket = WebSocket(
            transport,
            peer=peer,
            path=request.path,
            query=request.query,
            headers=request.headers,
            subprotocol=subprotocol,
            close_timeout=self._settings.close_timeout,
        )
        return transport, websocket

    async def _refuse(self, sock: socket.socket, response: bytes) -> None:
        """Send a response and wait for the peer's end: closed with something unread, the socket would take it back."""
        with move_on_after(self._settings.close_timeout):
            sock.send(response)
            sock.shutdown(SHUT_WR)
            while True:
                await wait_readable(sock)
                if not sock.recv(READ_SIZE):
                    return


def _turn_away(sock: socket.socket, response: bytes) -> None:
    """Send a response and wait for nothing: where there is no room, nothing more may be spent.

    What has come is read first, since what is closed with something unread may take the response back.
    """
    with suppress(OSError):
        sock.recv(READ_SIZE)
    with suppress(OSError):
        sock.send(response)
