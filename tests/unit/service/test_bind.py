from __future__ import annotations

import pytest

from tricorn.listening.binds import check_bind, parse_bind
from tricorn.service.bind import not_bound, show_bind, show_urls
from tricorn.settings import SettingError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        ("localhost:0", "localhost", 0),
        ("[::1]:65535", "::1", 65535),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
        (":8080", "", 8080),
    ],
)
def test_bind(text: str, host: str, port: int) -> None:
    assert parse_bind(text) == (host, port)
    assert show_bind(host, port) == text


HOST_AND_PORT = "must be HOST:PORT, for example 127.0.0.1:8080"
BRACKETS = "an IPv6 address, and only that, has brackets: [::1]:8080"
PORT = "the port must be a whole number from 0 to 65535"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", HOST_AND_PORT),
        ("localhost", HOST_AND_PORT),
        ("[]:8080", HOST_AND_PORT),
        ("my host:8080", HOST_AND_PORT),
        ("::1:8080", BRACKETS),
        ("[::1:8080", BRACKETS),
        ("[localhost]:8080", BRACKETS),
        ("http://localhost:8080", HOST_AND_PORT),
        ("localhost:", PORT),
        ("localhost:http", PORT),
        ("localhost:-1", PORT),
        ("localhost:65536", PORT),
        ("localhost:8080 ", PORT),
        ("localhost:" + "9" * 5000, PORT),
    ],
)
def test_bad_bind(text: str, error: str) -> None:
    with pytest.raises(SettingError) as raised:
        parse_bind(text, "--bind ")
    assert str(raised.value) == f"--bind {text}: {error}"


def test_why_an_address_cannot_be_had_is_the_innermost_reason() -> None:
    inner = OSError(98, "Address already in use")
    outer = OSError("unable to bind")
    outer.__cause__ = ExceptionGroup("", [inner])
    assert str(not_bound(outer, "[::1]:80", "--bind ")) == "--bind [::1]:80: address already in use"
    assert str(not_bound(OSError("no: Such"), "h:80", "--bind ")) == "--bind h:80: such"


@pytest.mark.parametrize("text", ["unix:/run/socket", "unix:socket", "fd:0", "fd:17", ":0", "localhost:80"])
def test_what_can_be_listened_on(text: str) -> None:
    check_bind(text)


@pytest.mark.parametrize(
    "text", ["unix:", "unix:a\0b", "fd:", "fd:-1", "fd:x", "fd:1 ", "fd://", "fd:" + "9" * 5000, "/socket"]
)
def test_what_cannot(text: str) -> None:
    with pytest.raises(SettingError, match=r"^--bind [^\n]*: must be "):
        check_bind(text, "--bind ")


def test_several_addresses_are_shown_in_a_line() -> None:
    shown = show_urls("http", [("127.0.0.1", 80), ("::1", 80), "/a\nb", "\0abstract"])
    assert shown == "http://127.0.0.1:80, http://[::1]:80, 'unix:/a\\nb', 'unix:\\x00abstract'"
