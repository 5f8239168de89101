"""The keys that tokens are checked with: a secret, a PEM key or a JWKS (RFC 7517), and where they are read from again.

The kind of a key settles the algorithms that it is used with, whatever a token says of itself: a secret never meets an
algorithm for public keys, nor a public key HMAC (RFC 8725 §3.1).
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from re import compile as pattern
from ssl import create_default_context
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11
import msgspec
import trio
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import (
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)
from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.exceptions import InvalidKeyError

from tricorn.chat.identity import is_loopback
from tricorn.errors.report import report_error
from tricorn.settings import SettingError, check_userinfo

READ_TIMEOUT = 10.0  # seconds, for reading the keys once
COOLDOWN = 5.0  # seconds between two readings: tokens with made-up key ids must not become a flood at the issuer's
MAX_BYTES = 1 << 20  # of a JWKS
SECRET_BYTES = 32  # at least, RFC 7518 §3.2
RSA_BITS = 2048  # at least, RFC 7518 §3.3

RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}

_URL = pattern(r"[!-~]+").fullmatch

Read = Callable[[], Awaitable[str]]

_FROM_JWK: dict[str, Callable[[Any], Any]] = {
    "RSA": RSAAlgorithm.from_jwk,
    "EC": ECAlgorithm.from_jwk,
    "OKP": OKPAlgorithm.from_jwk,
}


@dataclass(frozen=True)
class Key:
    """One key, what it may be used with, and its id in a JWKS. Its `repr` does not show it."""

    material: Any = field(repr=False)
    algorithms: tuple[str, ...]
    kid: str | None = None


class Keys:
    """The keys as they were read last. Where reading them again fails, the last good ones stay."""

    def __init__(self, keys: tuple[Key, ...], read: Read | None = None, period: float = 0.0) -> None:
        self._keys = keys
        self._read = read
        self._period = period
        self._wanted = trio.Event()
        self._was_read = trio.Event()

    async def find(self, kid: str | None) -> Key | None:
        """The key for a token that names `kid`, or names none.

        A checkpoint only where it waits: for an id that is not known yet, until the keys were read again.
        """
        key = self._known(kid)
        if key is None and kid is not None and self._read is not None:
            self._wanted.set()
            await self._was_read.wait()
            key = self._known(kid)
        return key

    def _known(self, kid: str | None) -> Key | None:
        if len(self._keys) == 1 and None in (kid, self._keys[0].kid):
            return self._keys[0]
        return next((key for key in self._keys if key.kid is not None and key.kid == kid), None)

    def refresh(self) -> None:
        """Have `stay_fresh` read the keys again soon. Not a checkpoint."""
        self._wanted.set()

    async def stay_fresh(self) -> None:
        """Read the keys every `period` seconds, and when an unknown one is asked for. Ends only by cancellation."""
        if self._read is None:
            await trio.sleep_forever()
        while True:
            with trio.move_on_after(self._period):
                await self._wanted.wait()
            self._wanted = trio.Event()
            try:
                with trio.fail_after(READ_TIMEOUT):
                    self._keys = parse(await self._read())
            except Exception as error:
                report_error(error, action="reading the keys of tokens; the last good ones stay")
            self._was_read.set()
            self._was_read = trio.Event()
            await trio.sleep(COOLDOWN)


async def load(text: str, period: float) -> Keys:
    """Make keys of the setting `jwt_key`, reading what it names. A checkpoint only where it reads.

    Raises `SettingError`, whose text has nothing of a key in it.
    """
    try:
        read = _reader(text)
        if read is None:
            return Keys(parse(text))
        with trio.fail_after(READ_TIMEOUT):
            return Keys(parse(await read()), read, period)
    except trio.TooSlowError:
        problem = f"reading it took longer than {READ_TIMEOUT:g} seconds"
    except OSError as error:
        problem = f"cannot be read: {error}"
    except ValueError as error:
        problem = str(error)
    raise SettingError(f"TRICORN_JWT_KEY: {problem}")


def parse(text: str) -> tuple[Key, ...]:
    """Make keys of a JWKS, a PEM key or a secret. Raises ValueError, whose text has nothing of the key in it."""
    text = text.strip()
    if text.startswith("{"):
        return _from_jwks(text)
    if "-----BEGIN" in text:
        public = _public(_load_pem(text))
        return (Key(public, algorithms(public)),)
    return (Key(_secret(text), ("HS256",)),)


def parse_for_signing(text: str) -> Key:
    """Make a key that signs of a secret or a private PEM key. Raises ValueError like `parse`."""
    text = text.strip()
    if "-----BEGIN" in text:
        private = _load_pem(text)
        if _public(private) is private:
            raise ValueError("is a public key, which checks tokens and makes none")
        return Key(private, algorithms(_public(private)))
    if text.startswith("{") or _reader(text) is not None:
        raise ValueError("must be a secret or a private PEM key to make tokens with")
    return Key(_secret(text), ("HS256",))


def _secret(text: str) -> bytes:
    secret = text.encode()
    if len(secret) < SECRET_BYTES:
        raise ValueError(
            f"must be a secret of at least {SECRET_BYTES} bytes, a PEM key, or a https: or file: URL; "
            "`openssl rand -base64 32` makes a secret"
        )
    if _is_bare_public_key(text):
        raise ValueError("is a public key without its PEM lines, and a public key is no secret")
    try:
        return HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except InvalidKeyError:
        raise ValueError("is a key of another kind; as a secret it would be known to others") from None


def _is_bare_public_key(text: str) -> bool:
    try:
        load_der_public_key(b64decode(text))
    except (ValueError, UnsupportedAlgorithm):
        return False
    return True


def _load_pem(text: str) -> Any:
    data = text.encode()
    try:
        return load_pem_private_key(data, None) if "PRIVATE KEY" in text else load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("is not a PEM key that can be used; a private one must have no password") from None


def _public(key: Any) -> Any:
    private = isinstance(key, RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey)
    return key.public_key() if private else key


def algorithms(key: Any) -> tuple[str, ...]:
    """What a public key may be used with. Raises ValueError where it is too weak, or of another kind."""
    if isinstance(key, RSAPublicKey) and key.key_size >= RSA_BITS:
        return RSA
    if isinstance(key, EllipticCurvePublicKey) and key.curve.name in CURVES:
        return (CURVES[key.curve.name],)
    if isinstance(key, Ed25519PublicKey):
        return ("EdDSA",)
    raise ValueError(f"must be RSA with at least {RSA_BITS} bits, P-256, P-384, P-521 or Ed25519")


class _Jwks(msgspec.Struct):
    keys: list[dict[str, Any]]


def _from_jwks(text: str) -> tuple[Key, ...]:
    """Those that can be used: what else stands in a JWKS is for others (RFC 7517 §5)."""
    try:
        found = msgspec.json.decode(text, type=_Jwks).keys
    except (msgspec.DecodeError, RecursionError):
        raise ValueError("is not a JWKS") from None
    keys = tuple(key for key in map(_from_jwk, found) if key is not None)
    if not keys:
        raise ValueError("is a JWKS without a public key for signatures that can be used")
    return keys


def _from_jwk(jwk: dict[str, Any]) -> Key | None:
    kid = jwk.get("kid")
    make = _FROM_JWK.get(str(jwk.get("kty")))  # not "oct": a secret that stands in a public list is none
    if make is None or not _may_verify(jwk) or not isinstance(kid, str | None):
        return None
    try:
        public = _public(make(jwk))
        allowed = algorithms(public)
    except (InvalidKeyError, ValueError, TypeError, KeyError, UnsupportedAlgorithm):
        return None
    own = tuple(name for name in allowed if jwk.get("alg", name) == name)
    return Key(public, own, kid) if own else None


def _may_verify(jwk: dict[str, Any]) -> bool:
    """Whether the key's owner lets it verify signatures (RFC 7517 §4.2 and §4.3)."""
    operations = jwk.get("key_ops", ["verify"])
    return jwk.get("use", "sig") == "sig" and isinstance(operations, list) and "verify" in operations


def _reader(text: str) -> Read | None:
    if text.startswith("file:"):
        return trio.Path(text.removeprefix("file:").removeprefix("//")).read_text
    if text.startswith(("https:", "http:")):
        url = _split(text)
        if url.scheme == "http" and not is_loopback(url.hostname or ""):
            raise ValueError("must be read over https: whoever can change it on its way can make tokens")
        return partial(fetch, url)
    return None


def _split(text: str) -> SplitResult:
    check_userinfo(text)
    try:
        url = urlsplit(text)
        if url.hostname and url.username is None and url.port != 0 and _URL(text):
            return url
    except ValueError:  # its text would have parts of the URL
        pass
    raise ValueError("must be a URL like https://example.org/jwks.json")


async def fetch(url: SplitResult) -> str:
    """GET a text of at most `MAX_BYTES`. Redirects are not followed. If cancelled, the connection is closed.

    Raises OSError, and ValueError where it is not UTF-8.
    """
    host = url.hostname or ""
    stream: trio.abc.Stream = await trio.open_tcp_stream(host, url.port or (443 if url.scheme == "https" else 80))
    async with stream:
        if url.scheme == "https":
            context = create_default_context()
            stream = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
        try:
            return await _get(stream, url)
        except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
            raise OSError(f"{host} did not answer properly: {error.__cause__ or error}") from error


async def _get(stream: trio.abc.Stream, url: SplitResult) -> str:
    http = h11.Connection(h11.CLIENT)
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    headers = [("Host", url.netloc), ("Accept", "application/json"), ("Connection", "close")]
    request = http.send(h11.Request(method="GET", target=target, headers=headers)) or b""
    await stream.send_all(request + (http.send(h11.EndOfMessage()) or b""))
    body = bytearray()
    while True:
        match http.next_event():
            case h11.NEED_DATA:
                http.receive_data(bytes(await stream.receive_some()))
            case h11.Response(status_code=status) if status != 200:
                raise OSError(f"{url.hostname} answered {status}")
            case h11.Data(data=data):
                body += data
                if len(body) > MAX_BYTES:
                    raise OSError(f"{url.hostname} sent more than {MAX_BYTES} bytes")
            case h11.EndOfMessage():
                return body.decode()
