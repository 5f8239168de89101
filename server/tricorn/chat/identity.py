"""Who a client is, and who decides that."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from ipaddress import ip_address
from typing import Protocol

import msgspec

from tricorn.chat.close_codes import FORBIDDEN, UNAUTHENTICATED
from tricorn.protocol.close import Close

IN_SUBPROTOCOL = "bearer."
OF_PROXIES = ("forwarded", "via", "x-real-ip")  # headers, besides X-Forwarded-*


class Identity(msgspec.Struct, frozen=True):
    """Who a client is.

    Attributes:
        user: never empty.
        expires_at: when its token expires, in seconds since the Unix epoch; None is never.
        shared: patterns, as a shell has them, for ids of conversations. Those are not the user's own: they are
            shared by all who have a pattern for them.
        leeway: seconds for which it is believed after that, because clocks differ.
    """

    user: str
    expires_at: float | None = None
    shared: tuple[str, ...] = ()
    leeway: float = 0.0

    @property
    def believed_until(self) -> float | None:
        """When its connections end, in seconds since the Unix epoch; None is never."""
        return None if self.expires_at is None else self.expires_at + self.leeway

    def key(self, conversation: str) -> str:
        """What the chat and its log know a conversation of this user as: `user/id`, or `/id` where it is shared.

        An id has no slash in it and a user is not empty, so no two conversations have the same key.
        """
        if any(fnmatchcase(conversation, pattern) for pattern in self.shared):
            return f"/{conversation}"
        return f"{self.user}/{conversation}"


class NotAdmitted(Exception):
    """Somebody may not come in. `close` is what to tell them: the text has no internals in it."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.close = Close(code, reason)


class Gate(Protocol):
    """Decides who may come in."""

    @property
    def wants_token(self) -> bool:
        """Whether nobody comes in without a token."""

    async def admit(self, token: str | None, peer: str, headers: Mapping[str, str]) -> Identity:
        """Say who it is that connects from the address `peer`. A checkpoint only where it waits.

        Raises:
            NotAdmitted: nobody who may.
        """


class ThisMachine:
    """Everybody on this machine is `local`, and nobody else comes in.

    The Host must be of this machine too: a page whose name was made to lead here (DNS rebinding) names another one, and
    so does a proxy that would let in the whole world. So nobody comes in through a proxy, if it says that it is one.
    """

    wants_token = False

    async def admit(self, token: str | None, peer: str, headers: Mapping[str, str]) -> Identity:
        if any(name in OF_PROXIES or name.startswith("x-forwarded-") for name in headers):
            raise NotAdmitted(FORBIDDEN, "the request came through a proxy, and a server behind a proxy needs a key")
        name, _, port = headers.get("host", "").rpartition(":")
        host = name if port.isdecimal() else headers.get("host", "")
        if not is_loopback(peer) or not is_loopback(host.removeprefix("[").removesuffix("]").lower()):
            raise NotAdmitted(FORBIDDEN, "without a key only this machine may come in, by a name of its own")
        return Identity("local")


class Everybody:
    """Everybody is `local`. Not for a network with strangers in it."""

    wants_token = False

    async def admit(self, token: str | None, peer: str, headers: Mapping[str, str]) -> Identity:
        return Identity("local")


def handshake_token(headers: Mapping[str, str]) -> str | None:
    """The token that a handshake brought: in `Authorization`, or as a subprotocol, which is where a browser can put it.

    Raises:
        NotAdmitted: there is more than one, so that it is not clear who this is.
    """
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    tokens = [credentials.strip()] if scheme.lower() == "bearer" else []
    for name in headers.get("sec-websocket-protocol", "").split(","):
        if name.strip().startswith(IN_SUBPROTOCOL):
            tokens.append(name.strip().removeprefix(IN_SUBPROTOCOL))
    if len(tokens) > 1:
        raise NotAdmitted(UNAUTHENTICATED, "more than one token")
    return tokens[0] if tokens else None


def is_loopback(host: str) -> bool:
    """Whether an address, or the name `localhost`, is of this machine only."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
