"""Who is admitted, with real keys and tokens."""

from __future__ import annotations

import base64
import json
import socket
import string
from pathlib import Path
from time import time
from typing import Any

import jwt
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from tricorn.chat.identity import Everybody, Identity, NotAdmitted, ThisMachine, handshake_token
from tricorn.service.auth import MAX_TOKEN, Tokens, check_exposure, make_token, rehearse
from tricorn.service.jwt_keys import Keys, parse, parse_for_signing
from tricorn.service.settings import Secret, ServiceSettings
from tricorn.settings import SettingError

SECRET = "a secret of thirty-two bytes or more"
RSA = rsa.generate_private_key(65537, 2048)
NOT_VALID = (4500, "the token is not valid")


def pem(key: Any) -> str:
    """Public or private."""
    if hasattr(key, "private_bytes"):
        return str(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())
    return str(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def claims(**more: Any) -> dict[str, Any]:
    merged = {"sub": "ada", "exp": time() + 60, **more}
    return {name: value for name, value in merged.items() if value is not None}


def segment(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


async def admit(token: str | None, key: str = SECRET, **settings: Any) -> Identity:
    return await Tokens(Keys(parse(key)), ServiceSettings(**settings)).admit(token, "203.0.113.9", {})


async def refused(token: str | None, key: str = SECRET, **settings: Any) -> tuple[int, str]:
    with pytest.raises(NotAdmitted) as raised:
        await admit(token, key, **settings)
    assert raised.value.__cause__ is None
    return raised.value.close


# Good tokens


@pytest.mark.parametrize(
    ("private", "algorithm"),
    [
        (RSA, "RS256"),
        (RSA, "PS256"),
        (RSA, "RS512"),
        (ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (ec.generate_private_key(ec.SECP384R1()), "ES384"),
        (ec.generate_private_key(ec.SECP521R1()), "ES512"),
        (ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
    ],
)
async def test_each_kind_of_key(private: Any, algorithm: str) -> None:
    token = jwt.encode(claims(), private, algorithm=algorithm)
    for key in (pem(private.public_key()), pem(private), f"\n{pem(private)}\n"):
        assert (await admit(token, key)).user == "ada"
    made = make_token(parse_for_signing(pem(private)), "bob", time(), 60, ServiceSettings())
    assert (await admit(made, pem(private.public_key()))).user == "bob"


async def test_a_secret() -> None:
    token = jwt.encode(claims(exp=2**40, conversations=["team-*", "all"]), SECRET)
    assert await admit(token, jwt_leeway=7.0) == Identity("ada", 2**40, ("team-*", "all"), leeway=7.0)
    assert await admit(token, f"{SECRET}\n", jwt_leeway=0.0) == Identity("ada", 2**40, ("team-*", "all"))


async def test_for_whom_and_by_whom() -> None:
    settings = ServiceSettings(jwt_audience="chat", jwt_issuer="https://issuer.example")
    token = make_token(parse_for_signing(SECRET), "ada", time(), 60, settings, ("team-*",))
    both = {"jwt_audience": "chat", "jwt_issuer": "https://issuer.example"}
    assert (await admit(token, **both)).shared == ("team-*",)
    assert (await admit(jwt.encode(claims(aud=["x", "chat"], iss=both["jwt_issuer"]), SECRET), **both)).user == "ada"
    for aud, iss, says in [
        ("other", both["jwt_issuer"], "the token is for somebody else"),
        ("Chat", both["jwt_issuer"], "the token is for somebody else"),
        (None, both["jwt_issuer"], "the token lacks a claim"),
        ("chat", "https://issuer.example.evil", "the token is of another issuer"),
        ("chat", None, "the token lacks a claim"),
    ]:
        assert await refused(jwt.encode(claims(aud=aud, iss=iss), SECRET), **both) == (4500, says)
    assert await refused(jwt.encode(claims(aud="chat"), SECRET)) == (4500, "the token is for somebody else")


async def test_the_clocks_may_differ_by_the_leeway() -> None:
    assert (await admit(jwt.encode(claims(exp=time() - 5), SECRET))).user == "ada"
    assert (await admit(jwt.encode(claims(nbf=time() + 5), SECRET))).user == "ada"
    assert await refused(jwt.encode(claims(exp=time() - 20), SECRET)) == (4500, "the token has expired")
    assert await refused(jwt.encode(claims(nbf=time() + 20), SECRET)) == (4500, "the token is not valid yet")
    assert await refused(jwt.encode(claims(exp=time() - 5), SECRET), jwt_leeway=0.0) == (4500, "the token has expired")


# Forged ones


@pytest.mark.parametrize(
    "token",
    [
        None,
        "",
        ".",
        "..",
        "...",
        "a.b.c",
        "x" * 100,
        "ü.ü.ü",
        "\ud800",
        jwt.encode(claims(), "another secret of thirty-two bytes or more"),
        jwt.encode(claims(), "", algorithm="none"),
        f"{segment({'alg': 'none'})}.{segment(claims())}.",
        f"{segment({'alg': 'NONE'})}.{segment(claims())}.",
        f"{segment({'alg': None})}.{segment(claims())}.",
        f"{segment({'alg': []})}.{segment(claims())}.AA",
        f"{segment({'alg': {}})}.{segment(claims())}.AA",
        f"{segment({})}.{segment(claims())}.AA",
        f"{segment([])}.{segment(claims())}.AA",
        f"{segment({'alg': 'HS256', 'kid': 5})}.{segment(claims())}.AA",
        f"{segment(b'[' * 4000)}.{segment(claims())}.AA",
        f"{segment(b'9' * 5000)}.{segment(claims())}.AA",
        f"{segment({'alg': 'HS256'})}.{segment(claims())}.",
        f"{segment({'alg': 'HS256', 'b64': False, 'crit': ['b64']})}..AA",
        jwt.encode(claims(), SECRET, headers={"crit": ["exp"], "exp": 1}),
        jwt.encode(claims(), SECRET + "x" * 32, algorithm="HS512"),
        jwt.encode(claims(), RSA, algorithm="RS256"),
        jwt.encode(claims(), RSA, algorithm="RS256", headers={"jwk": {"kty": "oct", "k": segment(b"x" * 32)}}),
        jwt.encode(claims(), SECRET)[:-1],
        jwt.encode(claims(), SECRET) + "A",
        jwt.encode(claims(), SECRET) + ".",
        " " + jwt.encode(claims(), SECRET),
        jwt.encode(claims(), SECRET) + "\n",
    ],
    ids=lambda token: repr(token)[:40],
)
async def test_what_is_no_token_of_ours(token: str | None) -> None:
    assert await refused(token) == NOT_VALID


@given(st.text(max_size=200) | st.text(string.ascii_letters + "._-", max_size=200))
def test_no_text_is_admitted_or_breaks_anything(token: str) -> None:
    assert trio.run(refused, token) == NOT_VALID


@given(st.data())
def test_a_changed_token_is_refused(data: st.DataObject) -> None:
    token = jwt.encode(claims(exp=2**40), SECRET)
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.sampled_from(string.ascii_letters + string.digits + "-_.=").filter(lambda c: c != token[at]))
    assert trio.run(refused, token[:at] + other + token[at + 1 :]) == NOT_VALID


async def test_a_public_key_is_no_secret() -> None:
    """The token is signed with HMAC, and the key to that is the public key, which everybody may know."""
    public = pem(RSA.public_key())
    for key in (public, public.strip(), public.encode()):
        material = key.encode() if isinstance(key, str) else key
        head, body = segment({"alg": "HS256", "typ": "JWT"}), segment(claims())
        signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(
            f"{head}.{body}".encode(), material
        )
        assert await refused(f"{head}.{body}.{segment(signature)}", public) == NOT_VALID


async def test_an_ec_key_is_used_with_its_own_curve_only() -> None:
    small, large = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())
    assert await refused(jwt.encode(claims(), large, algorithm="ES384"), pem(small.public_key())) == NOT_VALID


async def test_a_token_has_a_size() -> None:
    room = MAX_TOKEN - len(jwt.encode(claims(exp=2**40, pad=""), SECRET))
    fits = jwt.encode(claims(exp=2**40, pad="x" * (room * 3 // 4)), SECRET)
    assert MAX_TOKEN - 4 < len(fits) <= MAX_TOKEN
    assert (await admit(fits)).user == "ada"
    assert await refused(jwt.encode(claims(exp=2**40, pad="x" * (room * 3 // 4 + 4)), SECRET)) == NOT_VALID


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"sub": None}, "the token lacks a claim"),
        ({"exp": None}, "the token lacks a claim"),
        ({"sub": ""}, "the token has a claim that cannot be used"),
        ({"sub": "x" * 257}, "the token has a claim that cannot be used"),
        ({"sub": 5}, "the token is not valid"),
        ({"sub": "a\x00b"}, "the token is not valid"),
        ({"sub": "a\nb"}, "the token is not valid"),
        ({"sub": "\u202eada"}, "the token is not valid"),
        ({"sub": "\ud800"}, "the token is not valid"),
        ({"exp": "soon"}, "the token is not valid"),
        ({"exp": str(2**40)}, "the token has a claim that cannot be used"),
        ({"exp": True}, "the token has expired"),
        ({"exp": float("inf")}, "the token is not valid"),
        ({"exp": float("nan")}, "the token is not valid"),
        ({"exp": 10**400}, "the token has a claim that cannot be used"),
        ({"exp": [2**40]}, "the token is not valid"),
        ({"iat": 2**40}, "the token is not valid yet"),
        ({"conversations": "team-*"}, "the token has a claim that cannot be used"),
        ({"conversations": [5]}, "the token has a claim that cannot be used"),
        ({"conversations": ["../*"]}, "the token has a claim that cannot be used"),
        ({"conversations": ["[a-z]"]}, "the token has a claim that cannot be used"),
        ({"conversations": ["x"] * 101}, "the token has a claim that cannot be used"),
    ],
    ids=repr,
)
async def test_claims_that_cannot_be_used(more: dict[str, Any], says: str) -> None:
    body = json.dumps(claims(**more)).encode()
    assert await refused(jwt.api_jws.encode(body, SECRET)) == (4500, says)


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b"[" * 5000, b'{"sub":"ada","exp":1' + b"0" * 5000 + b"}", b"\xff"])
async def test_a_signed_token_without_claims(body: bytes) -> None:
    assert await refused(jwt.api_jws.encode(body, SECRET)) == NOT_VALID


async def test_of_a_claim_that_comes_twice_the_last_counts() -> None:
    body = b'{"exp":%d,"sub":"ada","sub":"bob"}' % 2**40
    assert (await admit(jwt.api_jws.encode(body, SECRET))).user == "bob"


# Whose a conversation is


def test_no_two_users_conversations_have_the_same_key() -> None:
    assert Identity("ada").key("home") == "ada/home"
    assert Identity("ada/x").key("home") != Identity("ada").key("home")
    assert Identity("ada", None, ("team-?", "all")).key("team-1") == "/team-1"
    assert Identity("ada", None, ("team-?", "all")).key("team-12") == "ada/team-12"
    assert Identity("ada", None, ("team-?", "all")).key("ALL") == "ada/ALL"


IDS = st.text(string.ascii_letters + "._:~-", min_size=1, max_size=4)
USERS = st.text(string.ascii_letters + "./:~- é", min_size=1, max_size=5)


@given(USERS, IDS, USERS, IDS)
def test_keys_tell_users_and_conversations_apart(user: str, id: str, other: str, id2: str) -> None:
    assert (Identity(user).key(id) == Identity(other).key(id2)) == ((user, id) == (other, id2))
    assert Identity(user).key(id) != Identity(other, None, ("*",)).key(id2)


# Without tokens


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:80"])
@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1"])
async def test_this_machine(peer: str, host: str) -> None:
    assert await ThisMachine().admit(None, peer, {"host": host}) == Identity("local")


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("203.0.113.9", "localhost:8080"),
        ("192.168.0.2", "localhost:8080"),
        ("fe80::1%eth0", "localhost:8080"),
        ("2001:db8::1", "localhost:8080"),
        ("", "localhost:8080"),
        ("127.0.0.1", ""),
        ("127.0.0.1", "rebound.example:8080"),
        ("127.0.0.1", "localhost.evil.example"),
        ("127.0.0.1", "127.0.0.1.evil.example:8080"),
        ("127.0.0.1", "203.0.113.9"),
        ("127.0.0.1", "localhost:8080, evil.example"),
    ],
)
async def test_other_machines_and_names_that_lead_here(peer: str, host: str) -> None:
    with pytest.raises(NotAdmitted) as raised:
        await ThisMachine().admit(None, peer, {"host": host})
    assert raised.value.close[0] == 4501
    assert await Everybody().admit(None, peer, {"host": host}) == Identity("local")


@pytest.mark.parametrize("name", ["forwarded", "x-forwarded-for", "x-forwarded-server", "x-real-ip", "via"])
async def test_without_a_key_nobody_comes_in_through_a_proxy(name: str) -> None:
    headers = {"host": "127.0.0.1:8080", name: "127.0.0.1"}
    with pytest.raises(NotAdmitted) as raised:
        await ThisMachine().admit(None, "127.0.0.1", headers)
    code, reason = raised.value.close
    assert code == 4501
    assert reason.endswith("a server behind a proxy needs a key")
    assert await Everybody().admit(None, "127.0.0.1", headers) == Identity("local")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "chat.example", "127.0.0.1.example"])
def test_nobody_is_let_in_by_accident(host: str) -> None:
    with pytest.raises(SettingError) as raised:
        check_exposure(ServiceSettings(host=host))
    for way_out in ("TRICORN_JWT_KEY", "127.0.0.1", "--auth none"):
        assert way_out in str(raised.value)
    check_exposure(ServiceSettings(host=host, auth="none"))
    check_exposure(ServiceSettings(host=host, jwt_key=Secret(SECRET)))


@pytest.mark.parametrize("bind", [":0", "unix:/run/socket", "[::]:0", "localhost:0 0.0.0.0:0"])
def test_each_place_to_listen_counts(bind: str) -> None:
    with pytest.raises(SettingError, match="without a key"):
        check_exposure(ServiceSettings(bind=tuple(bind.split())))
    check_exposure(ServiceSettings(bind=tuple(bind.split()), auth="none"))


def test_a_socket_that_was_passed_counts_by_its_address(tmp_path: Path) -> None:
    with socket.socket() as inside, socket.socket() as outside, socket.socket(socket.AF_UNIX) as unix:
        inside.bind(("127.0.0.1", 0))
        outside.bind(("0.0.0.0", 0))
        unix.bind(str(tmp_path / "socket"))
        check_exposure(ServiceSettings(bind=(f"fd:{inside.fileno()}",)))
        for each in (outside, unix):
            with pytest.raises(SettingError, match="without a key"):
                check_exposure(ServiceSettings(bind=(f"fd:{inside.fileno()}", f"fd:{each.fileno()}")))
            each.getsockname()  # it is open


def test_cloud_run_is_no_exception() -> None:
    with pytest.raises(SettingError):
        check_exposure(ServiceSettings.from_environ({"K_SERVICE": "chat", "PORT": "8080"}))
    check_exposure(ServiceSettings.from_environ({"K_SERVICE": "chat", "PORT": "8080", "TRICORN_AUTH": "none"}))


# Where a token is


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({}, None),
        ({"authorization": "Bearer a.b.c"}, "a.b.c"),
        ({"authorization": "bearer   a.b.c "}, "a.b.c"),
        ({"authorization": "Basic YTpi"}, None),
        ({"authorization": "Bearer"}, ""),
        ({"sec-websocket-protocol": "tricorn.v1, bearer.a.b.c"}, "a.b.c"),
        ({"sec-websocket-protocol": "bearer.a.b.c,tricorn.v1"}, "a.b.c"),
        ({"sec-websocket-protocol": "tricorn.v1"}, None),
        ({"sec-websocket-protocol": "bearer."}, ""),
        ({"sec-websocket-protocol": "bearer"}, None),
        ({"cookie": "token=a.b.c"}, None),
    ],
)
def test_the_token_of_a_handshake(headers: dict[str, str], token: str | None) -> None:
    assert handshake_token(headers) == token


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer a.b.c", "sec-websocket-protocol": "tricorn.v1, bearer.a.b.c"},
        {"authorization": "Bearer", "sec-websocket-protocol": "bearer.a.b.c"},
        {"sec-websocket-protocol": "bearer.a.b.c, bearer.a.b.c"},
    ],
)
def test_two_tokens_are_none(headers: dict[str, str]) -> None:
    with pytest.raises(NotAdmitted) as raised:
        handshake_token(headers)
    assert raised.value.close == (4500, "more than one token")


def test_the_rehearsal() -> None:
    rehearse()
