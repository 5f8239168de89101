"""Two ways to end a socket at once."""

from __future__ import annotations

from socket import SHUT_RDWR, SO_LINGER, SOL_SOCKET
from struct import pack
from typing import Any

_RESET = pack("ii", 1, 0)


def reset_when_closed(sock: Any) -> None:
    """Have `sock.close()` send a RST and keep nothing for the peer. Raises OSError."""
    sock.setsockopt(SOL_SOCKET, SO_LINGER, _RESET)


def shut_down(sock: Any) -> None:
    """End both halves of the stream, whoever holds the socket. Raises OSError."""
    sock.shutdown(SHUT_RDWR)
