"""The opening handshake as a handler or a hook sees it: the request, and the two answers to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """The head of an HTTP request.

    Attributes:
        method: GET, for a request that was upgraded.
        path: the path, decoded.
        query: the part behind `?`, as it came.
        http_version: `1.1`, for example.
        headers: the headers by lower-case name. Several values of one are joined by commas, cookies by semicolons.
        peer: the client's address, host and port; None if it connected to a Unix socket. Behind a trusted proxy it is
            what that says, with port 0 if it says none.
        raw_path: the path as it came, not decoded.
        secure: the request came through TLS that this server ends, or that a trusted proxy says it ends.
        certificate: the client's certificate as `ssl.SSLSocket.getpeercert` returns it, if it showed one. Behind a
            proxy that ends TLS, it is the proxy's.
    """

    method: str
    path: str
    query: str
    http_version: str
    headers: Mapping[str, str]
    peer: tuple[str, int] | None = None
    raw_path: str = field(default="", compare=False)
    secure: bool = False
    certificate: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Accept:
    """Upgrade the request.

    Attributes:
        subprotocol: the subprotocol to agree on, one of those that the client offers; None for no subprotocol.
        headers: further headers of the response.
        state: what `WebSocket.state` is to be.
    """

    subprotocol: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    state: Any = None


class Refuse(Exception):
    """Answer the request with an HTTP error instead of the upgrade. A hook may return it or raise it.

    Attributes:
        status: the status of the response, 400 to 599.
        body: its body: plain text, or bytes of the type that a header `Content-Type` names.
        headers: further headers.
    """

    _lowest = 400

    def __init__(self, status: int, body: str | bytes = "", headers: Mapping[str, str] | None = None) -> None:
        self.status = HTTPStatus(status)
        if self.status < self._lowest:
            raise ValueError(f"a request is refused with a status from {self._lowest} to 599, not with {status}")
        self.body = self.status.phrase if body == "" else body
        self.headers = headers or {}
        super().__init__(self.body)


BeforeUpgrade = Callable[[Request], Awaitable[Accept | Refuse]]  # the hook that decides on an upgrade
