"""The sockets that a server listens on."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Iterable

Address = tuple[str, int] | str  # host and port, or the path of a Unix socket

BACKLOG = 4096
UNIX = "unix:"


async def listen(port: int, host: str) -> list[socket.socket]:
    """Bind and listen on every address that the host has. Raises OSError like `bind`."""
    return _listening(await bind(port, host))


async def listen_on(binds: Iterable[str]) -> list[socket.socket]:
    """Bind and listen on each of `HOST:PORT`, `[IPV6]:PORT` or `unix:PATH`. Raises OSError, and ValueError for a text
    that is none of these."""
    bound: list[socket.socket] = []
    try:
        for each in binds:
            if each.startswith(UNIX):
                bound.append(_listen_on_unix(each.removeprefix(UNIX)))
            else:
                host, _, port = each.rpartition(":")
                if not host or not port.isdecimal():
                    raise ValueError(f"{each}: must be HOST:PORT, [IPV6]:PORT or unix:PATH")
                bound += await bind(int(port), host.removeprefix("[").removesuffix("]"))
    except BaseException:
        close_all(bound)
        raise
    return _listening(bound)


async def bind(port: int, host: str) -> list[socket.socket]:
    """Bind every address that the host has.

    Raises:
        OSError: an address cannot be found or bound.
    """
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    bound: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in found:
            listener = socket.socket(family, kind, protocol)
            bound.append(listener)
            listener.setblocking(False)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
    except BaseException:
        close_all(bound)
        raise
    return bound


def addresses(listeners: Iterable[socket.socket]) -> list[Address]:
    """Return what the listeners are bound to: (host, port), or the path of a Unix socket."""
    names = [listener.getsockname() for listener in listeners]
    return [name[:2] if isinstance(name, tuple) else os.fsdecode(name) for name in names]


def close_all(listeners: Iterable[socket.socket]) -> None:
    """Close sockets."""
    for listener in listeners:
        listener.close()


class _UnixListener(socket.socket):
    """A Unix socket whose file goes with it."""

    def __init__(self, path: str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._file: tuple[str, int] | None = None
        try:
            self.bind(path)
            self.listen(BACKLOG)  # at once: a file to which nothing listens is taken for one that was left behind
            self._file = path, os.stat(path).st_ino
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                if os.stat(file[0]).st_ino == file[1]:  # and not that of a server that came after this one
                    os.unlink(file[0])
        super().close()


def _listen_on_unix(path: str) -> socket.socket:
    if _is_left_over(path):
        os.unlink(path)
    return _UnixListener(path)


def _is_left_over(path: str) -> bool:
    """Whether this is the socket of a server that is no more."""
    if not Path(path).is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except BlockingIOError:  # its backlog is full
            return False
    return False


def _listening(bound: list[socket.socket]) -> list[socket.socket]:
    try:
        for listener in bound:
            listener.listen(BACKLOG)
    except BaseException:
        close_all(bound)
        raise
    return bound
