"""Who may come in, and as whom."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from os import dup
from socket import socket
from typing import Annotated, Any

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, SECP521R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from jwt.utils import base64url_encode

from tricorn.chat.close_codes import UNAUTHENTICATED
from tricorn.chat.identity import Identity, NotAdmitted, is_loopback
from tricorn.errors.report import report, report_error
from tricorn.listening.binds import DESCRIPTOR, UNIX, parse_bind
from tricorn.service.jwt_keys import SECRET_BYTES, Key, Keys, algorithms
from tricorn.service.settings import ServiceSettings
from tricorn.settings import SettingError

MAX_TOKEN = 8192  # characters

Pattern = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9._:~*?-]{1,128}\Z")]


class _Claims(msgspec.Struct):
    """What is taken from a token whose signature and times were found good."""

    sub: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    exp: float
    conversations: Annotated[tuple[Pattern, ...], msgspec.Meta(max_length=100)] = ()


class Tokens:
    """Whoever has a good token (JWT, RFC 7519) is who it says."""

    wants_token = True

    def __init__(self, keys: Keys, settings: ServiceSettings) -> None:
        self._keys = keys
        self._settings = settings

    async def admit(self, token: str | None, peer: str, headers: Mapping[str, str]) -> Identity:
        """Like `Gate.admit`: waits where the token names a key that may have been made since the keys were read."""
        if token is None or len(token) > MAX_TOKEN or not token.isascii():
            raise NotAdmitted(UNAUTHENTICATED, NOT_VALID)
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            return self._identity(token, await self._keys.find(kid))
        except Exception as error:
            raise _refusal(error, peer) from None

    def _identity(self, token: str, key: Key | None) -> Identity:
        if key is None:
            raise jwt.InvalidKeyError
        settings = self._settings
        claims = jwt.decode(
            token,
            key.material,
            algorithms=list(key.algorithms),
            audience=settings.jwt_audience,  # None: a token that is for somebody is not for us
            issuer=settings.jwt_issuer,
            leeway=settings.jwt_leeway,
            options={"require": ["exp", "sub"]},
        )
        good = msgspec.convert(claims, _Claims)
        if not good.sub.isprintable():
            raise ValueError("the subject is not printable")
        return Identity(good.sub, good.exp, good.conversations, settings.jwt_leeway)


NOT_VALID = "the token is not valid"
# Only who has a token that we, or somebody we trust, did sign gets to hear these.
REASONS: dict[type[Exception], str] = {
    jwt.ExpiredSignatureError: "the token has expired",
    jwt.ImmatureSignatureError: "the token is not valid yet",
    jwt.InvalidAudienceError: "the token is for somebody else",
    jwt.InvalidIssuerError: "the token is of another issuer",
    jwt.MissingRequiredClaimError: "the token lacks a claim",
    msgspec.ValidationError: "the token has a claim that cannot be used",
}


_EXPECTED = (jwt.PyJWTError, msgspec.ValidationError, ValueError, OverflowError)


def _refusal(error: Exception, peer: str) -> NotAdmitted:
    if isinstance(error, _EXPECTED):
        report("INFO", "a token was refused", peer=peer, why=type(error).__name__)
    else:  # a bug, ours or of the library: closed, and told of
        report_error(error, peer=peer)
    return NotAdmitted(UNAUTHENTICATED, REASONS.get(type(error), NOT_VALID))


def check_exposure(settings: ServiceSettings) -> None:
    """Raise `SettingError` where strangers could come in and nobody said that they may."""
    if settings.jwt_key is not None or settings.auth is not None:
        return
    for each in settings.binds:
        host = _host(each)
        if host is None:
            problem = f"{each}: clients of a Unix socket have no address, so without a key none of them could come in"
        elif not is_loopback(host):
            problem = f"{host or each} is open to others, and without a key they would all come in"
        else:
            continue
        ways_out = "set TRICORN_JWT_KEY, or listen on 127.0.0.1, or say --auth none if everybody may"
        raise SettingError(f"{problem}: {ways_out}")


def _host(bind: str) -> str | None:
    """The host that something listens on, or None for a Unix socket."""
    if bind.startswith(UNIX):
        return None
    if not bind.startswith(DESCRIPTOR):
        return parse_bind(bind)[0]
    try:
        with socket(fileno=dup(int(bind.removeprefix(DESCRIPTOR)))) as copy:
            name = copy.getsockname()
    except OSError:
        return "localhost"  # listening on it will say what is wrong
    return name[0] if isinstance(name, tuple) else None


def make_token(
    key: Key, user: str, now: float, ttl: float, settings: ServiceSettings, shared: tuple[str, ...] = ()
) -> str:
    """Sign a token for `user` that is good for `ttl` seconds from `now`, for the audience and issuer of `settings`."""
    claims: dict[str, Any] = {"sub": user, "iat": int(now), "exp": int(now + ttl)}
    if settings.jwt_audience is not None:
        claims["aud"] = settings.jwt_audience
    if settings.jwt_issuer is not None:
        claims["iss"] = settings.jwt_issuer
    if shared:
        claims["conversations"] = shared
    return jwt.encode(claims, key.material, algorithm=key.algorithms[0])


def rehearse() -> None:
    """Check a token with every algorithm, so that whatever is loaded late is loaded before the first client comes.

    With RSA it is a token that is no good: making a key takes long, and a refusal goes the same way.
    """
    pairs: list[Any] = [generate_ec_key(curve) for curve in (SECP256R1(), SECP384R1(), SECP521R1())]
    for private in (*pairs, Ed25519PrivateKey.generate()):
        [algorithm] = algorithms(private.public_key())
        for exp in (0, 2**40):
            token = jwt.encode({"exp": exp}, private, algorithm=algorithm)
            _rehearse(token, private.public_key(), algorithm)
    secret = bytes(SECRET_BYTES)
    token = jwt.encode({}, secret, algorithm="HS256")
    _rehearse(token, secret, "HS256")
    rsa = RSAPublicNumbers(65537, 2**2047 + 1).public_key()
    for algorithm in algorithms(rsa):
        head = base64url_encode(b'{"alg":"%b"}' % algorithm.encode()).decode()
        _rehearse(f"{head}.e30.{'A' * 342}", rsa, algorithm)


def _rehearse(token: str, key: Any, algorithm: str) -> None:
    with suppress(jwt.ExpiredSignatureError, jwt.InvalidSignatureError):
        jwt.decode(token, key, algorithms=[algorithm])
