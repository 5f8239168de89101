"""The opening handshake, RFC 6455 §4.2: from request heads to answers. Sans-I/O, HTTP parsed by h11."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Sequence
from hashlib import sha1
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import h11
from websockets.exceptions import InvalidHeaderFormat
from websockets.headers import parse_extension

from tricorn.protocol.http2 import PREFACE
from tricorn.protocol.origin import is_allowed
from tricorn.request import Accept, Refuse, Request

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_HEADERS = 100  # of one request head; browsers and proxies send about 20

Offer = tuple[str, Sequence[tuple[str, str | None]]]  # of an extension: its name and its parameters

_ABSOLUTE = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)  # the beginning of an absolute-form, RFC 9112 §3.2.2
HOST = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[\w.~!$&'()*+;=%-]*)(?::[0-9]*)?", re.ASCII)  # RFC 9110 §7.2

_TOKEN = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)  # RFC 9110 §5.6.2
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110 §5.5
_OURS = ("connection", "upgrade", "content-length", "transfer-encoding", "sec-websocket-")  # beginnings of names

_OFFERS = (b"upgrade", b"http2-settings")

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3


class Head:
    """A request head on its way in, and after that the body."""

    __slots__ = ("_h11", "_max_bytes", "_without_upgrade", "complete", "data")

    def __init__(self, max_bytes: int) -> None:
        self.data = b""  # all that came, until the head is complete
        self._max_bytes = max_bytes
        self._h11: Any = h11.Connection(h11.SERVER, max_incomplete_event_size=max_bytes)
        self._without_upgrade = b""  # the head, if there is a header that upgrades the connection, without that
        self.complete = False  # so is the body

    @property
    def is_http2(self) -> bool:
        """Whether it began as HTTP/2 does."""
        return self.data.startswith(PREFACE[:16])

    def finish(self) -> bytes:
        """Return what came after the head, or the body once that is complete, and forget what was needed to read it."""
        rest: bytes = self._h11.trailing_data[0]
        self.data = b""
        self._h11 = None
        return rest

    def request(self, data: bytes = b"") -> bytes:
        """Return what belongs to the request: at first the head, without what would upgrade the connection, then its
        body as it comes in, up to the one that makes it `complete`.
        """
        if data:
            self._h11.receive_data(data)
        else:
            rest = len(self._h11.trailing_data[0])
            head, body = self.data[: len(self.data) - rest], self.data[len(self.data) - rest :]
            data = (self._without_upgrade or head) + body
            self.data = b""
        try:
            event: Any = h11.Data(b"")
            while isinstance(event, h11.Data):
                event = self._h11.next_event()
        except h11.RemoteProtocolError:
            return data  # whoever reads it next finds that out too, and answers
        self.complete = isinstance(event, h11.EndOfMessage)
        return data[: len(data) - len(self._h11.trailing_data[0])] if self.complete else data

    def receive_data(self, data: bytes, peer: tuple[str, int] | None = None) -> Request | None:
        """Take what one read brought; return the request once its head is complete, and never one of HTTP/2.

        Raises:
            Refuse: it is malformed or says in two ways where the body ends (400), or is larger than `max_bytes` or has
                more than `MAX_HEADERS` headers (431).
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
            raise Refuse(status, f"bad request head: {error}") from None
        if not isinstance(event, h11.Request):
            return None
        rest = len(self._h11.trailing_data[0])
        if len(self.data) - rest > self._max_bytes:  # h11 looks only at heads that are incomplete
            text = f"a request head may have at most {self._max_bytes} bytes"
            raise Refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)
        if len(event.headers) > MAX_HEADERS:
            text = f"a request head may have at most {MAX_HEADERS} headers"
            raise Refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)
        if not event.http_version.startswith(b"1."):
            raise Refuse(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "this server speaks HTTP/1.1")
        names = {name for name, _ in event.headers}
        if b"transfer-encoding" in names and b"content-length" in names:  # RFC 9112 §6.1: close, or it may be smuggled
            raise Refuse(HTTPStatus.BAD_REQUEST, "either Content-Length or Transfer-Encoding")
        if b"upgrade" in names:
            self._without_upgrade = _without_upgrade(event)
        return as_request(event.method, event.target.decode("ascii"), event.http_version, event.headers, peer)


def _without_upgrade(event: h11.Request) -> bytes:
    """The head again, but for the headers that offer another protocol: a server may overlook these (RFC 9110 §7.8)."""
    lines = [b"%b %b HTTP/%b" % (event.method, event.target, event.http_version)]
    lines += [b"%b: %b" % each for each in event.headers.raw_items() if each[0].lower() not in _OFFERS]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def as_request(
    method: bytes,
    target: str,
    http_version: bytes,
    raw_headers: Iterable[tuple[bytes, bytes]],
    peer: tuple[str, int] | None = None,
) -> Request:
    """Return the request whose head h11 has taken apart."""
    headers = join_headers(raw_headers)
    if absolute := _ABSOLUTE.match(target):
        headers["host"] = absolute[1]  # whatever the header says (RFC 9112 §3.2.2)
        target = target[absolute.end() :]
    path, _, query = target.partition("?")
    path = path or "/"
    return Request(
        _USUAL.get(method) or method.decode("ascii"),
        unquote(path),
        query,
        _USUAL.get(http_version) or http_version.decode("ascii"),
        headers,
        peer,
        path,
    )


_USUAL = {b"GET": "GET", b"1.1": "1.1"}  # which connections keep: they share them


def join_headers(raw_headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return headers by lower-case name, what came several times joined by `, ` (RFC 9110 §5.3).

    Cookies are joined by `; ` (RFC 9113 §8.2.3): a comma would be a part of the first one's value.
    """
    headers: dict[str, str] = {}
    for raw_name, raw_value in raw_headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        separator = "; " if name == "cookie" else ", "
        headers[name] = f"{headers[name]}{separator}{value}" if name in headers else value
    return headers


def wants_websocket(request: Request) -> bool:
    """Whether the request asks for an upgrade to WebSocket. One of HTTP/1.0 cannot (RFC 9110 §7.8)."""
    return request.http_version != "1.0" and "websocket" in _tokens(request.headers.get("upgrade", ""))


def check_upgrade(request: Request) -> None:
    """Check that an HTTP/1.1 request asks for an upgrade as RFC 6455 §4.2.1 wants it.

    Raises:
        Refuse: it does not.
    """
    headers = request.headers
    if request.method != "GET":
        raise Refuse(HTTPStatus.METHOD_NOT_ALLOWED, "a WebSocket upgrade is a GET request", {"Allow": "GET"})
    if "upgrade" not in _tokens(headers.get("connection", "")):
        raise Refuse(HTTPStatus.BAD_REQUEST, "the Connection header must name Upgrade")
    if int(headers.get("content-length", "0")) or "transfer-encoding" in headers:
        raise Refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "a WebSocket upgrade has no body")
    if headers.get("sec-websocket-version") != "13":
        text = "the Sec-WebSocket-Version must be 13"
        raise Refuse(HTTPStatus.UPGRADE_REQUIRED, text, {"Sec-WebSocket-Version": "13", **UPGRADE})
    try:
        size = len(b64decode(headers.get("sec-websocket-key", ""), validate=True))
    except (Base64Error, ValueError):
        size = 0
    if size != 16:
        raise Refuse(HTTPStatus.BAD_REQUEST, "the Sec-WebSocket-Key must be 16 bytes in base64")


def check_origin(request: Request, origins: Sequence[str]) -> None:
    """Check the Host, and that a page of the request's origin may connect (RFC 6455 §10.2).

    Pages may connect to the server that they came from; pages of origins that match one of `origins` may connect too.

    Raises:
        Refuse: the Host is malformed, or the page may not connect.
    """
    if not HOST.fullmatch(request.headers.get("host", "")):
        raise Refuse(HTTPStatus.BAD_REQUEST, "the Host must be a name or an address, with or without a port")
    if not is_allowed(request.headers.get("origin"), request.headers.get("host", ""), origins):
        raise Refuse(HTTPStatus.FORBIDDEN, "pages of this origin may not connect")


UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade, close"}  # RFC 9110 §15.5.22: 426 says to what


def offered_subprotocols(request: Request) -> list[str]:
    """Return the subprotocols that the client offers, its favourite first (RFC 6455 §4.1)."""
    names = request.headers.get("sec-websocket-protocol", "").split(",")
    return [name.strip() for name in names if name.strip()]


def choose_subprotocol(request: Request, known: Sequence[str]) -> str | None:
    """Return the first subprotocol that the client offers and the server knows (RFC 6455 §4.2.2), or None."""
    return next((name for name in offered_subprotocols(request) if name in known), None)


def check_answer(answer: Accept | Refuse, offered: Sequence[str]) -> None:
    """Check the answer that a hook gives.

    Raises:
        ValueError: it accepts a subprotocol that the client does not offer, or has a header or a body that cannot be
            sent.
    """
    if isinstance(answer, Refuse):
        refusal(answer)
    elif answer.subprotocol is not None and answer.subprotocol not in offered:
        raise ValueError(f"the client does not offer the subprotocol {answer.subprotocol!r}")
    for name, value in answer.headers.items():
        if not _TOKEN.fullmatch(name) or not _FIELD_VALUE.fullmatch(value) or name.lower().startswith(_OURS):
            raise ValueError(f"the header {name!r}: {value!r} cannot be set in the answer to a handshake")


def offered_extensions(request: Request) -> Sequence[Offer]:
    """What the client would have, the best first.

    Raises:
        Refuse: the header is malformed, which RFC 6455 §9.1 lets nobody overlook.
    """
    header = request.headers.get("sec-websocket-extensions")
    try:
        return () if header is None else parse_extension(header)
    except InvalidHeaderFormat as error:
        raise Refuse(HTTPStatus.BAD_REQUEST, f"bad Sec-WebSocket-Extensions: {error}") from None


def accept(request: Request, accepted: Accept, extensions: str | None = None) -> bytes:
    """Return the 101 response (RFC 6455 §4.2.2)."""
    digest = sha1(request.headers["sec-websocket-key"].encode() + _GUID, usedforsecurity=False).digest()
    lines = [
        b"HTTP/1.1 101 Switching Protocols",
        b"Upgrade: websocket",
        b"Connection: Upgrade",
        b"Sec-WebSocket-Accept: " + b64encode(digest),
    ]
    if accepted.subprotocol is not None:
        lines.append(b"Sec-WebSocket-Protocol: " + accepted.subprotocol.encode())
    if extensions is not None:
        lines.append(b"Sec-WebSocket-Extensions: " + extensions.encode())
    if accepted.headers:
        lines += [f"{name}: {value}".encode("latin-1") for name, value in accepted.headers.items()]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def refusal(refused: Refuse) -> tuple[list[tuple[str, str]], bytes]:
    """Return the headers and the body of the response to a request that is refused."""
    body = refused.body if isinstance(refused.body, bytes) else f"{refused.body}\n".encode()
    headers = [("Content-Length", str(len(body))), *refused.headers.items()]
    if isinstance(refused.body, str) and all(name.lower() != "content-type" for name, _ in headers):
        headers.insert(0, ("Content-Type", "text/plain; charset=utf-8"))
    return headers, body


def refuse(refused: Refuse, head: Head | None = None) -> bytes:
    """Return the response to a request that is refused; the connection is closed after it."""
    headers, body = refusal(refused)
    if "Connection" not in refused.headers:
        headers.insert(0, ("Connection", "close"))
    lines = [f"HTTP/1.1 {refused.status.value} {refused.status.phrase}", *(f"{k}: {v}" for k, v in headers)]
    response = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    is_head = head is not None and head.data.startswith(b"HEAD ")
    return response if is_head else response + body  # RFC 9110 §9.3.2


def _tokens(header: str) -> list[str]:
    return [token.strip() for token in header.lower().split(",")]
