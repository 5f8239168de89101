"""How many may be here at a time, and the answer to those for whom there is no room."""

from __future__ import annotations

from http import HTTPStatus
from random import randrange
from socket import AF_INET6, inet_pton
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from tricorn.metrics import LIMIT_HITS
from tricorn.protocol.handshake import Refused

if TYPE_CHECKING:
    from types import TracebackType

RETRY_AFTER = range(5, 16)  # seconds; any of them, so that those who were refused together do not come back together


class AtCapacity(Refused):
    """There is no room: HTTP 503 that says when to come back (RFC 9110 §10.2.3, §15.6.4)."""

    def __init__(self, text: str) -> None:
        retry_after = randrange(RETRY_AFTER.start, RETRY_AFTER.stop)  # noqa: S311 (it keeps no secret)
        super().__init__(HTTPStatus.SERVICE_UNAVAILABLE, text, {"Retry-After": str(retry_after)})


def require_capacity(taken: int, limit: float, setting: str) -> None:
    """Raise `AtCapacity` where so many are here already as the limit, which `setting` names, lets in."""
    if taken >= limit:
        LIMIT_HITS.add(setting)
        raise AtCapacity("full, come back later")


class Capacity:
    """So many may be here at a time: entering it takes a place until the end of the block, or raises `AtCapacity`.

    `setting` names the limit, and `taken` is how many are here.
    """

    def __init__(self, limit: float, setting: str) -> None:
        self._limit = limit
        self._setting = setting
        self.taken = 0

    def __enter__(self) -> None:
        require_capacity(self.taken, self._limit, self._setting)
        self.taken += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.taken -= 1


class PeerCapacity:
    """Capacity for each peer address. Of an IPv6 address what counts is its /64 network: who has one has all of it."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._by_network: WeakValueDictionary[str | bytes, Capacity] = WeakValueDictionary()  # those that are taken

    def of(self, address: str) -> Capacity:
        """The places of this address."""
        network = inet_pton(AF_INET6, address.partition("%")[0])[:8] if ":" in address else address
        places = self._by_network.get(network)
        if places is None:
            places = self._by_network[network] = Capacity(self._limit, "peer_connections")
        return places
