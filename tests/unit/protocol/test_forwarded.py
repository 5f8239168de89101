"""What trusted proxies say about a client: whom the server believes, and how far."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.protocol.forwarded import MAX_HOPS, TrustedProxies, are_proxies
from tricorn.request import Request

PROXY = ("10.0.0.1", 5000)
TRUSTED = TrustedProxies(("10.0.0.0/8", "2001:db8::/32", "unix"))


def request(peer: tuple[str, int] | None = PROXY, **headers: str) -> Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Request("GET", "/", "", "1.1", {"host": "inner:8080", **named}, peer)


def client(**headers: str) -> tuple[str, int] | None:
    return TRUSTED.request(request(**headers)).peer


def scope(peer: Any, *headers: tuple[bytes, bytes], kind: str = "http") -> dict[str, Any]:
    return {"type": kind, "client": peer, "scheme": kind[:4], "headers": [(b"host", b"inner"), *headers]}


# Who is trusted


@pytest.mark.parametrize(
    ("proxies", "peer", "trusted"),
    [
        ((), PROXY, False),
        ((), None, False),
        (("unix",), None, True),
        (("unix",), PROXY, False),
        (("10.0.0.1",), PROXY, True),
        (("10.0.0.1",), ("10.0.0.2", 1), False),
        (("10.0.0.0/8",), None, False),
        (("10.0.0.0/8", "unix"), None, True),
        (("10.0.0.0/8",), ("::ffff:10.9.9.9", 1), True),
        (("::ffff:10.0.0.0/104",), PROXY, True),
        (("::ffff:10.0.0.1",), PROXY, True),
        (("::1",), ("::1", 1), True),
        (("fe80::/10",), ("fe80::1%eth0", 1), True),
        (("0.0.0.0/0",), ("::1", 1), False),
        (("0.0.0.0/0",), ("testclient", 1), False),
    ],
)
def test_peers_that_are_trusted(proxies: tuple[str, ...], peer: tuple[str, int] | None, trusted: bool) -> None:
    assert (peer in TrustedProxies(proxies)) is trusted


@pytest.mark.parametrize("right", ["127.0.0.1", "10.0.0.0/8", "::1", "fd00::/8", "unix", "10.0.0.0/255.0.0.0"])
def test_names_of_proxies(right: str) -> None:
    assert are_proxies((right,))


@pytest.mark.parametrize("wrong", ["localhost", "10.0.0.1/8", "10.0.0", "", "*", "UNIX", "[::1]", 1, None])
def test_what_is_no_name_of_a_proxy(wrong: Any) -> None:
    assert not are_proxies(("127.0.0.1", wrong))


def test_a_text_is_no_list_of_proxies() -> None:
    assert not are_proxies("127.0.0.1")


def test_an_untrusted_peer_is_not_believed() -> None:
    asked = request(
        ("203.0.113.7", 1),
        x_forwarded_for="127.0.0.1",
        x_forwarded_proto="https",
        x_forwarded_host="evil.example",
        forwarded="for=127.0.0.1;proto=https;host=evil.example",
    )
    assert TRUSTED.request(asked) is asked


def test_a_trusted_proxy_that_says_nothing_is_the_peer() -> None:
    assert TRUSTED.request(request()) == request()


# The chain


@pytest.mark.parametrize(
    ("header", "peer"),
    [
        ("203.0.113.7", ("203.0.113.7", 0)),
        ("203.0.113.7:4711", ("203.0.113.7", 4711)),
        ("2001:4860::1", ("2001:4860::1", 0)),
        ("[2001:4860::1]:4711", ("2001:4860::1", 4711)),
        ("[2001:4860::1]", ("2001:4860::1", 0)),
        ("::ffff:203.0.113.7", ("203.0.113.7", 0)),
        (" 203.0.113.7 ", ("203.0.113.7", 0)),
        ("127.0.0.1, 203.0.113.7", ("203.0.113.7", 0)),
        ("127.0.0.1, 203.0.113.7, 10.0.0.2", ("203.0.113.7", 0)),
        ("127.0.0.1,203.0.113.7,10.0.0.2,2001:db8::9", ("203.0.113.7", 0)),
        ("203.0.113.7, , 10.0.0.2,", ("203.0.113.7", 0)),
        ("10.0.0.3, 10.0.0.2", ("10.0.0.3", 0)),
        # Malformed: the last good one.
        ("127.0.0.1, unknown, 10.0.0.2", ("10.0.0.2", 0)),
        ("127.0.0.1, 10.0.0.300", PROXY),
        ("127.0.0.1, 203.0.113.7:99999", PROXY),
        ("127.0.0.1, fe80::1%eth0", PROXY),
        ("127.0.0.1, [203.0.113.7]", ("203.0.113.7", 0)),
        ("1:2", PROXY),
        ("::", ("::", 0)),
        ("", PROXY),
        (",,,", PROXY),
    ],
)
def test_x_forwarded_for(header: str, peer: tuple[str, int]) -> None:
    assert client(x_forwarded_for=header) == peer


@pytest.mark.parametrize(
    ("header", "peer"),
    [
        ("for=203.0.113.7", ("203.0.113.7", 0)),
        ("For=203.0.113.7", ("203.0.113.7", 0)),
        ('for="203.0.113.7:4711"', ("203.0.113.7", 4711)),
        ('for="[2001:4860::1]:4711";by=10.0.0.1', ("2001:4860::1", 4711)),
        ('for="203.0.113.7:_port"', ("203.0.113.7", 0)),
        (r'for="203.0.113\.7"', ("203.0.113.7", 0)),
        ("for=203.0.113.7:4711", ("203.0.113.7", 4711)),
        ("proto=https; for=203.0.113.7;by=_x", ("203.0.113.7", 0)),
        ('for=127.0.0.1, for=203.0.113.7;host="a, b", for=10.0.0.2', ("203.0.113.7", 0)),
        ("for=203.0.113.7,, for=10.0.0.2", ("203.0.113.7", 0)),
        ("for=127.0.0.1, for=_hidden, for=10.0.0.2", ("10.0.0.2", 0)),
        ("for=127.0.0.1, for=unknown", PROXY),
        ("for=127.0.0.1, proto=https", PROXY),
        ("for=127.0.0.1, nonsense, for=10.0.0.2", ("10.0.0.2", 0)),
        # A client leaves a quoted string open, or hides one in another.
        ('for="127.0.0.1, for=203.0.113.7', ("203.0.113.7", 0)),
        ('for=127.0.0.1;host=", for=203.0.113.7;proto=http, for=10.0.0.2', ("203.0.113.7", 0)),
        (r'for=203.0.113.7;host="x, for=127.0.0.1;a=\"b\""', ("203.0.113.7", 0)),
        ("", PROXY),
        ("=", PROXY),
    ],
)
def test_forwarded(header: str, peer: tuple[str, int]) -> None:
    assert client(forwarded=header) == peer


def test_a_client_of_a_proxy_that_writes_x_forwarded_for_cannot_write_forwarded() -> None:
    assert client(x_forwarded_for="203.0.113.7", forwarded="for=127.0.0.1") == ("203.0.113.7", 0)


def test_the_chain_is_bounded() -> None:
    hops = ["203.0.113.7", *["10.0.0.2"] * MAX_HOPS]
    assert client(x_forwarded_for=",".join(hops)) == ("10.0.0.2", 0)
    assert client(x_forwarded_for=",".join(hops[:-1])) == ("203.0.113.7", 0)
    assert client(forwarded=",".join(f"for={hop}" for hop in hops)) == ("10.0.0.2", 0)
    assert client(forwarded=",".join(f"for={hop}" for hop in hops[:-1])) == ("203.0.113.7", 0)


@pytest.mark.parametrize("unit", [",", '"', "a=", ";", " ", "\\", 'a="', "a=b;", ' "', ';" ', "for=1,"])
def test_a_long_header_costs_little(unit: str) -> None:
    header = (unit * 16384)[:16384]
    begin = time.process_time()
    for ending in ("", "x", '"', ","):
        client(forwarded=header + ending)
        client(x_forwarded_for=header + ending)
    assert time.process_time() - begin < 1


# What else they say


@pytest.mark.parametrize(
    ("headers", "secure", "host"),
    [
        ({"x_forwarded_proto": "https"}, True, "inner:8080"),
        ({"x_forwarded_proto": "WSS", "x_forwarded_host": "app.example"}, True, "app.example"),
        ({"x_forwarded_proto": "http", "x_forwarded_host": "app.example:8443"}, False, "app.example:8443"),
        ({"x_forwarded_for": "203.0.113.7", "x_forwarded_proto": "gopher"}, False, "inner:8080"),
        ({"x_forwarded_for": "unknown", "x_forwarded_proto": "https"}, True, "inner:8080"),
        ({"x_forwarded_host": "a b"}, False, "inner:8080"),
        ({"x_forwarded_host": "[::1]:80"}, False, "[::1]:80"),
        # Each by the hop of the client; one value is for all.
        (
            {
                "x_forwarded_for": "127.0.0.1, 203.0.113.7, 10.0.0.2",
                "x_forwarded_proto": "http, https, http",
                "x_forwarded_host": "evil.example, app.example, inner",
            },
            True,
            "app.example",
        ),
        ({"x_forwarded_for": "203.0.113.7, 10.0.0.2", "x_forwarded_proto": "https"}, True, "inner:8080"),
        ({"forwarded": "for=203.0.113.7;proto=https;host=app.example"}, True, "app.example"),
        ({"forwarded": 'for=203.0.113.7;proto=https;host="app.example:8443"'}, True, "app.example:8443"),
        (
            {"forwarded": "host=evil.example;proto=http, for=203.0.113.7;proto=https, for=10.0.0.2;host=app.example"},
            True,
            "app.example",
        ),
    ],
)
def test_protocol_and_host(headers: dict[str, str], secure: bool, host: str) -> None:
    asked = TRUSTED.request(request(**headers))
    assert (asked.secure, asked.headers["host"]) == (secure, host)


def test_the_scope_of_an_application() -> None:
    headers = [(b"x-forwarded-for", b"203.0.113.7"), (b"x-forwarded-proto", b"https"), (b"x-forwarded-host", b"a")]
    asked = scope(("10.0.0.1", 1), *headers)
    changes = {"client": ("203.0.113.7", 0), "scheme": "https", "headers": [(b"host", b"a"), *headers]}
    assert TRUSTED.scope(asked) == asked | changes
    assert TRUSTED.scope(scope(["10.0.0.1", 1], headers[1], kind="websocket"))["scheme"] == "wss"
    assert TRUSTED.scope(scope(None, headers[0]))["client"] == ("203.0.113.7", 0)
    for other in (scope(("192.0.2.1", 1), *headers), {"type": "lifespan"}):
        assert TRUSTED.scope(other) is other


# Anything


pieces = st.sampled_from(
    [
        "for=",
        "proto=https",
        "host=",
        "10.0.0.2",
        "203.0.113.7",
        "[::1]",
        ":80",
        ",",
        ";",
        '"',
        "\\",
        " ",
        "_x",
        "é",
        "%",
    ]
)


@given(st.lists(pieces | st.text(max_size=3)).map("".join), st.lists(pieces | st.text(max_size=3)).map("".join))
def test_whatever_comes_the_end_that_a_trusted_proxy_wrote_counts(theirs: str, other: str) -> None:
    """A client that writes before what a proxy adds changes nothing, and nothing raises."""
    for name in ("forwarded", "x_forwarded_for", "x_forwarded_proto", "x_forwarded_host"):
        TRUSTED.request(request(**{name: theirs, "x_forwarded_for": other}))
        TRUSTED.request(request(**{name: theirs}))
    for end in ("203.0.113.9", "203.0.113.9, 10.0.0.2"):
        assert client(x_forwarded_for=f"{theirs}, {end}") == ("203.0.113.9", 0)
        added = ", ".join(f"for={node};proto=http" for node in end.split(", "))
        assert client(forwarded=f"{theirs}, {added}") == ("203.0.113.9", 0)
