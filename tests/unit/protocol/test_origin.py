"""Which pages may connect: RFC 6455 §10.2."""

from __future__ import annotations

from http import HTTPStatus

import pytest

from tricorn.protocol.handshake import check_origin, check_upgrade
from tricorn.request import Refuse, Request

HANDSHAKE = {
    "upgrade": "websocket",
    "connection": "Upgrade",
    "sec-websocket-version": "13",
    "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


def knock(host: str, origin: str | None, origins: tuple[str, ...] = ()) -> None:
    headers = {**HANDSHAKE, "host": host, **({} if origin is None else {"origin": origin})}
    request = Request("GET", "/ws", "", "1.1", headers)
    check_upgrade(request)
    check_origin(request, origins)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("example.org", None),
        ("example.org", "https://example.org"),
        ("example.org", "http://example.org"),
        ("Example.ORG", "https://example.org"),
        ("example.org:443", "https://example.org"),
        ("example.org:80", "http://example.org"),
        ("example.org:8443", "https://example.org:8443"),
        ("[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_the_own_pages_may_connect_and_what_is_no_browser(host: str, origin: str | None) -> None:
    knock(host, origin)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("example.org", "https://evil.example"),
        ("example.org", "https://example.org.evil.example"),
        ("example.org", "https://evil.example.org"),
        ("example.org", "https://example.org:8443"),
        ("example.org:80", "https://example.org"),
        ("example.org", "https://user@example.org"),
        ("example.org", "https://example.org/"),
        ("example.org", "https://example.org, https://evil.example"),
        ("example.org", "https://EXAMPLE.org"),
        ("example.org", "example.org"),
        ("example.org", "//example.org"),
        ("example.org", "ftp://example.org"),
        ("example.org", "chrome-extension://example.org"),
        ("example.org", "null"),
        ("example.org", ""),
        ("", "https://"),
        ("", "http://"),
        ("localhost:8080", "http://127.0.0.1:8080"),
        ("localhost:8080", "http://localhost:8081"),
    ],
)
def test_pages_of_others_get_403(host: str, origin: str) -> None:
    with pytest.raises(Refuse) as refused:
        knock(host, origin)
    assert refused.value.status == HTTPStatus.FORBIDDEN
    assert origin not in str(refused.value) or not origin


def test_the_list_is_taken_literally() -> None:
    knock("example.org", "https://app.example", ("https://app.example",))
    knock("example.org", "https://example.org", ("https://app.example",))
    knock("example.org", "https://any.example", ("*",))
    knock("example.org", "null", ("*",))
    for origin in (
        "http://app.example",
        "https://app.example:444",
        "https://app.example.evil",
        "https://x.app.example",
    ):
        with pytest.raises(Refuse):
            knock("example.org", origin, ("https://app.example",))
