"""How fast something may come: token buckets."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Literal

from trio import current_time

if TYPE_CHECKING:
    from collections.abc import Callable

BURST = 10.0  # seconds' worth that a peer may send at once
LOT = 0.1  # seconds' worth that is counted before the clock is asked


class TokenBucket:
    """Allows `size` at once, and as many in `seconds` from then on, by `clock`."""

    def __init__(self, size: float, seconds: float, clock: Callable[[], float] = current_time) -> None:
        self._clock = clock
        self._size = size
        self._rate = size / seconds
        self._level = size
        self._filled_at = -inf

    def take(self, amount: float = 1) -> float:
        """Take so much and return 0; where there is not so much, return how many seconds it is until there is."""
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._filled_at) * self._rate)
        self._filled_at = now
        if self._level < amount:
            return (amount - self._level) / self._rate
        self._level -= amount
        return 0


class RateLimit:
    """How fast one peer may send messages and bytes: `BURST` seconds' worth at once, and so many a second."""

    def __init__(self, messages_per_second: float, bytes_per_second: float) -> None:
        self._messages = TokenBucket(BURST * messages_per_second, BURST)
        self._bytes = TokenBucket(BURST * bytes_per_second, BURST)
        self._message_lot = LOT * messages_per_second
        self._byte_lot = LOT * bytes_per_second
        self._new_messages = self._new_bytes = 0  # that were not taken from the buckets yet

    def passed(self, messages: int, size: int) -> Literal["messages_per_second", "bytes_per_second"] | None:
        """Count what came; return which limit it passes, if any."""
        self._new_messages += messages
        self._new_bytes += size
        if self._new_messages < self._message_lot and self._new_bytes < self._byte_lot:
            return None  # the usual case costs no look at the clock
        messages, self._new_messages = self._new_messages, 0
        size, self._new_bytes = self._new_bytes, 0
        if self._messages.take(messages):
            return "messages_per_second"
        if self._bytes.take(size):
            return "bytes_per_second"
        return None
