"""How fast a peer may send: token buckets."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from trio import current_time

from tricorn.protocol.close import TOO_FAST, Close

if TYPE_CHECKING:
    from collections.abc import Callable

    from tricorn.metrics import ServerMetrics
    from tricorn.settings import Settings

BURST = 10.0  # seconds' worth that a peer may send at once
LOT = 0.1  # seconds' worth that is counted before the clock is asked


class TokenBucket:
    """Allows `size` at once, and then `size` in every `seconds`, by `clock`."""

    __slots__ = ("_clock", "_filled_at", "_level", "_rate", "_size")

    def __init__(self, size: float, seconds: float, clock: Callable[[], float] = current_time) -> None:
        self._clock = clock
        self._size = size
        self._rate = size / seconds
        self._level = size
        self._filled_at = -inf

    def take(self, amount: float = 1) -> float:
        """Take so much and return 0; if there is less, take nothing and return the seconds until there is enough."""
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._filled_at) * self._rate)
        self._filled_at = now
        if self._level < amount:
            return (amount - self._level) / self._rate
        self._level -= amount
        return 0


class RateLimit:
    """How fast one peer may send: `BURST` seconds' worth at once, of messages and of bytes, then what is set."""

    __slots__ = (
        "_byte_lot",
        "_bytes",
        "_message_lot",
        "_messages",
        "_metrics",
        "_new_bytes",
        "_new_messages",
        "_settings",
    )

    def __init__(self, settings: Settings, metrics: ServerMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._messages = TokenBucket(BURST * settings.messages_per_second, BURST)
        self._bytes = TokenBucket(BURST * settings.bytes_per_second, BURST)
        self._message_lot = LOT * settings.messages_per_second
        self._byte_lot = LOT * settings.bytes_per_second
        self._new_messages = self._new_bytes = 0  # that were not taken from the buckets yet

    def exceeded(self, messages: int, size: int) -> Close | None:
        """Count what came. If it is too much, count that too and return the end of the connection."""
        self._new_messages += messages
        self._new_bytes += size
        if self._new_messages < self._message_lot and self._new_bytes < self._byte_lot:
            return None  # the usual case costs no look at the clock
        messages, self._new_messages = self._new_messages, 0
        size, self._new_bytes = self._new_bytes, 0
        if self._messages.take(messages):
            return self._too_fast("messages_per_second", self._settings.messages_per_second)
        if self._bytes.take(size):
            return self._too_fast("bytes_per_second", self._settings.bytes_per_second)
        return None

    def _too_fast(self, setting: str, limit: float) -> Close:
        self._metrics.limit_hits.add(setting)
        return Close(TOO_FAST, f"more than {limit:,.0f} {setting.replace('_', ' ')}")
