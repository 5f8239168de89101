"""The opening handshake, RFC 6455 §4.2: from request heads to answers. Sans-I/O, HTTP parsed by h11."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Sequence
from hashlib import sha1
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import h11
from websockets.exceptions import InvalidHeaderFormat
from websockets.headers import parse_extension

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n"  # RFC 9113 §3.4

Offer = tuple[str, Sequence[tuple[str, str | None]]]  # of an extension: its name and its parameters

_ABSOLUTE = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)  # the beginning of an absolute-form, RFC 9112 §3.2.2
_HOST = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[\w.~!$&'()*+;=%-]*)(?::[0-9]*)?", re.ASCII)  # RFC 9110 §7.2

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3


class Request(NamedTuple):
    """A request's head. `headers` has lower-case names; what came several times is joined by `, ` (RFC 9110 §5.3)."""

    method: str
    path: str
    query: str
    http_version: str
    headers: Mapping[str, str]


class Refused(Exception):
    """A request that is answered with an HTTP error: its `status`, a text that says why, and further headers."""

    def __init__(self, status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers or {}


class Head:
    """A request head on its way in."""

    def __init__(self, max_bytes: int) -> None:
        self.data = b""  # all that came, the head included
        self._max_bytes = max_bytes
        self._h11: Any = h11.Connection(h11.SERVER, max_incomplete_event_size=max_bytes)

    @property
    def is_http2(self) -> bool:
        """Whether it began with the preface of HTTP/2."""
        return self.data.startswith(HTTP2_PREFACE)

    def finish(self) -> bytes:
        """Return what came behind the head, and forget the head and all that was needed to read it."""
        rest: bytes = self._h11.trailing_data[0]
        self.data = b""
        self._h11 = None
        return rest

    def receive_data(self, data: bytes) -> Request | None:
        """Take what one read brought; return the request once its head is complete, and never one of HTTP/2.

        Raises:
            Refused: it is malformed (400) or larger than `max_bytes` (431).
        """
        self.data += data
        if self.is_http2:
            return None
        try:
            self._h11.receive_data(data)
            event = self._h11.next_event()
        except h11.RemoteProtocolError as error:
            status = HTTPStatus(error.error_status_hint)
            if status is HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE and b"\n" not in self.data:
                status = HTTPStatus.REQUEST_URI_TOO_LONG
            raise Refused(status, f"bad request head: {error}") from None
        if not isinstance(event, h11.Request):
            return None
        rest = len(self._h11.trailing_data[0])
        if len(self.data) - rest > self._max_bytes:  # h11 looks only at heads that are incomplete
            text = f"a request head may have at most {self._max_bytes} bytes"
            raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)
        if not event.http_version.startswith(b"1."):
            raise Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "this server speaks HTTP/1.1")
        return as_request(event.method, event.target.decode("ascii"), event.http_version, event.headers)


def as_request(method: bytes, target: str, http_version: bytes, raw_headers: Iterable[tuple[bytes, bytes]]) -> Request:
    """A request of the parts that h11 has taken its head apart into."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in raw_headers:
        name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if absolute := _ABSOLUTE.match(target):
        headers["host"] = absolute[1]  # whatever the header says (RFC 9112 §3.2.2)
        target = target[absolute.end() :]
    path, _, query = target.partition("?")
    return Request(method.decode("ascii"), unquote(path) or "/", query, http_version.decode("ascii"), headers)


def wants_websocket(request: Request) -> bool:
    """Whether the request asks for an upgrade to WebSocket. One of HTTP/1.0 cannot (RFC 9110 §7.8)."""
    return request.http_version != "1.0" and "websocket" in _tokens(request.headers.get("upgrade", ""))


def check(request: Request, path: str | None, origins: Sequence[str] = ()) -> None:
    """Check an upgrade request against RFC 6455 §4.2.1; `path` is the one that is upgraded, None for any.

    Pages may connect to the server that they came from, and those of `origins` anyway.

    Raises:
        Refused: it asks for something else, or does not ask properly.
    """
    check_entry(request, path, origins)
    headers = request.headers
    if request.method != "GET":
        raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "a WebSocket upgrade is a GET request", {"Allow": "GET"})
    if "upgrade" not in _tokens(headers.get("connection", "")):
        raise Refused(HTTPStatus.BAD_REQUEST, "the Connection header must name Upgrade")
    if int(headers.get("content-length", "0")) or "transfer-encoding" in headers:
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "a WebSocket upgrade has no body")
    if headers.get("sec-websocket-version") != "13":
        text = "the Sec-WebSocket-Version must be 13"
        raise Refused(HTTPStatus.UPGRADE_REQUIRED, text, {"Sec-WebSocket-Version": "13", **UPGRADE})
    try:
        size = len(b64decode(headers.get("sec-websocket-key", ""), validate=True))
    except (Base64Error, ValueError):
        size = 0
    if size != 16:
        raise Refused(HTTPStatus.BAD_REQUEST, "the Sec-WebSocket-Key must be 16 bytes in base64")


def check_entry(request: Request, path: str | None, origins: Sequence[str]) -> None:
    """Check what does not depend on how a WebSocket is asked for: where it goes, and a page of which origin asks.

    Raises:
        Refused: there is none, or not for that page.
    """
    headers = request.headers
    if path is not None and request.path != path:
        raise Refused(HTTPStatus.NOT_FOUND, f"no WebSocket here; there is one at {path}")
    if not _HOST.fullmatch(headers.get("host", "")):
        raise Refused(HTTPStatus.BAD_REQUEST, "the Host must be a name or an address, with or without a port")
    if not _origin_is_allowed(headers, origins):
        raise Refused(HTTPStatus.FORBIDDEN, "pages of this origin may not connect")


def _origin_is_allowed(headers: Mapping[str, str], origins: Sequence[str]) -> bool:
    """RFC 6455 §10.2. Browsers always send an Origin; who sends none is none, and no page can make it act.

    The scheme is not compared with the server's own: behind a proxy that ends TLS the server does not know it, and a
    header that claims it is the client's word.
    """
    origin = headers.get("origin")
    if origin is None or origin in origins or "*" in origins:
        return True
    scheme, _, authority = origin.partition("://")
    port = DEFAULT_PORTS.get(scheme)
    return port is not None and authority != "" and authority == headers.get("host", "").lower().removesuffix(port)


DEFAULT_PORTS = {"http": ":80", "https": ":443"}

UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade, close"}  # RFC 9110 §15.5.22: 426 says to what


def choose_subprotocol(request: Request, known: Sequence[str]) -> str | None:
    """The first that the client offers and the server knows (RFC 6455 §4.2.2); None where there is none."""
    offered = request.headers.get("sec-websocket-protocol", "").split(",")
    return next((name for name in map(str.strip, offered) if name in known), None)


def offered_extensions(request: Request) -> Sequence[Offer]:
    """What the client would have, the best first.

    Raises:
        Refused: the header is malformed, which RFC 6455 §9.1 lets nobody overlook.
    """
    header = request.headers.get("sec-websocket-extensions")
    try:
        return () if header is None else parse_extension(header)
    except InvalidHeaderFormat as error:
        raise Refused(HTTPStatus.BAD_REQUEST, f"bad Sec-WebSocket-Extensions: {error}") from None


def accept(request: Request, subprotocol: str | None, extensions: str | None = None) -> bytes:
    """The 101 response (RFC 6455 §4.2.2)."""
    digest = sha1(request.headers["sec-websocket-key"].encode() + _GUID, usedforsecurity=False).digest()
    lines = [
        b"HTTP/1.1 101 Switching Protocols",
        b"Upgrade: websocket",
        b"Connection: Upgrade",
        b"Sec-WebSocket-Accept: " + b64encode(digest),
    ]
    if subprotocol is not None:
        lines.append(b"Sec-WebSocket-Protocol: " + subprotocol.encode())
    if extensions is not None:
        lines.append(b"Sec-WebSocket-Extensions: " + extensions.encode())
    return b"\r\n".join(lines) + b"\r\n\r\n"


def refuse(refused: Refused, head: Head) -> bytes:
    """The response to a request that is refused; the connection is closed behind it."""
    body = f"{refused}\n".encode()
    headers = {
        "Connection": "close",
        "Content-Type": "text/plain; charset=utf-8",
        "Content-Length": str(len(body)),
        **refused.headers,
    }
    lines = [f"HTTP/1.1 {refused.status.value} {refused.status.phrase}", *(f"{k}: {v}" for k, v in headers.items())]
    response = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    return response if head.data.startswith(b"HEAD ") else response + body  # RFC 9110 §9.3.2


def _tokens(header: str) -> list[str]:
    return [token.strip() for token in header.lower().split(",")]
