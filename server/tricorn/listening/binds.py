"""The sockets that a server listens on."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from errno import EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, ENOTSOCK
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from tricorn.settings import Rule, SettingError, is_whole, printable, whole

if TYPE_CHECKING:
    from collections.abc import Iterable

Address = tuple[str, int] | str  # host and port, or the path of a Unix socket

BACKLOG = 4096
UNIX = "unix:"
DESCRIPTOR = "fd:"
# Hosts with an address of IPv4 and one of IPv6, if the machine has both (RFC 6761 §6.3, whatever /etc/hosts says).
BOTH_FAMILIES = {"": (None,), "localhost": ("127.0.0.1", "::1")}
ATTEMPTS = 10  # to find a port that is free in both
NO_SUCH_FAMILY = (EAFNOSUPPORT, EADDRNOTAVAIL)

PORT = Rule(
    description="a whole number from 0 to 65535",
    test=lambda value: is_whole(value) and 0 <= value <= 65535,
    parse=whole,
)


async def listen(port: int, host: str) -> list[socket.socket]:
    """Bind and listen on every address that the host has. Raises OSError like `bind`."""
    return _listening(await bind(port, host))


async def listen_on(binds: Iterable[str]) -> list[socket.socket]:
    """Bind and listen on each of `HOST:PORT`, `:PORT`, `[IPV6]:PORT`, `unix:PATH` or `fd:N`. Raises OSError, and
    `SettingError` for a text that is none of these."""
    bound: list[socket.socket] = []
    try:
        for each in binds:
            bound += await bind_to(each)
    except BaseException:
        close_all(bound)
        raise
    return _listening(bound)


async def bind_to(text: str) -> list[socket.socket]:
    """Bind what a text for `listen_on` names. Those of a Unix socket and of a descriptor may listen already."""
    check_bind(text)
    if text.startswith(UNIX):
        return [_listen_on_unix(text.removeprefix(UNIX))]
    if text.startswith(DESCRIPTOR):
        return [adopt(int(text.removeprefix(DESCRIPTOR)))]
    host, port = parse_bind(text)
    return await bind(port, host)


async def bind(port: int, host: str) -> list[socket.socket]:
    """Bind every address that the host has, all to the same port; an empty host is every address of the machine.

    Raises:
        OSError: an address cannot be found or bound.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return await _bind(port, host)
        except OSError as error:  # the port that was free at the first address may be in use at the next
            if port != 0 or error.errno != EADDRINUSE:
                raise
    return await _bind(port, host)


async def _bind(port: int, host: str) -> list[socket.socket]:
    found = []
    for name in BOTH_FAMILIES.get(host, (host,)):
        found += await trio.socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    bound: list[socket.socket] = []
    failure: OSError | None = None
    try:
        for family, kind, protocol, _, address in found:
            try:
                bound.append(_bind_one(family, kind, protocol, _with_port(address, port, bound)))
            except OSError as error:
                if host not in BOTH_FAMILIES or error.errno not in NO_SUCH_FAMILY:
                    raise
                failure = error  # the machine may have only the other one
        if failure is not None and not bound:
            raise failure
    except BaseException:
        close_all(bound)
        raise
    return bound


def _with_port(address: tuple[Any, ...], port: int, bound: list[socket.socket]) -> tuple[Any, ...]:
    """The address with the port that the first one got, if any port will do."""
    return (address[0], bound[0].getsockname()[1], *address[2:]) if port == 0 and bound else address


def _bind_one(family: int, kind: int, protocol: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener


def adopt(descriptor: int) -> socket.socket:
    """Take over a stream socket that another program has opened. Raises OSError if the descriptor is none."""
    adopted = socket.socket(fileno=descriptor)
    if adopted.type != socket.SOCK_STREAM:
        adopted.detach()
        raise OSError(ENOTSOCK, "not a stream socket")
    adopted.set_inheritable(False)
    return adopted


def check_bind(text: str, label: str = "") -> None:
    """Raise `SettingError` if `listen_on` does not take the text."""
    if text.startswith(UNIX):
        if text == UNIX or "\0" in text:
            raise SettingError(f"{label}{printable(text)}: must be unix:PATH, for example unix:/run/tricorn.sock")
    elif text.startswith(DESCRIPTOR):
        number = text.removeprefix(DESCRIPTOR)
        if not (number.isascii() and number.isdecimal() and len(number) < 7):
            raise SettingError(f"{label}{printable(text)}: must be fd:N, for example fd:3, or fd:// under systemd")
    else:
        parse_bind(text, label)


def parse_bind(text: str, label: str = "") -> tuple[str, int]:
    """Split `HOST:PORT` into host and port. An IPv6 address stands in brackets: `[::1]:8080`. The host may be empty.

    Raises `SettingError`; its text begins with `label` and the text given.
    """
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or (host and not bare) or not (bare.isprintable() and {" ", "/"}.isdisjoint(bare)):
        raise SettingError(f"{label}{printable(text)}: must be HOST:PORT, for example 127.0.0.1:8080")
    if host != (f"[{bare}]" if ":" in bare else bare):
        raise SettingError(f"{label}{printable(text)}: an IPv6 address, and only that, has brackets: [::1]:8080")
    try:
        return bare, PORT.read("", port)
    except SettingError:
        raise SettingError(f"{label}{printable(text)}: the port must be {PORT.description}") from None


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
