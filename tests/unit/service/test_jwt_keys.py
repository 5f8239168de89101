"""Keys: their kinds, and how they are read and read again."""

from __future__ import annotations

import json
import ssl
from base64 import b64encode
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from trio.testing import MockClock

from tricorn.chat.identity import NotAdmitted
from tricorn.service.auth import Tokens
from tricorn.service.jwt_keys import COOLDOWN, MAX_BYTES, READ_TIMEOUT, Keys, load, parse, parse_for_signing
from tricorn.service.settings import ServiceSettings
from tricorn.settings import SettingError

SECRET = "a secret of thirty-two bytes or more"
RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())


def private_pem(key: Any, password: bytes | None = None) -> str:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return str(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption).decode())


def public_pem(key: Any) -> str:
    return str(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def jwk(key: Any, kid: str | None, **more: Any) -> dict[str, Any]:
    algorithm = ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else RSAAlgorithm
    made = {**algorithm.to_jwk(key.public_key(), as_dict=True), "key_ops": None, "kid": kid, **more}
    return {name: value for name, value in made.items() if value is not None}


def jwks(*keys: dict[str, Any]) -> str:
    return json.dumps({"keys": keys})


PURPOSES_BUT_VERIFYING: list[dict[str, Any]] = [
    {"use": "enc"},
    {"use": "Sig"},
    {"use": ["sig"]},
    {"key_ops": []},
    {"key_ops": ["sign"]},
    {"key_ops": ["encrypt", "wrapKey"]},
    {"key_ops": "verify"},
    {"key_ops": {"verify": True}},
    {"key_ops": ["verify"], "use": "enc"},
    {"key_ops": ["sign"], "use": "sig"},
]

# Kinds


@pytest.mark.parametrize(
    ("text", "algorithms"),
    [
        (SECRET, ["HS256"]),
        (public_pem(EC), ["ES256"]),
        (public_pem(RSA), ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]),
        (jwks(jwk(RSA, "a", alg="RS256")), ["RS256"]),
        (jwks(jwk(EC, None)), ["ES256"]),
        (jwks(jwk(EC, None, use="sig", key_ops=["verify"])), ["ES256"]),
        (jwks(jwk(EC, None, key_ops=["sign", "verify"])), ["ES256"]),
    ],
)
def test_the_kind_of_a_key_settles_its_algorithms(text: str, algorithms: list[str]) -> None:
    [key] = parse(text)
    assert list(key.algorithms) == algorithms
    assert "HS256" not in algorithms or text == SECRET
    assert SECRET not in repr(key)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "too short",
        "x" * 31,
        "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----",
        private_pem(RSA, b"password"),
        public_pem(rsa.generate_private_key(65537, 1024)),
        public_pem(ec.generate_private_key(ec.SECP256K1())),
        public_pem(ed448.Ed448PrivateKey.generate()),
        public_pem(dsa.generate_private_key(2048)),
        b64encode(RSA.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode(),
        EC.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
        "{",
        "{}",
        '{"keys":[]}',
        '{"keys":[5]}',
        "{" * 5000,
        jwks({"kty": "oct", "kid": "a", "k": "A" * 64}),
        *(jwks(jwk(RSA, "a", **purpose)) for purpose in PURPOSES_BUT_VERIFYING),
        jwks(jwk(RSA, "a", alg="HS256")),
        jwks(jwk(RSA, "a", alg="none")),
        jwks(jwk(EC, "a", alg="RS256")),
        jwks({"kty": "RSA", "kid": "a"}, {"kty": "EC", "crv": "P-256", "x": "", "y": ""}, {"kty": [], "kid": "b"}),
        jwks({**jwk(RSA, "a"), "kid": 5}),
    ],
    ids=lambda text: text[:27],  # what follows is random, and each process must know the test by the same name
)
def test_what_is_no_key_is_not_shown(text: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        parse(text)
    assert raised.value.__cause__ is None
    assert not text.strip() or text.strip()[-12:] not in str(raised.value)


@pytest.mark.parametrize("purpose", PURPOSES_BUT_VERIFYING, ids=str)
@pytest.mark.parametrize("first", [True, False])
async def test_a_key_for_another_purpose_verifies_no_token(purpose: dict[str, Any], first: bool) -> None:
    """Another key with the same id does."""
    other = rsa.generate_private_key(65537, 2048)
    both = [jwk(other, "a", **purpose), jwk(RSA, "a")]
    tokens = Tokens(Keys(parse(jwks(*(both if first else both[::-1])))), ServiceSettings())

    def sign(key: Any) -> str:
        return jwt.encode({"sub": "ada", "exp": 2**40}, key, algorithm="RS256", headers={"kid": "a"})

    with pytest.raises(NotAdmitted):
        await tokens.admit(sign(other), "203.0.113.9", {})
    assert (await tokens.admit(sign(RSA), "203.0.113.9", {})).user == "ada"


def test_what_signs() -> None:
    assert parse_for_signing(SECRET).algorithms == ("HS256",)
    assert parse_for_signing(private_pem(EC)).algorithms == ("ES256",)
    for text in (public_pem(EC), jwks(jwk(EC, "a")), "file:/key", "https://example.org/jwks", "short"):
        with pytest.raises(ValueError, match=r"public key|must be a secret"):
            parse_for_signing(text)


async def test_the_key_that_a_token_names() -> None:
    keys = Keys(parse(jwks(jwk(RSA, "a"), jwk(EC, "b"), jwk(EC, None))))
    assert [found and found.kid for found in [await keys.find(kid) for kid in ("a", "b", "c", None)]] == [
        "a",
        "b",
        None,
        None,
    ]
    [one] = parse(jwks(jwk(RSA, "a")))
    assert await Keys((one,)).find(None) is one
    assert await Keys((one,)).find("b") is None
    [secret] = parse(SECRET)
    assert await Keys((secret,)).find("whatever") is secret


# Reading


@pytest.mark.parametrize("scheme", ["file:", "file://"])
async def test_a_file(scheme: str, tmp_path: Path, nursery: trio.Nursery) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{SECRET}\n")
    [secret] = parse(SECRET)
    assert await (await load(f"{scheme}{file}", 300.0)).find(None) == secret
    file.write_text(jwks(jwk(RSA, "old")))
    keys = await load(f"{scheme}{file}", 300.0)
    nursery.start_soon(keys.stay_fresh)
    file.write_text(jwks(jwk(EC, "new")))
    assert await keys.find("new") is not None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file:/no/such/file", "cannot be read: [Errno 2] No such file or directory: '/no/such/file'"),
        ("http://example.org/jwks", "must be read over https: whoever can change it on its way can make tokens"),
        ("https:///jwks", "must be a URL like https://example.org/jwks.json"),
        ("https://me:secret@example.org/jwks", "must be a URL like https://example.org/jwks.json"),
        ("short", "must be a secret of at least 32 bytes, a PEM key, or a https: or file: URL; "),
    ],
)
async def test_a_setting_that_leads_nowhere(text: str, says: str) -> None:
    with pytest.raises(SettingError) as raised:
        await load(text, 300.0)
    assert str(raised.value).startswith(f"TRICORN_JWT_KEY: {says}")


# Rotation, with a clock of its own and a source that is a function


class Source:
    def __init__(self, text: str) -> None:
        self.text = text
        self.reads: list[float] = []
        self.silent = False

    async def read(self) -> str:
        self.reads.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if self.silent:
            await trio.sleep_forever()
        if not self.text:
            raise OSError("the issuer is down")
        return self.text


@pytest.fixture
def source() -> Source:
    return Source(jwks(jwk(RSA, "old")))


@pytest.fixture
async def keys(source: Source, nursery: trio.Nursery) -> Keys:
    keys = Keys(parse(source.text), source.read, 300.0)
    nursery.start_soon(keys.stay_fresh)
    return keys


async def test_keys_are_read_again(keys: Keys, source: Source, autojump_clock: MockClock) -> None:
    source.text = jwks(jwk(EC, "new"))
    await trio.sleep(299)
    assert await keys.find("old") is not None
    await trio.sleep(2)
    assert await keys.find("new") is not None
    assert len(source.reads) == 1
    assert await keys.find("old") is None


async def test_an_unknown_key_is_asked_for_at_once(keys: Keys, source: Source, autojump_clock: MockClock) -> None:
    source.text = jwks(jwk(RSA, "old"), jwk(EC, "new"))
    assert await keys.find("new") is not None
    assert trio.current_time() - source.reads[0] < 1
    assert len(source.reads) == 1


async def test_made_up_keys_are_no_flood(keys: Keys, source: Source, autojump_clock: MockClock) -> None:
    async def knock(number: int) -> None:
        assert await keys.find(f"made-up-{number}") is None

    begin = trio.current_time()
    async with trio.open_nursery() as knocking:
        for number in range(100):
            knocking.start_soon(knock, number)
    assert len(source.reads) == 1
    await knock(100)
    assert len(source.reads) == 2
    assert trio.current_time() - begin >= COOLDOWN


async def test_a_token_without_an_id_asks_for_nothing(keys: Keys, source: Source, autojump_clock: MockClock) -> None:
    source.text = jwks(jwk(RSA, "old"), jwk(EC, "new"))
    assert await keys.find("new") is not None
    assert await keys.find(None) is None
    assert len(source.reads) == 1


@pytest.mark.parametrize("trouble", ["down", "nonsense", "empty", "silent"])
async def test_the_last_good_keys_stay(
    keys: Keys, source: Source, autojump_clock: MockClock, trouble: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source.silent = trouble == "silent"
    source.text = {"down": "", "nonsense": "<html>", "empty": '{"keys":[]}', "silent": source.text}[trouble]
    begin = trio.current_time()
    assert await keys.find("new") is None
    assert trio.current_time() - begin < READ_TIMEOUT + 1
    assert await keys.find("old") is not None
    assert "the last good ones stay" in capfd.readouterr().err
    source.text, source.silent = jwks(jwk(EC, "new")), False
    assert await keys.find("new") is not None


async def test_who_waits_can_be_cancelled(keys: Keys, source: Source, autojump_clock: MockClock) -> None:
    source.silent = True
    with trio.move_on_after(1) as scope:
        await keys.find("new")
    assert scope.cancelled_caught
    assert await keys.find("old") is not None


# A real issuer


Respond = Callable[[bytes], bytes]


@asynccontextmanager
async def issuer(response: bytes, context: ssl.SSLContext | None = None) -> AsyncGenerator[tuple[int, list[bytes]]]:
    """Answers every request like this, and keeps their heads."""
    heads: list[bytes] = []

    async def answer(stream: Any) -> None:
        if context is not None:
            stream = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            async with stream:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += await stream.receive_some()
                heads.append(head)
                await stream.send_all(response)
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1], heads
        nursery.cancel_scope.cancel()


def ok(body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def test_a_jwks_from_its_issuer() -> None:
    async with issuer(ok(jwks(jwk(RSA, "a")).encode())) as (port, heads):
        keys = await load(f"http://127.0.0.1:{port}/keys.json?x=1", 300.0)
    assert await keys.find("a") is not None
    assert heads[0].startswith(b"GET /keys.json?x=1 HTTP/1.1\r\n")
    assert f"Host: 127.0.0.1:{port}\r\n".encode() in heads[0]
    assert jwt.__name__.encode() not in heads[0]


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "cannot be read: localhost answered 404"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://evil.example/\r\n\r\n", "cannot be read: localhost answered 302"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (MAX_BYTES + 1), f"cannot be read: localhost sent more than {MAX_BYTES} "),
        (b"", "cannot be read: localhost did not answer properly: "),
        (b"SSH-2.0\r\n\r\n", "cannot be read: localhost did not answer properly: "),
        (ok(b"x")[:-1], "cannot be read: localhost did not answer properly: "),
        (ok(b"{}"), "is not a JWKS"),
        (ok(b"\xff" * 40), "'utf-8' codec can't decode"),
    ],
)
async def test_an_issuer_that_fails(response: bytes, says: str) -> None:
    async with issuer(response) as (port, _):
        with pytest.raises(SettingError) as raised:
            await load(f"http://localhost:{port}/keys.json", 300.0)
    assert str(raised.value).startswith(f"TRICORN_JWT_KEY: {says}")


async def test_an_issuer_that_is_not_there() -> None:
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))
        with pytest.raises(SettingError, match=r"^TRICORN_JWT_KEY: cannot be read: "):
            await load(f"http://127.0.0.1:{unused.getsockname()[1]}/keys.json", 300.0)


async def test_an_issuer_that_says_nothing(autojump_clock: MockClock) -> None:
    async def say_nothing(_: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, say_nothing, 0, host="127.0.0.1"))
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/keys.json"
        with pytest.raises(SettingError, match=r"^TRICORN_JWT_KEY: reading it took longer than 10 seconds$"):
            await load(url, 300.0)
        nursery.cancel_scope.cancel()


async def test_an_issuer_whose_certificate_nobody_trusts(tmp_path: Path) -> None:
    """TLS is checked: a JWKS from whoever answers would be a way to make tokens."""
    context = self_signed(tmp_path)
    async with issuer(ok(jwks(jwk(RSA, "a")).encode()), context) as (port, heads):
        with pytest.raises(SettingError, match="CERTIFICATE_VERIFY_FAILED"):
            await load(f"https://127.0.0.1:{port}/keys.json", 300.0)
    assert not heads


async def test_an_issuer_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = self_signed(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    async with issuer(ok(jwks(jwk(RSA, "a")).encode()), context) as (port, heads):
        keys = await load(f"https://127.0.0.1:{port}/keys.json", 300.0)
    assert await keys.find("a") is not None
    assert heads


def self_signed(directory: Path) -> ssl.SSLContext:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(EC.public_key())
        .serial_number(1)
        .not_valid_before(datetime.now(UTC) - timedelta(hours=1))
        .not_valid_after(datetime.now(UTC) + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(EC, SHA256())
    )
    directory.joinpath("certificate.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    directory.joinpath("key.pem").write_text(private_pem(EC))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "certificate.pem", directory / "key.pem")
    return context
