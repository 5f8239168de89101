"""What the server can be told, and how any setting is checked. Nothing here reads the environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from re import compile as pattern
from typing import Annotated, Any, Literal, get_type_hints

from tricorn.protocol.forwarded import are_proxies
from tricorn.protocol.origin import are_patterns

_WHOLE = pattern(r"\d+").fullmatch
_SPECIAL = pattern(r"[/?#]").split
_DECIMAL = pattern(r"\d*\.?\d+(e[+-]?\d+)?|inf").fullmatch


class SettingError(ValueError):
    """A setting cannot be used. The text is one line: which setting, its value, and what would be right."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the values of a setting must be. It stands in the setting's type: `Annotated[int, Rule(...)]`.

    Attributes:
        description: completes "must be …".
        test: whether a value, of whatever type, may be used.
        parse: makes a value of the text of an environment variable. Raises ValueError if it cannot.
        secret: the value must not appear in an error.
    """

    description: str
    test: Callable[[Any], bool]
    parse: Callable[[str], Any] = str
    secret: bool = False

    def check(self, label: str, value: object) -> None:
        """Raise `SettingError` if a setting must not have this value. Its text begins with `label` and the value."""
        if not self.test(value):
            raise self._error(label, value)

    def read(self, label: str, text: str) -> Any:
        """Return the value that `text` stands for. Raises `SettingError` like `check`."""
        try:
            value = self.parse(text)
        except ValueError:
            raise self._error(label, text) from None
        if not self.test(value):
            raise self._error(label, text)
        return value

    def _error(self, label: str, value: object) -> SettingError:
        shown = label.rstrip("= ") if self.secret else f"{label}{printable(value)}"
        return SettingError(f"{shown}: must be {self.description}")


def whole(text: str) -> int:
    """Read a whole number in ASCII digits. Raises ValueError."""
    if not text.isascii() or not _WHOLE(text):
        raise ValueError
    return int(text)


def decimal(text: str) -> float:
    """Read a decimal number that is not negative, or `inf`. Raises ValueError."""
    if not text.isascii() or not _DECIMAL(text):
        raise ValueError
    return float(text)


def boolean(text: str) -> bool:
    """Read `true` or `false`. Raises ValueError."""
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


def words(text: str) -> tuple[str, ...]:
    """Read a list, separated by commas or spaces."""
    return tuple(text.replace(",", " ").split())


def is_whole(value: object) -> bool:
    """Whether `value` is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether `value` is an int or a float and not a bool. NaN is one; it fails every comparison."""
    return isinstance(value, float) or is_whole(value)


def one_of(*values: str) -> Callable[[object], bool]:
    """Make a test for a choice of texts."""
    return lambda value: isinstance(value, str) and value in values


def printable(value: object) -> str:
    """Return `value` as text that stays on its line."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def check_userinfo(url: str) -> None:
    """Check that a URL has one reading: parsers disagree about special characters in a user name and a password, and
    may take the end of a password for a host or a path.

    Raises:
        ValueError: it may have several. The text has nothing of the URL in it.
    """
    rest = url.partition("://")[2]
    authority = _SPECIAL(rest, maxsplit=1)[0]
    if authority and ("@" in rest[len(authority) :] or authority.count("@") > 1):
        raise ValueError(
            "special characters must be written as %XX in a user name, password or path: @ is %40, / is %2F"
        )


_rules: dict[type, Mapping[str, Rule]] = {}  # what was found out before


def rules(cls: type[Settings]) -> Mapping[str, Rule]:
    """Return the rule of every setting of a class."""
    if cls not in _rules:
        hints = get_type_hints(cls, include_extras=True)
        _rules[cls] = {name: hint.__metadata__[0] for name, hint in hints.items()}
    return _rules[cls]


Seconds = Annotated[
    float,
    Rule(description="a number of seconds above 0", test=lambda value: is_number(value) and value > 0, parse=decimal),
]
COUNT = Rule(description="a whole number above 0", test=lambda value: is_whole(value) and value >= 1, parse=whole)
Count = Annotated[int, COUNT]
Limit = Annotated[
    float,
    Rule(description="a number, 1 or more, or inf", test=lambda value: is_number(value) and value >= 1, parse=decimal),
]
Deflate = Annotated[
    Literal["off", "takeover", "no-takeover"],
    Rule(description="off, takeover or no-takeover", test=one_of("off", "takeover", "no-takeover")),
]
Origins = Annotated[
    tuple[str, ...],
    Rule(
        description="origins as browsers send them, like https://example.org, https://*.example.org, http://localhost:*",
        test=are_patterns,
        parse=words,
    ),
]
Proxies = Annotated[
    tuple[str, ...],
    Rule(
        description="addresses like 127.0.0.1 or ::1, networks by their first address like 10.0.0.0/8, or unix",
        test=are_proxies,
        parse=words,
    ),
]
Switch = Annotated[bool, Rule(description="true or false", test=lambda value: isinstance(value, bool), parse=boolean)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the server can be told, checked when it is made: raises `SettingError`.

    Times are in seconds, and `inf` means never.
    """

    handshake_timeout: Seconds = 10.0
    """Seconds from accepting a connection to the end of its handshake. Slow mobile networks need a few."""

    close_timeout: Seconds = 2.0
    """Seconds that a handler has to finish once it knows of the end, and seconds for the closing handshake.

    When they have passed the socket is closed, whatever the peer and the handler do. Must be less than
    `drain_timeout`. Two seconds are enough for one round trip on a bad network.
    """

    stall_timeout: Seconds = 30.0
    """Seconds that a peer may read nothing while something is being sent to it; then it is closed with 4001.

    Also bounds the sending of what is left when a handler has returned.
    """

    ping_interval: Seconds = 20.0
    """Seconds between two pings. Proxies often drop a connection after 30 or 60 silent seconds."""

    ping_timeout: Seconds = 20.0
    """Seconds from a ping to its pong; then the connection is closed with 4000."""

    drain_timeout: Seconds = 8.0
    """Seconds from the signal to stop, or from cancelling `serve`, to the end. Cloud Run kills after 10."""

    max_connections: Count = 10000
    """WebSockets of the whole server. The next client gets HTTP 503."""

    peer_connections: Limit = inf
    """Sockets of one peer address. No limit by default: behind a proxy all peers have the proxy's address.

    It does not bound the sockets of `trusted_proxies`, but those of each client behind them.
    """

    max_handshakes: Count = 1000
    """Sockets that have not sent their whole request head yet."""

    max_head_bytes: Count = 16384
    """Bytes of an HTTP request head."""

    max_message_bytes: Count = 1048576
    """Bytes of one WebSocket message from a client, after decompression; past it the close code is 1009."""

    deflate: Deflate = "off"
    """Compression (RFC 7692): `off`; `takeover`, which remembers earlier messages; or `no-takeover`, which does not.

    Off by default: it costs memory and time for each connection.
    """

    messages_per_second: Limit = 10000
    """Messages from one connection, or frames of any other kind: fragments, pings, pongs, and HTTP/2's.

    Ten seconds' worth may come at once; then the close code is 4003.
    """

    bytes_per_second: Limit = 67108864
    """Bytes from one connection, those of compressed messages after decompression, in the same way."""

    origins: Origins = ()
    """Origins whose pages may connect, besides the server's own; `tricorn.protocol.origin` has the patterns."""

    trusted_proxies: Proxies = ()
    """Proxies whose `Forwarded` or `X-Forwarded-For`, `-Proto` and `-Host` are believed: addresses, networks, `unix`.

    `unix` is every peer on a Unix socket. Each proxy must replace these headers or add to them, and remove those that
    it does not write: what it passes on unchanged is whatever its client said.
    """

    proxy_protocol: Switch = False
    """Whether connections of `trusted_proxies` begin with a header of the PROXY protocol, version 1 or 2."""

    def __post_init__(self) -> None:
        for name, rule in rules(type(self)).items():
            rule.check(f"{name}=", getattr(self, name))
        if self.close_timeout >= self.drain_timeout:
            raise SettingError(
                f"close_timeout={self.close_timeout}: must be less than drain_timeout, which is {self.drain_timeout}"
            )
        if self.proxy_protocol and not self.trusted_proxies:
            raise SettingError("proxy_protocol=True: needs trusted_proxies, which are those that send its header")


LISTENER = ("max_head_bytes", "max_handshakes", "peer_connections", "proxy_protocol")  # of who accepts the sockets


def require_defaults(settings: Settings, names: Sequence[str], host: str) -> None:
    """Raise `SettingError` if you changed one of these settings, which have no effect on this host."""
    for name in names:
        value = getattr(settings, name)
        if value != type(settings).__dataclass_fields__[name].default:
            raise SettingError(f"{name}={printable(value)}: {host} has no such setting; leave it at its default")
