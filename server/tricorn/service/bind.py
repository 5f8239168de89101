"""What the command line and the environment say to listen on: shown, and listened on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tricorn.errors.reason import reason
from tricorn.listening.binds import UNIX, close_all
from tricorn.settings import SettingError, printable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from socket import socket as Socket

    from tricorn.listening.binds import Address


def show_address(address: Address) -> str:
    """Write an address as `parse_bind` reads it; of a Unix socket, its path."""
    return printable(f"{UNIX}{address}") if isinstance(address, str) else show_bind(*address)


def show_bind(host: str, port: int) -> str:
    """Write host and port as `parse_bind` reads them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def show_urls(scheme: str, addresses: Sequence[Address]) -> str:
    """Write what a server listens on, for people."""
    prefixes = ["" if isinstance(each, str) else f"{scheme}://" for each in addresses]
    return ", ".join(f"{prefix}{show_address(each)}" for prefix, each in zip(prefixes, addresses, strict=True))


async def bind_or_explain(
    bind: Callable[[str], Awaitable[list[Socket]]], binds: Iterable[str], label: str = "--bind "
) -> list[Socket]:
    """Call `bind` for each text. Raises `SettingError` in place of OSError; it begins with `label` and the text."""
    bound: list[Socket] = []
    for each in binds:
        try:
            bound += await bind(each)
        except OSError as error:
            close_all(bound)
            raise not_bound(error, each, label) from None
        except BaseException:
            close_all(bound)
            raise
    return bound


def not_bound(error: BaseException, text: str, label: str) -> SettingError:
    """Make the error that says, in the words of the operating system, why something cannot be listened on."""
    return SettingError(f"{label}{printable(text)}: {reason(error).rpartition(': ')[2].lower()}")
