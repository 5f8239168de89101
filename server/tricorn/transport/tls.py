"""TLS on a non-blocking socket, for the server's side: what acts like such a socket itself."""

from __future__ import annotations

from contextlib import suppress
from socket import SHUT_RD, SHUT_WR
from ssl import MemoryBIO, SSLError, SSLWantReadError, SSLZeroReturnError
from typing import TYPE_CHECKING, Any

from trio.lowlevel import checkpoint, wait_readable, wait_writable

from tricorn.transport.flow_control import READ_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from socket import socket as Socket
    from ssl import SSLContext

    import trio

RECORD = 16384  # bytes; the most that one record carries (RFC 8446 §5.1)
CHUNK = 65536  # bytes that are encrypted at a time
ANSWERS_MAX = 65536  # bytes of what TLS itself answers that may wait for a peer which does not read


class TlsSocket:
    """Encrypts what is sent on a socket and decrypts what comes.

    It keeps back nothing that is decrypted, so a poller that watches the socket below sees everything that is to be
    read. `recv` may therefore return up to one record more than it is asked for. `send` counts a byte as sent as soon
    as the kernel has the whole record that carries it; until then it has to be called with the same data again.
    """

    def __init__(self, sock: Socket, context: SSLContext) -> None:
        self._socket = sock
        self._incoming = MemoryBIO()
        self._outgoing = MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._sealed = memoryview(b"")  # encrypted, and not with the kernel yet
        self._sealing = 0  # how many bytes of `send`'s data that is, with what is in `_outgoing`
        self._ended = False  # nothing more comes
        self._error: SSLError | None = None  # why
        self._said_goodbye = False
        self.ready = False  # the handshake is done

    async def handshake(self, turns: trio.Lock) -> bytes:
        """Do the TLS handshake and return what the client sent right after it.

        `turns` is shared by all handshakes, so that their cryptography does not hold up the loop all at once. If
        cancelled, the socket can only be closed.

        Raises:
            OSError: the client is gone, or the handshake failed (`ssl.SSLError`).
        """
        while True:
            async with turns:
                await checkpoint()
                try:
                    self._tls.do_handshake()
                except SSLWantReadError:
                    done = False
                except SSLError:
                    with suppress(OSError):
                        self._push()  # the alert
                    raise
                else:
                    done = True
            while not self._pushed():
                await wait_writable(self._socket)
            if done:
                self.ready = True
                return self._open()
            await wait_readable(self._socket)
            if not self._fill(READ_SIZE):
                raise ConnectionResetError("the client left the TLS handshake")

    @property
    def protocol(self) -> str | None:
        """The protocol that ALPN chose (RFC 7301), or None."""
        return self._tls.selected_alpn_protocol()

    @property
    def certificate(self) -> Mapping[str, Any] | None:
        """The client's certificate as `ssl.SSLSocket.getpeercert` returns it, or None."""
        return self._tls.getpeercert() or None

    # A socket

    def fileno(self) -> int:
        return self._socket.fileno()

    def recv(self, size: int, /) -> bytes:
        if not self._ended and self._fill(size):
            if opened := self._open():
                return opened
            if not self._ended:
                raise BlockingIOError
        if self._error is not None:
            raise self._error
        return b""

    def send(self, data: bytes | memoryview, /) -> int:
        sent = 0
        while True:
            if not self._pushed():
                if sent:
                    return sent
                raise BlockingIOError
            sent += self._sealing
            self._sealing = 0
            if sent == len(data):
                return sent
            piece = memoryview(data)[sent : sent + CHUNK]
            self._tls.write(piece)
            self._sealing = len(piece)

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None:
        self._socket.setsockopt(level, option, value)

    def shutdown(self, how: int, /) -> None:
        if how == SHUT_WR:
            self._say_goodbye()
        self._socket.shutdown(how)

    def close(self) -> None:
        self._say_goodbye()
        self._socket.close()

    # Inside

    def _fill(self, size: int) -> bool:
        """Read; return False at the end. That need not be said in TLS too: RFC 6455 and HTTP say where they end.

        OpenSSL is not told, since it would then send nothing either.
        """
        data = self._socket.recv(size)
        self._incoming.write(data)
        self._ended = not data
        return not self._ended

    def _open(self) -> bytes:
        """Decrypt all that came."""
        pieces = []
        try:
            while piece := self._tls.read(RECORD):
                pieces.append(piece)
            self._ended = True
        except SSLWantReadError:
            pass
        except SSLZeroReturnError:
            self._ended = True
        except SSLError as error:
            self._ended = True
            self._error = error
        if self._outgoing.pending:
            self._pushed()
            if self._outgoing.pending > ANSWERS_MAX:
                raise OSError("the peer makes TLS answer and does not read")
        if self._ended and pieces:
            with suppress(OSError):
                self._socket.shutdown(SHUT_RD)  # so that whoever watches the socket comes back for the end
        return b"".join(pieces)

    def _push(self) -> None:
        """Hand the kernel what is encrypted. Raises BlockingIOError if it does not take everything."""
        while self._sealed or self._outgoing.pending:
            if not self._sealed:
                self._sealed = memoryview(self._outgoing.read())
            self._sealed = self._sealed[self._socket.send(self._sealed) :]

    def _pushed(self) -> bool:
        try:
            self._push()
        except BlockingIOError:
            return False
        return True

    def _say_goodbye(self) -> None:
        """Send close_notify (RFC 8446 §6.1) if that needs no waiting for the end of a record."""
        if not self._said_goodbye:
            self._said_goodbye = True
            if not self._sealed:
                with suppress(OSError):
                    self._tls.unwrap()
                with suppress(OSError):
                    self._push()
