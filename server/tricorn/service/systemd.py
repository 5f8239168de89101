"""What systemd hands to a service: sockets, sd_listen_fds(3), and a socket to say how it is, sd_notify(3)."""

from __future__ import annotations

from contextlib import suppress
from os import environ, getpid  # noqa: TID251 (`tricorn run` reads no settings)
from socket import AF_UNIX, SOCK_DGRAM, socket
from typing import TYPE_CHECKING

from tricorn.settings import SettingError

if TYPE_CHECKING:
    from collections.abc import Sequence

ALL = "fd://"
FIRST = 3

_is_ours = environ.get("LISTEN_PID") == str(getpid())  # and not what a parent left in the environment
_count = environ.get("LISTEN_FDS", "") if _is_ours else ""
PASSED = tuple(f"fd:{FIRST + number}" for number in range(int(_count) if _count.isdecimal() else 0))
_notify_socket = environ.get("NOTIFY_SOCKET", "")


def expand(binds: Sequence[str], default: str) -> tuple[str, ...]:
    """Put the sockets that systemd has passed in place of `fd://`, and of nothing; without them, `default`.

    Raises `SettingError` if there is `fd://` and none was passed.
    """
    if ALL in binds and not PASSED:
        raise SettingError(f"--bind {ALL}: no sockets were passed to this process in LISTEN_FDS")
    if not binds:
        return PASSED or (default,)
    return tuple(bind for each in binds for bind in (PASSED if each == ALL else (each,)))


def notify(state: str) -> None:
    """Tell systemd, if it has asked for that. Never waits and never fails."""
    if _notify_socket:
        address = f"\0{_notify_socket[1:]}" if _notify_socket.startswith("@") else _notify_socket  # an abstract one
        with suppress(OSError), socket(AF_UNIX, SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), address)
