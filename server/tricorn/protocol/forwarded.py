"""What trusted proxies say about a client: `Forwarded` (RFC 7239) or `X-Forwarded-For`, `-Proto` and `-Host`. Sans-I/O.

Anybody can send these headers. They count only if a trusted proxy sent them, and only as far as trusted proxies wrote
them: from the right, past the addresses of trusted proxies, to the first other address. That is the client.
"""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any, NamedTuple

from tricorn.protocol.handshake import HOST, join_headers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tricorn.request import Request

    Peer = tuple[str, int] | None  # None on a Unix socket

UNIX = "unix"
MAX_HOPS = 20  # entries that are looked at, from the right

_SECURE = {"https": True, "wss": True, "http": False, "ws": False}
_NODE = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+))(?::(?:([0-9]{1,5})|_[\w.-]+))?", re.ASCII)  # RFC 7239 §6

_NAME = r"[\w!#$%&'*+.^`|~-]+"
_VALUE = r'(?:[^\s",;\\]+|"(?:[^"\\]|\\.)*")'  # some proxies quote no colons
_PAIR = re.compile(rf"({_NAME})=({_VALUE})", re.ASCII)
_ELEMENT = re.compile(rf"(?:{_NAME}={_VALUE})?(?:;[ \t]*(?:{_NAME}={_VALUE})?)*", re.ASCII)  # RFC 7239 §4
_ESCAPED = re.compile(r"\\(.)")


class _Hop(NamedTuple):
    """What a proxy says about a request that it got: from whom, by which protocol, and for which host."""

    node: str
    proto: str
    host: str


class _Client(NamedTuple):
    """Who made a request, and how: None if no proxy says."""

    peer: Peer
    secure: bool | None = None
    host: str | None = None


class TrustedProxies:
    """The proxies that are trusted: addresses, networks (`10.0.0.0/8`), and `unix` for all peers on a Unix socket.

    Raises:
        ValueError: one of them is neither.
    """

    def __init__(self, proxies: Iterable[str]) -> None:
        names = set(proxies)
        self._unix = UNIX in names
        self._networks = [_network(name) for name in names - {UNIX}]

    def __contains__(self, peer: Peer) -> bool:
        if peer is None:
            return self._unix
        if not self._networks:
            return False
        address = parse_address(peer[0])
        return address is not None and any(address in network for network in self._networks)

    def request(self, request: Request) -> Request:
        """Return the request as its client made it, with the client for the peer, if a trusted proxy passed it on."""
        if request.peer not in self:
            return request
        client = self._client(request.peer, request.headers)
        headers = request.headers if client.host is None else {**request.headers, "host": client.host}
        secure = request.secure if client.secure is None else client.secure
        return replace(request, peer=client.peer, secure=secure, headers=headers)

    def scope(self, scope: Any) -> Any:
        """Do the same with the scope of an ASGI application."""
        peer = scope.get("client") and tuple(scope["client"])
        if scope["type"] == "lifespan" or peer not in self:
            return scope
        client = self._client(peer, join_headers(scope["headers"]))
        changed = {**scope, "client": client.peer}
        if client.secure is not None:
            changed["scheme"] = ("ws" if scope["type"] == "websocket" else "http") + "s" * client.secure
        if client.host is not None:
            others = [header for header in scope["headers"] if header[0].lower() != b"host"]
            changed["headers"] = [(b"host", client.host.encode("latin-1")), *others]
        return changed

    def _client(self, proxy: Peer, headers: Mapping[str, str]) -> _Client:
        client = _Client(proxy)
        for hop in _hops(headers):
            peer = _peer(hop.node)
            host = hop.host if hop.host and HOST.fullmatch(hop.host) else client.host
            client = _Client(peer or client.peer, _SECURE.get(hop.proto.lower(), client.secure), host)
            if peer is None or peer not in self:
                break
        return client


def are_proxies(value: object) -> bool:
    """Whether `value` is a tuple of what `TrustedProxies` takes."""
    if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
        return False
    try:
        TrustedProxies(value)
    except ValueError:
        return False
    return True


def _hops(headers: Mapping[str, str]) -> Iterator[_Hop]:
    """What each proxy says, the nearest one first, until something is malformed.

    `X-Forwarded-For` goes before `Forwarded`: most proxies write only the former, and pass on the latter.
    """
    forwarded = headers.get("forwarded")
    if forwarded is not None and "x-forwarded-for" not in headers:
        for element in _elements(forwarded):
            yield _Hop(element.get("for", ""), element.get("proto", ""), element.get("host", ""))
        return
    nodes, protos, hosts = (_members(headers.get(f"x-forwarded-{what}", "")) for what in ("for", "proto", "host"))
    for index, node in enumerate(nodes or [""]):
        yield _Hop(node, _at(index, protos), _at(index, hosts))


def _members(header: str) -> list[str]:
    """The members of a list, from the right."""
    members = reversed(header.rsplit(",", MAX_HOPS)[-MAX_HOPS:])
    return [stripped for member in members if (stripped := member.strip())]


def _at(index: int, values: list[str]) -> str:
    """What was said about a hop. Many proxies replace such a header, and so there may be fewer values than hops."""
    return values[min(index, len(values) - 1)] if values else ""


def _elements(header: str) -> Iterator[dict[str, str]]:
    """The elements of `Forwarded`, from the right, until one is malformed.

    From the right, because a quoted string that a client did not end would else take in what the proxies wrote.
    """
    end = comma = len(header)
    for _ in range(MAX_HOPS):
        comma = header.rfind(",", 0, comma)
        element = header[comma + 1 : end].strip()
        if _ELEMENT.fullmatch(element):  # else the comma may stand in a quoted string
            end = comma
            if element:
                yield {name.lower(): _unquoted(value) for name, value in _PAIR.findall(element)}
        if comma < 0:
            return


def _unquoted(value: str) -> str:
    return _ESCAPED.sub(r"\1", value[1:-1]) if value.startswith('"') else value


def _peer(node: str) -> Peer:
    """The address of a node, with port 0 if none is said; None if it is hidden, unknown or malformed."""
    parts = _NODE.fullmatch(node)
    address = parse_address(
        node if parts is None else parts[1] or parts[2]
    )  # X-Forwarded-For has IPv6 without brackets
    port = 0 if parts is None else int(parts[3] or 0)
    return None if address is None or "%" in node or port > 65535 else (str(address), port)


def parse_address(text: str | bytes) -> IPv4Address | IPv6Address | None:
    """Return an address; None if it is none. One that IPv6 maps (RFC 4291 §2.5.5.2) is returned as that of IPv4."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def _network(text: str) -> IPv4Network | IPv6Network:
    network = ip_network(text)
    if isinstance(network, IPv6Network) and (mapped := network.network_address.ipv4_mapped):
        return IPv4Network((mapped, max(network.prefixlen - 96, 0)))
    return network
