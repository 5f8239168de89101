"""HOST:PORT, as the command line and the environment write it: read, shown, and listened on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tricorn.errors.reason import reason
from tricorn.settings import Rule, SettingError, is_whole, printable, whole

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from socket import socket as Socket

    from tricorn.listening.binds import Address

PORT = Rule(
    description="a whole number from 0 to 65535",
    test=lambda value: is_whole(value) and 0 <= value <= 65535,
    parse=whole,
)


def parse_bind(text: str, label: str = "") -> tuple[str, int]:
    """Split `HOST:PORT` into host and port. An IPv6 address stands in brackets: `[::1]:8080`.

    There is no default host: whether `:8080` means this machine or the whole network differs from program to program.
    Raises `SettingError`; its text begins with `label` and the text given.
    """
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or not bare.isprintable() or not {" ", "/"}.isdisjoint(bare):
        raise SettingError(f"{label}{printable(text)}: must be HOST:PORT, for example 127.0.0.1:8080")
    if host != (f"[{bare}]" if ":" in bare else bare):
        raise SettingError(f"{label}{printable(text)}: an IPv6 address, and only that, has brackets: [::1]:8080")
    try:
        return bare, PORT.read("", port)
    except SettingError:
        raise SettingError(f"{label}{printable(text)}: the port must be {PORT.description}") from None


def show_address(address: Address) -> str:
    """Write an address as `parse_bind` reads it; of a Unix socket, its path."""
    return address if isinstance(address, str) else show_bind(*address)


def show_bind(host: str, port: int) -> str:
    """Write host and port as `parse_bind` reads them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def bind_or_explain(
    bind: Callable[[int, str], Awaitable[list[Socket]]], host: str, port: int, label: str
) -> list[Socket]:
    """Call `bind` for an address. Raises `SettingError` in place of OSError; its text begins with `label`."""
    try:
        return await bind(port, host)
    except OSError as error:
        raise not_bound(error, host, port, label) from None


def not_bound(error: BaseException, host: str, port: int, label: str) -> SettingError:
    """Make the error that says, in the words of the operating system, why an address cannot be listened on."""
    return SettingError(f"{label}{show_bind(host, port)}: {reason(error).rpartition(': ')[2].lower()}")
