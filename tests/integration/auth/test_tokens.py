"""Attacks with tokens, and tokens that are good, over real sockets."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from time import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import HMACAlgorithm
from trio_websocket import ConnectionRejected

from tricorn.chat.identity import Everybody, ThisMachine

Guarded = Callable[..., AbstractAsyncContextManager[Any]]

SECRET = "a secret of thirty-two bytes or more"
RSA = rsa.generate_private_key(65537, 2048)
PUBLIC = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
WAYS = ["header", "subprotocol", "message"]


def enter(server: Any, token: str, way: str) -> AbstractAsyncContextManager[Any]:
    match way:
        case "header":
            return server.connect(f"Bearer {token}".strip())
        case "subprotocol":
            return server.connect(subprotocols=["tricorn.v1", f"bearer.{token}"])
        case _:
            return server.connect()


def segment(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def claims(**more: Any) -> dict[str, Any]:
    return {"sub": "ada", "exp": int(time()) + 60, **more}


def confused() -> str:
    head = f"{segment({'alg': 'HS256', 'typ': 'JWT'})}.{segment(claims())}"
    return f"{head}.{segment(HMACAlgorithm(HMACAlgorithm.SHA256).sign(head.encode(), PUBLIC.encode()))}"


@pytest.mark.parametrize("way", WAYS)
async def test_a_good_token_comes_in(way: str, guarded: Guarded) -> None:
    async with guarded() as server:
        token = server.token("ada", ttl=60)
        async with enter(server, token, way) as client:
            if way == "message":
                await client.say("authenticate", token=token)
            welcome = await client.hear()
            assert welcome["user"] == "ada"
            assert 50 < welcome["expires_at"] - time() <= 60
            assert client.ws.subprotocol == "tricorn.v1"
            assert not any(token.encode() in value for _, value in client.ws.handshake_headers)
            await client.say("ping")
            assert await client.hear() == {"type": "pong"}


async def test_without_a_token_little_may_be_sent(guarded: Guarded) -> None:
    """As much as an `authenticate` needs; and it need not be sent whole to be too much."""
    async with guarded() as server:
        async with server.connect() as client:
            await client.say("authenticate", token="x" * 16384)
            assert (await client.end())[0] == 1009
        async with server.connect() as client:
            await client.ws._stream.send_all(b"\x81\xfe\xff\xff" + bytes(4))  # the head of a text of 65,535 bytes
            assert (await client.end())[0] == 1009
        async with server.connect() as client:
            await client.say("authenticate", token=server.token("ada"))
            await client.until("welcome")
            await client.say("open", conversation="c", more="x" * 100_000)
            assert (await client.hear())["type"] == "opened"


FORGED: dict[str, tuple[str, Callable[[], str], str]] = {
    "another key": (SECRET, lambda: jwt.encode(claims(), "x" * 40), "the token is not valid"),
    "none": (SECRET, lambda: jwt.encode(claims(), None, algorithm="none"), "the token is not valid"),
    "none, by hand": (SECRET, lambda: f"{segment({'alg': 'None'})}.{segment(claims())}.", "the token is not valid"),
    "no signature": (SECRET, lambda: jwt.encode(claims(), SECRET).rpartition(".")[0] + ".", "the token is not valid"),
    "other claims": (
        SECRET,
        lambda: ".".join(
            segment(claims(sub="eve")) if i == 1 else s for i, s in enumerate(jwt.encode(claims(), SECRET).split("."))
        ),
        "the token is not valid",
    ),
    "public key as a secret": (PUBLIC, confused, "the token is not valid"),
    "its own key": (
        PUBLIC,
        lambda: jwt.encode(claims(), SECRET, headers={"jwk": {"kty": "oct", "k": segment(SECRET.encode())}}),
        "the token is not valid",
    ),
    "a key from elsewhere": (
        PUBLIC,
        lambda: jwt.encode(claims(), SECRET, headers={"jku": "http://127.0.0.1:1/jwks", "kid": "../../dev/null"}),
        "the token is not valid",
    ),
    "expired": (SECRET, lambda: jwt.encode(claims(exp=int(time()) - 60), SECRET), "the token has expired"),
    "not yet": (SECRET, lambda: jwt.encode(claims(nbf=int(time()) + 60), SECRET), "the token is not valid yet"),
    "wrong audience": (SECRET, lambda: jwt.encode(claims(aud="x"), SECRET), "the token is for somebody else"),
    "without end": (SECRET, lambda: jwt.encode({"sub": "ada"}, SECRET), "the token lacks a claim"),
    "of nobody": (SECRET, lambda: jwt.encode({"exp": 2**40}, SECRET), "the token lacks a claim"),
    "oversized": (SECRET, lambda: jwt.encode(claims(pad="x" * 7000), SECRET), "the token is not valid"),
    "no token": (SECRET, lambda: "x", "the token is not valid"),
    "empty": (SECRET, lambda: "", "the token is not valid"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("forged", FORGED)
async def test_a_bad_token_gets_4500_and_nothing_else(
    forged: str, way: str, guarded: Guarded, capfd: pytest.CaptureFixture[str]
) -> None:
    key, make, reason = FORGED[forged]
    token = make()
    async with guarded(key) as server, enter(server, token, way) as client:
        if way == "message":
            await client.say("authenticate", token=token)
        assert await client.end() == (4500, reason)
        assert client.heard == []
    records = capfd.readouterr().err
    assert '"code":4500' in records
    assert '"severity":"ERROR"' not in records
    for secret in (SECRET, PUBLIC, json.dumps(PUBLIC), *(part for part in token.split(".") if len(part) > 20)):
        assert secret not in records


@pytest.mark.parametrize(
    ("authorization", "subprotocols"),
    [("Bearer {0}", ["tricorn.v1", "bearer.{0}"]), (None, ["bearer.{0}", "bearer.{0}", "tricorn.v1"])],
)
async def test_a_doubled_token(authorization: str | None, subprotocols: list[str], guarded: Guarded) -> None:
    async with guarded() as server:
        token = server.token()
        offered = [name.format(token) for name in subprotocols]
        async with server.connect(authorization and authorization.format(token), offered) as client:
            assert await client.end() == (4500, "more than one token")
        twice = [(b"Authorization", f"Bearer {token}".encode())]
        async with server.connect(f"Bearer {token}", headers=twice) as client:
            assert await client.end() == (4500, "the token is not valid")


async def test_a_token_larger_than_a_request_may_be(guarded: Guarded) -> None:
    async with guarded() as server:
        with pytest.RaisesGroup(ConnectionRejected, flatten_subgroups=True, allow_unwrapped=True) as raised:
            async with server.connect("Bearer " + "x" * 20_000):
                raise AssertionError("was let in")
        rejected = raised.value.exceptions[0] if isinstance(raised.value, ExceptionGroup) else raised.value
        assert "431" in str(rejected) or rejected.status_code == 431


async def test_the_url_is_no_place_for_a_token(guarded: Guarded, capfd: pytest.CaptureFixture[str]) -> None:
    async with guarded(auth_timeout=0.1) as server:
        token = server.token()
        for query in ("token", "access_token", "bearer", "authorization"):
            async with server.connect(path=f"/ws?{query}={token}") as client:
                assert await client.end() == (4500, "no good token came in time")
                assert client.heard == []
        assert token not in capfd.readouterr().err


# The first message


@pytest.mark.parametrize(
    "first",
    [
        '{"type":"ping"}',
        '{"type":"open","conversation":"home"}',
        '{"type":"post","id":"p","conversation":"home","text":"x"}',
        '{"type":"authenticate"}',
        '{"type":"authenticate","token":5}',
        "{",
        "[" * 10_000,
        b"binary",
    ],
    ids=lambda first: str(first)[:40],
)
async def test_nothing_but_authenticate_comes_first(first: str | bytes, guarded: Guarded) -> None:
    async with guarded() as server, server.connect() as client:
        await client.ws.send_message(first)
        assert await client.end() == (4500, "authenticate first")
        assert client.heard == []


async def test_what_stands_behind_a_refused_token_in_a_batch_is_not_served(guarded: Guarded) -> None:
    async with guarded() as server, server.connect(subprotocols=["tricorn.v1.batch"]) as client:
        await client.ws.send_message('{"type":"authenticate","token":"x"}\n{"type":"ping"}\n{"type":"ping"}')
        assert await client.end() == (4500, "the token is not valid")
        assert client.heard == []


async def test_a_batch_may_begin_with_authenticate(guarded: Guarded) -> None:
    async with guarded() as server, server.connect(subprotocols=["tricorn.v1.batch"]) as client:
        await client.ws.send_message(f'{{"type":"authenticate","token":"{server.token()}"}}\n{{"type":"ping"}}')
        heard = []
        while len(heard) < 2:
            heard += (await client.ws.get_message()).split("\n")
        assert [json.loads(line)["type"] for line in heard] == ["welcome", "pong"]


async def test_silence_is_closed(guarded: Guarded) -> None:
    async with guarded(auth_timeout=0.05) as server, server.connect() as client:
        assert await client.end() == (4500, "no good token came in time")


# The end of a token


async def test_a_token_expires_with_notice(guarded: Guarded) -> None:
    async with guarded(jwt_leeway=0.0) as server, server.connect(f"Bearer {server.token(ttl=2)}") as client:
        assert (await client.hear())["type"] == "welcome"
        assert await client.hear() == {"type": "closing", "reason": "the token expires", "retry_after": 0.0}
        assert await client.end() == (4002, "the token has expired")


async def test_a_token_that_is_replayed_after_its_end(guarded: Guarded) -> None:
    async with guarded(jwt_leeway=0.0) as server:
        token = server.token(ttl=1)
        async with server.connect(f"Bearer {token}") as client:
            assert await client.end() == (4002, "the token has expired")
        for way in WAYS:
            async with enter(server, token, way) as client:
                if way == "message":
                    await client.say("authenticate", token=token)
                assert await client.end() == (4500, "the token has expired")


async def test_a_connection_stays_its_users(guarded: Guarded) -> None:
    async with guarded() as server, server.user("ada") as client:
        await client.say("authenticate", token=server.token("eve"))
        assert await client.end() == (4501, "the token is of another user")
        assert not any('"eve"' in text for text in client.heard)


async def test_a_bad_token_later_ends_the_connection(guarded: Guarded) -> None:
    async with guarded() as server, server.user("ada") as client:
        await client.say("authenticate", token="x")
        assert await client.end() == (4500, "the token is not valid")


# Without a key


async def test_without_a_key_this_machine_is_local(guarded: Guarded) -> None:
    async with guarded(gate=lambda _: ThisMachine()) as server:
        async with server.connect("Bearer whatever") as client:
            welcome = await client.hear()
            assert welcome["user"] == "local"
            assert "expires_at" not in welcome
        async with server.connect(host="rebound.example") as client:
            assert (await client.end())[0] == 4501
            assert client.heard == []


async def test_everybody_when_told_so(guarded: Guarded) -> None:
    async with guarded(gate=lambda _: Everybody()) as server, server.connect(host="chat.example") as client:
        assert (await client.hear())["user"] == "local"


# Other origins


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
async def test_pages_of_other_origins_get_403(origin: str, guarded: Guarded) -> None:
    async with guarded() as server:
        with pytest.RaisesGroup(ConnectionRejected, flatten_subgroups=True, allow_unwrapped=True) as raised:
            async with server.connect(f"Bearer {server.token()}", headers=[(b"Origin", origin.encode())]):
                raise AssertionError("was let in")
        rejected = raised.value.exceptions[0] if isinstance(raised.value, ExceptionGroup) else raised.value
        assert rejected.status_code == 403
        own = [(b"Origin", f"http://127.0.0.1:{server.port}".encode())]
        async with server.connect(f"Bearer {server.token()}", headers=own) as client:
            assert (await client.hear())["type"] == "welcome"


async def test_origins_that_are_listed(guarded: Guarded) -> None:
    async with guarded(origins=("https://app.example",)) as server:
        headers = [(b"Origin", b"https://app.example")]
        async with server.connect(f"Bearer {server.token()}", headers=headers) as client:
            assert (await client.hear())["type"] == "welcome"
