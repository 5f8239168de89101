"""From request heads to answers, RFC 6455 §4.2."""

from __future__ import annotations

from http import HTTPStatus

import pytest

from tricorn.protocol.handshake import (
    Head,
    Offer,
    accept,
    check_origin,
    check_upgrade,
    choose_subprotocol,
    offered_extensions,
    refuse,
    wants_websocket,
)
from tricorn.request import Accept, Refuse, Request

HEADERS = {
    "host": "example.com",
    "upgrade": "websocket",
    "connection": "Upgrade",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    "sec-websocket-version": "13",
}
HEAD = b"GET /chat?a=1&b=%20 HTTP/1.1\r\nHost: example.com\r\nX-One: 1\r\nx-two: \xe9\r\nX-ONE: 2\r\n\r\n"


def request(method: str = "GET", version: str = "1.1", path: str = "/", **headers: str | None) -> Request:
    changed = HEADERS | {name.replace("_", "-"): value for name, value in headers.items()}
    return Request(method, path, "", version, {name: value for name, value in changed.items() if value is not None})


def check(asked: Request) -> None:
    check_upgrade(asked)
    check_origin(asked, ())


# The head


def test_a_head_in_one_piece() -> None:
    head = Head(1000)
    assert head.receive_data(HEAD + b"behind") == Request(
        "GET", "/chat", "a=1&b=%20", "1.1", {"host": "example.com", "x-one": "1, 2", "x-two": "é"}
    )
    assert head.data == HEAD + b"behind"
    assert head.finish() == b"behind"
    assert head.data == b""


def test_a_head_byte_by_byte() -> None:
    head = Head(len(HEAD))
    for byte in HEAD[:-1]:
        assert head.receive_data(bytes([byte])) is None
    read = head.receive_data(HEAD[-1:])
    assert read is not None
    assert read.path == "/chat"
    assert head.data == HEAD
    assert head.finish() == b""


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/", "/", ""),
        (b"/%C3%A9%2F%20?x=%C3%A9?y", "/é/ ", "x=%C3%A9?y"),
        (b"/%ff", "/\ufffd", ""),
        (b"//a//b?", "//a//b", ""),
        (b"*", "*", ""),
    ],
)
def test_the_path_is_decoded_and_the_query_is_not(target: bytes, path: str, query: str) -> None:
    read = Head(1000).receive_data(b"OPTIONS " + target + b" HTTP/1.1\r\nHost: h\r\n\r\n")
    assert read is not None
    assert (read.path, read.query) == (path, query)


def test_an_absolute_form_goes_before_the_host_header() -> None:
    """RFC 9112 §3.2.2."""
    read = Head(1000).receive_data(b"GET http://there:81/ HTTP/1.1\r\nHost: here\r\n\r\n")
    assert read is not None
    assert read.headers["host"] == "there:81"


@pytest.mark.parametrize("host", ["", "a.example", "a.example:", "127.0.0.1:80", "[::1]", "[::1]:80", "x_y%41"])
def test_hosts_that_are_well_formed(host: str) -> None:
    check_origin(request(host=host), ())


@pytest.mark.parametrize("host", ["a b", "a/b", "a, b", "u@h", "a:b", "::1", "[::1", "a?b", "\xe9", "a\x01"])
def test_hosts_that_are_not(host: str) -> None:
    with pytest.raises(Refuse, match="the Host must be"):
        check_origin(request(host=host), ())


@pytest.mark.parametrize("version", ["0.9", "2.0", "3.1"])
def test_other_versions_of_http(version: str) -> None:
    with pytest.raises(Refuse) as caught:
        Head(1000).receive_data(f"GET / HTTP/{version}\r\nHost: h\r\n\r\n".encode())
    assert caught.value.status == HTTPStatus.HTTP_VERSION_NOT_SUPPORTED


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nbad name: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nx: a\0b\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of TLS
    ],
)
def test_a_malformed_head(data: bytes) -> None:
    with pytest.raises(Refuse, match="bad request head") as caught:
        Head(1000).receive_data(data)
    assert caught.value.status == HTTPStatus.BAD_REQUEST


def feed(head: Head, data: bytes, size: int) -> None:
    for start in range(0, len(data), size):
        head.receive_data(data[start : start + size])


@pytest.mark.parametrize("size", [1, 100, 10_000])
@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_a_head_that_is_too_large_however_it_comes(size: int, end: bytes) -> None:
    data = b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"x" * 1000 + end
    with pytest.raises(Refuse) as caught:
        feed(Head(1000), data, size)
    assert caught.value.status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE


def test_what_is_behind_a_head_does_not_count() -> None:
    head = Head(len(HEAD))
    assert head.receive_data(HEAD + bytes(10_000)) is not None


@pytest.mark.parametrize("size", [1, 5, 100])
def test_http2_is_seen_from_its_preface_and_left_alone(size: int) -> None:
    data = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
    head = Head(1000)
    for start in range(0, len(data), size):
        assert head.receive_data(data[start : start + size]) is None
    assert head.is_http2
    assert head.data == data


# Whether it asks for an upgrade


@pytest.mark.parametrize(
    ("upgrade", "wants"),
    [
        ("websocket", True),
        ("WebSocket", True),
        ("h2c, websocket", True),
        ("h2c", False),
        ("websockets", False),
        ("", False),
    ],
)
def test_wants_websocket(upgrade: str, wants: bool) -> None:
    assert wants_websocket(request(upgrade=upgrade)) == wants


def test_http_1_0_knows_no_upgrade() -> None:
    assert not wants_websocket(request(version="1.0"))


def test_who_names_no_protocol_wants_no_websocket() -> None:
    assert not wants_websocket(request(upgrade=None))


# The check


@pytest.mark.parametrize(
    "good",
    [
        request(),
        request(connection="keep-alive, UPGRADE"),
        request(content_length="0"),
    ],
)
def test_what_is_upgraded(good: Request) -> None:
    check(good)


@pytest.mark.parametrize(
    ("bad", "status", "text"),
    [
        (request("POST"), 405, "a WebSocket upgrade is a GET request"),
        (request(connection="keep-alive"), 400, "the Connection header must name Upgrade"),
        (request(connection=None), 400, "the Connection header must name Upgrade"),
        (request(host="a b"), 400, "the Host must be a name or an address, with or without a port"),
        (request(content_length="1"), 413, "a WebSocket upgrade has no body"),
        (request(transfer_encoding="chunked"), 413, "a WebSocket upgrade has no body"),
        (request(sec_websocket_version="8"), 426, "the Sec-WebSocket-Version must be 13"),
        (request(sec_websocket_version=None), 426, "the Sec-WebSocket-Version must be 13"),
        *(
            (request(sec_websocket_key=key), 400, "the Sec-WebSocket-Key must be 16 bytes in base64")
            for key in (None, "", "short", "é", "dGhlIHNhbXBsZSBub25jZ", "AAAAAAAAAAAAAAAAAAAA", HEADERS["host"])
        ),
    ],
)
def test_what_is_refused(bad: Request, status: int, text: str) -> None:
    with pytest.raises(Refuse) as caught:
        check(bad)
    assert (caught.value.status, str(caught.value)) == (status, text)


@pytest.mark.parametrize(
    ("bad", "headers"),
    [
        (request("PUT"), {"Allow": "GET"}),
        (
            request(sec_websocket_version="14"),
            {"Sec-WebSocket-Version": "13", "Upgrade": "websocket", "Connection": "Upgrade, close"},
        ),
    ],
)
def test_what_a_refusal_says_in_its_headers(bad: Request, headers: dict[str, str]) -> None:
    with pytest.raises(Refuse) as caught:
        check_upgrade(bad)
    assert caught.value.headers == headers


# The answers


@pytest.mark.parametrize(
    ("offered", "known", "chosen"),
    [
        (None, ["a"], None),
        ("", ["a"], None),
        ("a", [], None),
        ("a", ["a"], "a"),
        ("b, a", ["a", "b"], "b"),
        ("c ,a", ["a", "b"], "a"),
        ("A", ["a"], None),
    ],
)
def test_choose_subprotocol(offered: str | None, known: list[str], chosen: str | None) -> None:
    assert choose_subprotocol(request(sec_websocket_protocol=offered), known) == chosen


def test_accept_answers_the_example_of_the_rfc() -> None:
    """RFC 6455 §1.3."""
    assert accept(request(), Accept()) == (
        b"HTTP/1.1 101 Switching Protocols\r\n"
        b"Upgrade: websocket\r\n"
        b"Connection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
        b"\r\n"
    )


def test_accept_names_the_subprotocol() -> None:
    assert accept(request(), Accept("chat")).endswith(b"=\r\nSec-WebSocket-Protocol: chat\r\n\r\n")


def test_refuse() -> None:
    assert refuse(Refuse(HTTPStatus.METHOD_NOT_ALLOWED, "a é", {"Allow": "GET"}), Head(1000)) == (
        b"HTTP/1.1 405 Method Not Allowed\r\n"
        b"Connection: close\r\n"
        b"Content-Type: text/plain; charset=utf-8\r\n"
        b"Content-Length: 5\r\n"
        b"Allow: GET\r\n"
        b"\r\n"
        b"a \xc3\xa9\n"
    )


def test_refuse_without_content_for_head() -> None:
    head = Head(1000)
    head.receive_data(b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n")
    assert refuse(Refuse(HTTPStatus.METHOD_NOT_ALLOWED, "no"), head).endswith(b"Content-Length: 3\r\n\r\n")


# Extensions


@pytest.mark.parametrize(
    ("header", "offers"),
    [
        (None, []),
        ("a", [("a", [])]),
        ('a; b; c=1, a; d="2"', [("a", [("b", None), ("c", "1")]), ("a", [("d", "2")])]),
    ],
)
def test_extensions_are_read(header: str | None, offers: list[Offer]) -> None:
    assert list(offered_extensions(request(sec_websocket_extensions=header))) == offers


@pytest.mark.parametrize("header", ["", ",", "a;", "a;=1", "a; b=", "a b", 'a; b="x y"', 'a; b="', "\xe9"])
def test_malformed_extensions_are_refused(header: str) -> None:
    with pytest.raises(Refuse, match="bad Sec-WebSocket-Extensions") as caught:
        offered_extensions(request(sec_websocket_extensions=header))
    assert caught.value.status == HTTPStatus.BAD_REQUEST


def test_accept_names_the_extensions() -> None:
    assert accept(request(), Accept(), "x; y").endswith(b"=\r\nSec-WebSocket-Extensions: x; y\r\n\r\n")
