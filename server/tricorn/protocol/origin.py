"""Which pages may connect: origins as browsers send them (RFC 6454 §6, RFC 6455 §10.2), and their patterns. Sans-I/O.

A pattern is an origin, `https://app.example` or `capacitor://localhost`, in which the host may begin with `*.` for any
subdomain and the port may be `*` for any port; or `null`, which sandboxed and local pages send; or `*` for every page.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

ANY = "*"
NULL = "null"

_DEFAULT_PORTS = {"http": "80", "https": "443"}
_SUBDOMAINS = "*."
_NEVER_SENT = {
    "ws": "http://",
    "wss": "https://",
    "file": NULL,
    "data": NULL,
    "about": NULL,
    "javascript": NULL,
    "blob": "the origin of the page that made it",
}

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^\s/?#@,:\[\]]+)(?::([0-9]+|\*))?", re.ASCII)

_FORBIDDEN = re.compile(r"[\x00-\x20%<>\\^|\x7f]")  # in a host (URL Standard, "forbidden domain code point")
_EXTENSION = re.compile(r"[a-p]{32}")  # how Chromium names them


class _Parts(NamedTuple):
    scheme: str
    host: str
    port: str  # as if it were written out


def check_pattern(pattern: str) -> None:
    """Check that a browser could send an origin that matches the pattern.

    Raises:
        ValueError: it could not. The text says why.
    """
    if pattern in (ANY, NULL):
        return
    parts = _split(pattern)
    if parts is None:
        raise ValueError("must be an origin like https://example.org, without a path, or null, or *")
    scheme, host, port = parts
    if scheme in _NEVER_SENT:
        raise ValueError(f"no browser sends an origin that begins with {scheme}:, but {_NEVER_SENT[scheme]}")
    name = host.removeprefix(_SUBDOMAINS)
    if ANY in name:
        raise ValueError("a * stands for whole subdomains, https://*.example.org, or for the port, http://localhost:*")
    if port and port != ANY and (len(port) > 5 or not 0 < int(port) <= 65535 or port != str(int(port))):
        raise ValueError("the port must be a whole number from 1 to 65535, without zeros before it, or *")
    if scheme == "chrome-extension" and (port or not _EXTENSION.fullmatch(host)):
        raise ValueError("the id of an extension is 32 letters from a to p, and no port follows it")
    if scheme in _DEFAULT_PORTS and name != host and _is_number(name.rpartition(".")[2]):
        raise ValueError("an address has no subdomains")
    if scheme in _DEFAULT_PORTS and name != (right := _as_browsers_write(name)):
        raise ValueError(f"browsers write this host as {right}" if right else "there is no such host")


def are_patterns(value: object) -> bool:
    """Whether `value` is a tuple of patterns."""
    if not isinstance(value, tuple):
        return False
    try:
        for each in value:
            check_pattern(each)
    except (TypeError, ValueError):
        return False
    return True


def is_allowed(origin: str | None, host: str, patterns: Iterable[str]) -> bool:
    """Whether a page may connect to a server at `host`, a Host header: if it came from there, or matches a pattern.

    Browsers always send an Origin; a client that sends none is no browser, and no page can make it act. The scheme is
    not compared with the server's own, which behind a proxy that ends TLS the server does not know.
    """
    if origin is None or ANY in patterns or origin in patterns:
        return True
    parts = _split(origin)
    if parts is None or ANY in (parts.port, parts.host[:1]):
        return False
    own = _split(f"{parts.scheme}://{host.lower()}")
    return (parts.scheme in _DEFAULT_PORTS and parts == own) or any(_matches(parts, pattern) for pattern in patterns)


def _matches(origin: _Parts, pattern: str) -> bool:
    wanted = _split(pattern)
    if wanted is None or origin.scheme != wanted.scheme or wanted.port not in (origin.port, ANY):
        return False
    if wanted.host.startswith(_SUBDOMAINS):
        subdomain = origin.host.removesuffix(wanted.host.removeprefix(ANY))
        return subdomain not in ("", origin.host)
    return origin.host == wanted.host


@lru_cache(1000)
def _split(origin: str) -> _Parts | None:
    parts = _ORIGIN.fullmatch(origin)
    if parts is None:
        return None
    scheme, host, port = parts.groups()
    return _Parts(scheme, host, port or _DEFAULT_PORTS.get(scheme, ""))


def _is_number(label: str) -> bool:
    """Whether a host that ends with it must be an address of IPv4 ("ends in a number" in the URL Standard)."""
    return label.isdecimal() or re.fullmatch(r"0x[0-9a-f]*", label) is not None


def _as_browsers_write(host: str) -> str:
    """Return a host of http: as the URL Standard serialises it, if that can be told; "" if it cannot be one."""
    if host.startswith("["):
        try:
            return f"[{IPv6Address(host[1:-1]).compressed}]"
        except ValueError:
            return ""
    if _FORBIDDEN.search(host):
        return ""
    if _is_number(host.removesuffix(".").rpartition(".")[2]):
        try:
            return str(ip_address(host))
        except ValueError:
            return ""
    try:
        return host.encode("idna").decode().lower()
    except UnicodeError:
        return ""
