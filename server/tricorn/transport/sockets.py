"""What the kernel knows of a socket, and two ways to end one at once."""

from __future__ import annotations

from fcntl import ioctl
from socket import SHUT_RDWR, SO_LINGER, SOL_SOCKET
from struct import pack
from sys import byteorder
from termios import TIOCOUTQ
from typing import Any

_RESET = pack("ii", 1, 0)
_NUMBER = bytes(4)


def unconfirmed(descriptor: int) -> int:
    """Return how many of the bytes sent the peer's kernel has not confirmed yet; 0 if this kernel does not tell."""
    try:
        return int.from_bytes(ioctl(descriptor, TIOCOUTQ, _NUMBER), byteorder)
    except (OSError, ValueError):  # no socket, or one that is closed
        return 0


def reset_when_closed(sock: Any) -> None:
    """Have `sock.close()` send a RST and keep nothing for the peer. Raises OSError."""
    sock.setsockopt(SOL_SOCKET, SO_LINGER, _RESET)


def shut_down(sock: Any) -> None:
    """End both halves of the stream, whoever holds the socket. Raises OSError."""
    sock.shutdown(SHUT_RDWR)
