"""How many may be here at a time, and the answer to those for whom there is no room."""

from __future__ import annotations

from errno import ENOMEM
from http import HTTPStatus
from math import inf
from mmap import mmap
from os import strerror
from random import randrange
from socket import AF_INET6, inet_pton
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from tricorn.protocol.forwarded import TrustedProxies
from tricorn.request import Refuse

if TYPE_CHECKING:
    from types import TracebackType

    from tricorn.metrics import ServerMetrics

MEMORY = 8 << 20  # bytes
PIECE = 400  # bytes; CPython takes what is smaller than 512 from the memory that it keeps
RETRY_AFTER = range(5, 16)  # seconds; any of them, so that clients refused together do not come back together


class AtCapacity(Refuse):
    """There is no room: HTTP 503 that says when to come back (RFC 9110 §10.2.3, §15.6.4)."""

    def __init__(self) -> None:
        retry_after = randrange(RETRY_AFTER.start, RETRY_AFTER.stop)  # noqa: S311 (it keeps no secret)
        super().__init__(HTTPStatus.SERVICE_UNAVAILABLE, "full, come back later", {"Retry-After": str(retry_after)})


def require_capacity(taken: int, limit: float, setting: str, metrics: ServerMetrics) -> None:
    """Raise `AtCapacity`, and count that, if as many are here as the limit of that setting lets in."""
    if taken >= limit:
        metrics.limit_hits.add(setting)
        raise AtCapacity


def require_memory() -> None:
    """Raise OSError (ENOMEM) if less memory is left than the open connections may need."""
    try:
        mmap(-1, MEMORY).close()  # costs nothing that is not used
    except OSError:
        try:
            [bytes(PIECE) for _ in range(MEMORY // PIECE)]  # CPython may have kept some that was freed
        except MemoryError:
            raise OSError(ENOMEM, strerror(ENOMEM)) from None


class Capacity:
    """Room for so many at a time: entering it takes a place until the end of the block, or raises `AtCapacity`.

    `setting` names the limit, and `taken` is how many are here.
    """

    def __init__(self, limit: float, setting: str, metrics: ServerMetrics) -> None:
        self._limit = limit
        self._setting = setting
        self._metrics = metrics
        self.taken = 0

    def __enter__(self) -> None:
        require_capacity(self.taken, self._limit, self._setting, self._metrics)
        self.taken += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.taken -= 1


NO_PROXIES = TrustedProxies(())


class PeerCapacity:
    """Room for each peer address, without limit for trusted proxies.

    All of an IPv6 /64 network counts as one: whoever has an address has all of it.
    """

    def __init__(self, limit: float, metrics: ServerMetrics, proxies: TrustedProxies = NO_PROXIES) -> None:
        self._limit = limit
        self._metrics = metrics
        self._proxies = proxies
        self._of_proxies = Capacity(inf, "peer_connections", metrics)
        self._by_network: WeakValueDictionary[str | bytes, Capacity] = WeakValueDictionary()  # those that are taken

    def of(self, peer: tuple[str, int] | None) -> Capacity:
        """Return the room of this peer. Peers on a Unix socket share one."""
        if peer in self._proxies:
            return self._of_proxies
        address = "" if peer is None else peer[0]
        network = inet_pton(AF_INET6, address.partition("%")[0])[:8] if ":" in address else address
        capacity = self._by_network.get(network)
        if capacity is None:
            capacity = self._by_network[network] = Capacity(self._limit, "peer_connections", self._metrics)
        return capacity
