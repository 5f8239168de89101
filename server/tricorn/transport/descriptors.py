"""The sockets of this process, found by their two addresses: ASGI gives an app no socket, and no other way to abort."""

from __future__ import annotations

from os import fstat, listdir
from socket import socket as Socket
from stat import S_ISSOCK
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

DESCRIPTORS = "/dev/fd"


class Ends(NamedTuple):
    """What tells a TCP connection from any other: each is host and port."""

    peer: tuple[str, int]
    own: tuple[str, int]


class Descriptors:
    """Remembers what the last search found, so that many connections cost one search."""

    def __init__(self) -> None:
        self._found: dict[Ends, int] = {}

    def act(self, ends: Ends, what: Callable[[Socket], None]) -> bool:
        """Call `what` with the socket of a connection; False where there is none, or where it failed as sockets do."""
        if _act(self._found.get(ends), ends, what):
            return True
        self._search()
        return _act(self._found.get(ends), ends, what)

    def _search(self) -> None:
        self._found = {}
        for name in listdir(DESCRIPTORS):
            ends = _ends(int(name))
            if ends is not None:
                self._found[ends] = int(name)


def _act(descriptor: int | None, ends: Ends, what: Callable[[Socket], None]) -> bool:
    if descriptor is None or _ends(descriptor) != ends:  # numbers are used again
        return False
    sock = Socket(fileno=descriptor)
    try:
        what(sock)
    except OSError:
        return False
    finally:
        sock.detach()  # it is not ours to close
    return True


def _ends(descriptor: int) -> Ends | None:
    try:
        if not S_ISSOCK(fstat(descriptor).st_mode):
            return None
        sock = Socket(fileno=descriptor)
    except OSError:
        return None
    try:
        return Ends(sock.getpeername()[:2], sock.getsockname()[:2])
    except OSError:  # it listens, or has no peer any more
        return None
    finally:
        sock.detach()
