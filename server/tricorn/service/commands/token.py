"""`tricorn token`: make a token."""

from __future__ import annotations

from argparse import Namespace
from time import time

from tricorn.service.auth import make_token
from tricorn.service.jwt_keys import parse_for_signing
from tricorn.service.settings import ServiceSettings
from tricorn.settings import SettingError

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def command(arguments: Namespace) -> int:
    """Print a token that is signed with the key in the environment."""
    settings = ServiceSettings.from_environ()
    ttl = _seconds(arguments.ttl)
    if settings.jwt_key is None:
        raise SettingError("TRICORN_JWT_KEY: must be set, as the server has it or with the private key to the server's")
    try:
        key = parse_for_signing(settings.jwt_key.reveal())
    except ValueError as error:
        raise SettingError(f"TRICORN_JWT_KEY: {error}") from None
    print(make_token(key, arguments.user, time(), ttl, settings, tuple(arguments.share)))
    return 0


def _seconds(text: str) -> int:
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdecimal() and len(number) < 9 and int(number) and unit in SECONDS):
        raise SettingError(f"--ttl {text}: must be a time like 90s, 15m, 1h or 7d")
    return int(number) * SECONDS[unit]
