"""Accept sockets, read request heads, and route: WebSocket upgrades to the codec, the rest to the ASGI app."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import replace
from errno import EMFILE, ENFILE, ENOBUFS, ENOMEM
from functools import partial
from http import HTTPStatus
from socket import AF_UNIX, IPPROTO_TCP, MSG_PEEK, SHUT_WR, TCP_NODELAY
from typing import TYPE_CHECKING, Any

import trio
from trio import Lock, move_on_after, sleep
from trio.lowlevel import wait_readable, wait_writable

from tricorn.asgi_handler import AsgiHandler, websocket_scope
from tricorn.errors.report import report, report_error
from tricorn.listening.capacity import AtCapacity, Capacity, PeerCapacity, require_memory
from tricorn.listening.http import Pages
from tricorn.listening.http2 import Http2
from tricorn.protocol.handshake import (
    UPGRADE,
    Head,
    accept,
    check_upgrade,
    refuse,
    wants_websocket,
)
from tricorn.protocol.http2 import REFUSAL
from tricorn.protocol.proxy import ProxyHeader
from tricorn.request import Refuse
from tricorn.transport.flow_control import READ_DEFLATED, READ_SIZE
from tricorn.transport.native import NativeTransport
from tricorn.transport.tls import TlsSocket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from ssl import SSLContext
    from types import TracebackType

    from tricorn.connection import Connection
    from tricorn.listening.http import Hypercorn
    from tricorn.listening.site import Site
    from tricorn.request import Accept, Request
    from tricorn.transport.native import Wire
    from tricorn.transport.poller import Poller
    from tricorn.websocket import Handler, WebSocket

    Upgraded = tuple[NativeTransport, Connection, WebSocket[Any], Handler]
    Peer = tuple[str, int] | None  # None on a Unix socket

READ_HEAD = READ_DEFLATED  # bytes: behind the head there may be messages already
HEAD_TOO_LARGE = (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, HTTPStatus.REQUEST_URI_TOO_LONG)
ACCEPT_AT_ONCE = 64  # then others get their turn
LOOK_FOR_MEMORY = 8  # sockets between two looks whether there is memory for more
PAUSE = 0.1  # seconds without accepting when descriptors or memory ran out
SPARE = 128  # sockets beyond max_connections: to read heads from, and for pages and health
SPARE_PAGES = SPARE // 2  # of these for pages, so that whoever holds them keeps no WebSocket out


async def accept_forever(
    listener: socket.socket,
    connections: trio.Nursery,
    serve: Callable[[socket.socket, tuple[str, int] | None], Awaitable[None]],
) -> None:
    """Start a task in `connections` for every socket accepted. Runs until cancelled."""
    short = False
    while True:
        await wait_readable(listener)
        for number in range(ACCEPT_AT_ONCE):
            try:
                if not number % LOOK_FOR_MEMORY:
                    require_memory()
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


class _Accepted:
    """An accepted socket: what carries it, whose it is, and its place among those of its peer.

    Attributes:
        peer: who connected, or for whom a proxy did (PROXY protocol).
        wire: the socket, or the TLS on it.
    """

    __slots__ = ("_capacity", "peer", "sock", "wire")

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        self.sock = sock
        self.peer = peer
        self.wire: Wire = sock
        self._capacity: Capacity | None = None

    def take(self, capacity: Capacity) -> None:
        """Take a place there, and leave the one before. Raises `AtCapacity`, and then the place stays the same."""
        if capacity is not self._capacity:
            capacity.__enter__()
            self.leave()
            self._capacity = capacity

    def leave(self) -> None:
        """Leave the place, if it has one."""
        if self._capacity is not None:
            self._capacity.__exit__(None, None, None)
            self._capacity = None


class Acceptor:
    """Serves accepted sockets, each from its first byte to its end.

    Every WebSocket is carried by the codec on the socket itself, or on the TLS that `tls` makes of it: also one whose
    upgrade follows other requests. Everything else goes to `http`, or is refused without that.
    """

    def __init__(self, site: Site, poller: Poller, http: Hypercorn | None, tls: SSLContext | None = None) -> None:
        settings, metrics = site.settings, site.metrics
        self._site = site
        self._poller = poller
        self._http = http
        self.tls = tls  # for the sockets that come from now on
        self._tls_turns = Lock()
        self._sockets = Capacity(settings.max_connections + SPARE, "max_connections", metrics)
        self._pages = Capacity(settings.max_connections + SPARE_PAGES, "max_connections", metrics)
        self._peers = PeerCapacity(settings.peer_connections, metrics, site.proxies)
        self._handshakes = _Handshakes(settings.max_handshakes, "max_handshakes", metrics)

    async def serve(self, sock: socket.socket, peer: Peer) -> None:
        """Serve one socket until it is closed. Raises no Exception. If cancelled, closes it in the proper way.

        A socket for which there is no room is answered and closed at once, which is not a checkpoint.
        """
        accepted = _Accepted(sock, peer)
        try:
            with self._sockets:
                accepted.take(self._peers.of(peer))
                if self.tls is not None:
                    accepted.wire = TlsSocket(sock, self.tls)
                following = await self._enter(accepted)
                if isinstance(following, Head):
                    await self._serve_pages(accepted, following)
                elif following is not None:
                    transport, connection, websocket, handler = following
                    del following  # it would be kept as long as the connection
                    try:
                        await connection.run(handler, websocket)
                    finally:
                        self._site.forget(connection)
                        transport.forget()
        except AtCapacity as full:
            self._turn_away(accepted.wire, refuse(full))
        except OSError:
            pass  # the peer is gone
        except Exception as error:  # a bug of ours: it ends this connection and nothing else
            report_error(error, peer=accepted.peer)
        finally:
            accepted.leave()
            accepted.wire.close()

    async def _serve_pages(self, accepted: _Accepted, head: Head) -> None:
        """Have requests answered, each after the one before, and then a WebSocket, if the last one is its upgrade."""
        assert self._http is not None  # noqa: S101
        sock = accepted.sock
        local = None if sock.family == AF_UNIX else sock.getsockname()[:2]
        arguments = self._http, accepted.wire, accepted.peer, local
        with self._pages:
            if head.is_http2:
                http2 = Http2(*arguments, secure=True)
                async with http2.run():
                    await http2.serve(head.data)
                return
            pages = Pages(*arguments, secure=self.tls is not None)
            async with pages.run():
                following: Head | Upgraded | None = head
                while isinstance(following, Head):
                    if not await pages.answer(following):
                        return
                    accepted.take(self._peers.of(accepted.peer))  # until the next client of a proxy
                    if not (data := await pages.following()):
                        return
                    following = await self._go_on(accepted, data)
                if following is not None:
                    pages.give_away()
                    await self._run(*following)

    async def _go_on(self, accepted: _Accepted, data: bytes) -> Head | Upgraded | None:
        """The same as `_enter` for a request that follows others. Raises no Exception."""
        try:
            return await self._enter(accepted, data)
        except AtCapacity as full:
            self._turn_away(accepted.wire, refuse(full))
        except OSError:
            pass  # the peer is gone
        return None

    async def _serve_asgi(
        self, accepted: _Accepted, head: Head, request: Request, handler: AsgiHandler, answer: Accept
    ) -> None:
        site = self._site
        root_path = "" if self._http is None else self._http.config.root_path
        await handler.serve(
            websocket_scope(request, accepted.sock.getsockname(), root_path),
            answer,
            partial(self._run_upgraded, accepted.wire, head, request),
            state=site.state_of(handler.app),
            settings=site.settings,
            deciding=self._handshakes,
        )

    async def _run_upgraded(self, wire: Wire, head: Head, request: Request, accepted: Accept, handler: Handler) -> None:
        site = self._site
        site.require_capacity()  # others may have come while the application decided
        await self._run(*upgrade(wire, self._poller, site, head, request, accepted), handler)

    async def _run(
        self, transport: NativeTransport, connection: Connection, websocket: WebSocket[Any], handler: Handler
    ) -> None:
        try:
            await connection.run(handler, websocket)
        finally:
            self._site.forget(connection)
            transport.forget()

    async def _enter(self, accepted: _Accepted, data: bytes = b"") -> Head | Upgraded | None:
        """Read the head of a request that begins with `data`, and answer it if it is an upgrade, or to be refused.

        Return the WebSocket that it became, or the head of a request for a page, or None if it is over.
        """
        site, wire, sock = self._site, accepted.wire, accepted.sock
        head = Head(site.settings.max_head_bytes)
        asked = None  # an application, which decides by itself and stays until the connection has ended
        try:
            with self._handshakes:
                request = await self._read_head(accepted, head, data)
                if request is not None and wants_websocket(request):
                    self._check_host(request)
                    check_upgrade(request)
                    handler, answer = await site.admit(request)
                    if sock.family != AF_UNIX:
                        sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
                    if not isinstance(handler, AsgiHandler):
                        return *upgrade(wire, self._poller, site, head, request, answer), handler
                    asked = request, handler, answer
            if asked is not None:
                await self._serve_asgi(accepted, head, *asked)
            elif head.is_http2 and (self._http is None or data or _protocol(wire) != "h2"):
                await self._refuse(wire, REFUSAL)
            elif request is None and not head.is_http2:
                pass  # the peer went before it had said what it wants
            elif self._http is not None:
                return head
            else:
                raise Refuse(HTTPStatus.UPGRADE_REQUIRED, "this is a WebSocket server", UPGRADE)
        except AtCapacity:
            raise
        except Refuse as refused:
            if refused.status in HEAD_TOO_LARGE:
                site.metrics.limit_hits.add("max_head_bytes")
            await self._refuse(wire, refuse(refused, head))
        return None

    def _check_host(self, request: Request) -> None:
        if self._http is not None and not self._http.serves(request.headers.get("host", "")):
            raise Refuse(HTTPStatus.MISDIRECTED_REQUEST, "this server has another name")

    async def _read_head(self, accepted: _Accepted, head: Head, data: bytes) -> Request | None:
        """Return None if there will be no head that we can read: the stream ended, or it is HTTP/2."""
        site, wire = self._site, accepted.wire
        with move_on_after(site.settings.handshake_timeout):
            if site.settings.proxy_protocol and not data and accepted.peer in site.proxies:
                await self._read_proxy_header(accepted)
            if isinstance(wire, TlsSocket) and not data:
                data = await wire.handshake(self._tls_turns)
            while True:
                if data:
                    request = head.receive_data(data, accepted.peer)
                    if head.is_http2:
                        return None
                    if request is not None:
                        if isinstance(wire, TlsSocket):
                            request = replace(request, secure=True, certificate=wire.certificate)
                        request = site.proxies.request(request)
                        accepted.take(self._peers.of(request.peer))
                        return request
                await wait_readable(wire.fileno())
                try:
                    data = wire.recv(READ_HEAD)
                except BlockingIOError:  # half a record of TLS
                    data = b""
                    continue
                if not data:
                    return None
        if not head.data:
            return None
        raise Refuse(HTTPStatus.REQUEST_TIMEOUT, "the request head did not come in time")

    async def _read_proxy_header(self, accepted: _Accepted) -> None:
        """Find out for whom a proxy connected. Takes nothing of what comes after that, which may be TLS."""
        sock, header = accepted.sock, ProxyHeader()
        while not header.complete:
            await wait_readable(sock)
            with suppress(BlockingIOError):
                data = sock.recv(READ_SIZE, MSG_PEEK)
                if not data:
                    raise ConnectionResetError("the proxy left without a header")
                sock.recv(header.receive_data(data))
        if header.client is not None:
            accepted.peer = header.client
            accepted.take(self._peers.of(accepted.peer))

    async def _refuse(self, wire: Wire, response: bytes) -> None:
        """Send a response and wait for the peer's end: closed with something unread, the socket would take it back."""
        if not self._can_answer(wire):
            return
        with move_on_after(self._site.settings.close_timeout):
            while response := response[_send_some(wire, response) :]:
                await wait_writable(wire.fileno())
            wire.shutdown(SHUT_WR)
            while True:
                await wait_readable(wire.fileno())
                with suppress(BlockingIOError):
                    if not wire.recv(READ_SIZE):
                        return

    def _turn_away(self, wire: Wire, response: bytes) -> None:
        """Send a response and wait for nothing: where there is no room, nothing more may be spent.

        What has come is read first, since what is closed with something unread may take the response back.
        """
        if not self._can_answer(wire):
            return
        with suppress(OSError):
            wire.recv(READ_SIZE)
        with suppress(OSError):
            wire.send(response)

    def _can_answer(self, wire: Wire) -> bool:
        return self.tls is None or (isinstance(wire, TlsSocket) and wire.ready)


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
    agreement = site.agree(request)
    extensions = agreement.header() if agreement else None
    response = accept(request, accepted, extensions)
    unsent = response[_send_some(wire, response) :]
    transport = NativeTransport(wire, head.finish(), poller, site.settings, site.metrics, agreement, unsent=unsent)
    return transport, *site.connect(transport, request, accepted)


def _send_some(wire: Wire, response: bytes) -> int:
    """Send as much as there is room for: earlier responses may still be on their way to a slow peer."""
    try:
        return wire.send(response)
    except BlockingIOError:
        return 0


def _protocol(wire: Wire) -> str | None:
    return wire.protocol if isinstance(wire, TlsSocket) else None
