"""Which pages may connect: RFC 6455 §10.2."""

from __future__ import annotations

from http import HTTPStatus

import pytest

from tricorn.protocol.handshake import check_origin, check_upgrade
from tricorn.protocol.origin import check_pattern
from tricorn.request import Refuse, Request
from tricorn.settings import SettingError, Settings

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


# Patterns


@pytest.mark.parametrize(
    ("pattern", "origins"),
    [
        ("https://*.example.com", ["https://a.example.com", "https://a.b.example.com", "https://a.example.com:443"]),
        ("http://localhost:*", ["http://localhost", "http://localhost:5173", "http://localhost:80"]),
        ("https://*.example.com:*", ["https://a.example.com", "https://a.example.com:8443"]),
        ("https://example.com:443", ["https://example.com", "https://example.com:443"]),
        ("http://example.com:80", ["http://example.com"]),
        ("https://example.com", ["https://example.com:443"]),
        ("http://[::1]:8080", ["http://[::1]:8080"]),
        ("capacitor://localhost", ["capacitor://localhost"]),
        ("tauri://localhost", ["tauri://localhost"]),
        (
            "chrome-extension://abcdefghijklmnopabcdefghijklmnop",
            ["chrome-extension://abcdefghijklmnopabcdefghijklmnop"],
        ),
        ("https://example.com.", ["https://example.com."]),
        ("https://xn--bcher-kva.example", ["https://xn--bcher-kva.example"]),
        (
            "moz-extension://2c127fa4-62c7-7e4f-90e5-472b45eecfdc",
            ["moz-extension://2c127fa4-62c7-7e4f-90e5-472b45eecfdc"],
        ),
        ("null", ["null"]),
        ("*", ["null", "https://any.example", "capacitor://localhost"]),
    ],
)
def test_a_pattern_lets_in(pattern: str, origins: list[str]) -> None:
    check_pattern(pattern)
    for origin in origins:
        knock("server.example", origin, ("https://first.example", pattern))


@pytest.mark.parametrize(
    ("pattern", "origins"),
    [
        (
            "https://*.example.com",
            [
                "https://example.com",
                "https://.example.com",
                "https://evilexample.com",
                "https://a.example.com.evil.net",
                "http://a.example.com",
                "https://a.example.com:8443",
                "https://*.example.com.evil.net",
                "https://a@b.example.com",
                "https://a.example.com/",
                "null",
            ],
        ),
        (
            "http://localhost:*",
            ["https://localhost", "http://localhost.evil.net", "http://a.localhost", "http://localhost:x"],
        ),
        ("capacitor://localhost", ["http://localhost", "capacitor://localhost:1", "capacitor://other"]),
        ("https://example.com", ["null", "https://example.com:80"]),
    ],
)
def test_a_pattern_keeps_out(pattern: str, origins: list[str]) -> None:
    for origin in origins:
        with pytest.raises(Refuse):
            knock("server.example", origin, (pattern,))


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("example.org", "must be an origin"),
        ("https://", "must be an origin"),
        ("https://a.example/", "must be an origin"),
        ("https://a.example/chat", "must be an origin"),
        ("https://user@a.example", "must be an origin"),
        ("https://a b", "must be an origin"),
        ("", "must be an origin"),
        ("Null", "must be an origin"),
        ("HTTPS://a.example", "must be an origin"),
        ("https://A.example", "browsers write this host as a.example"),
        ("https://bücher.example", "browsers write this host as xn--bcher-kva.example"),
        ("http://[0:0::1]", r"browsers write this host as \[::1\]"),
        ("http://127.1", "there is no such host"),
        ("http://[nonsense]", "must be an origin"),
        ("https://a.*.example", "whole subdomains"),
        ("https://*", "whole subdomains"),
        ("https://a*.example", "whole subdomains"),
        ("https://a.example:0443", "the port"),
        ("https://a.example:65536", "the port"),
        ("https://a.example:0", "the port"),
        ("https://a.example:" + "9" * 5000, "the port"),
        ("https://*.127.0.0.1", "no subdomains"),
        ("https://*.0x7f", "no subdomains"),
        ("http://a.0x7f", "there is no such host"),
        ("http://127.0.0.1.", "there is no such host"),
        ("https://a%20b.example", "there is no such host"),
        ("https://a|b.example", "there is no such host"),
        ("https://a\\b.example", "there is no such host"),
        ("chrome-extension://tricorn", "the id of an extension"),
        ("chrome-extension://abcdefghijklmnopabcdefghijklmnop:80", "the id of an extension"),
        ("chrome-extension://*", "whole subdomains"),
        ("about://blank", "null"),
        ("javascript://a", "null"),
        ("ws://a.example", "http://"),
        ("wss://a.example", "https://"),
        ("file://a", "null"),
    ],
)
def test_a_pattern_that_no_browser_can_match_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_pattern(pattern)
    with pytest.raises(SettingError, match="origins="):
        Settings(origins=(pattern,))
