"""The sockets of this process, found by their two addresses: ASGI gives an app no socket, and no other way to abort."""

from __future__ import annotations

from os import fstat, listdir
from resource import RLIMIT_NOFILE, getrlimit
from socket import socket as Socket
from stat import S_ISSOCK
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

DESCRIPTORS = "/dev/fd"


class Ends(NamedTuple):
    """What tells a TCP connection from any other: each is host and port."""

    peer: tuple[str, int]
    own: tuple[str, int]


class Descriptors:
    """Looks for the sockets of many connections in one search."""

    def __init__(self) -> None:
        self._found: dict[Ends, int] = {}
        self._searches = 0

    def way(self, ends: Ends) -> Way:
        """Return the way to the socket of a connection that there is now."""
        return Way(self, ends, self._searches)

    def find(self, ends: Ends, since: int) -> int | None:
        """Return the descriptor of a connection, by a search that came after the first `since`."""
        if self._searches == since:
            self._searches += 1
            self._found = {each: number for number in _numbers() if (each := _ends(number)) is not None}
        return self._found.get(ends)


class Way:
    """The way to the socket of one connection.

    A socket that is gone is not looked for again: if many peers reset at once, each of them costs the same.
    """

    __slots__ = ("_descriptor", "_descriptors", "_ends", "_since")

    def __init__(self, descriptors: Descriptors, ends: Ends, since: int) -> None:
        self._descriptors: Descriptors | None = descriptors
        self._ends = ends
        self._since = since
        self._descriptor: int | None = None

    def __call__(self, what: Callable[[Socket], None]) -> bool:
        """Call `what` with the socket; False if there is none any more, or if that failed as sockets do."""
        if self._descriptors is not None:
            self._descriptor = self._descriptors.find(self._ends, self._since)
            self._descriptors = None
        if self._descriptor is None or _ends(self._descriptor) != self._ends:  # numbers are used again
            self._descriptor = None
            return False
        sock = Socket(fileno=self._descriptor)
        try:
            what(sock)
        except OSError:
            return False
        finally:
            sock.detach()  # it is not ours to close
        return True


def _numbers() -> Iterable[int]:
    try:
        return map(int, listdir(DESCRIPTORS))
    except OSError:  # listing takes a descriptor, and all are in use
        return range(getrlimit(RLIMIT_NOFILE)[0])


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
