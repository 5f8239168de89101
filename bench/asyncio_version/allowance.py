"""What one user may have at a time, over all connections and conversations."""

from __future__ import annotations

from collections import deque
from math import inf
from time import monotonic
from weakref import WeakValueDictionary

from tricorn.settings import Settings

MINUTE = 60.0  # seconds


class Bucket:
    """Allows `size` at once, and as many in `seconds` from then on."""

    def __init__(self, size: float, seconds: float) -> None:
        self._size = self._level = size
        self._rate = size / seconds
        self._filled_at = monotonic()

    def take(self, amount: float = 1) -> float:
        """Take so much and return 0; where there is not so much, return how many seconds it is until there is."""
        if self._size == inf:
            return 0
        now = monotonic()
        self._level = min(self._size, self._level + (now - self._filled_at) * self._rate)
        self._filled_at = now
        if self._level < amount:
            return (amount - self._level) / self._rate
        self._level -= amount
        return 0


class Allowance:
    """One user's connections, posts that are not answered, how fast more may come, and be refused."""

    def __init__(self, user: str, settings: Settings) -> None:
        self.user = user
        self.connections = 0
        self.runs = 0
        self.posts = Bucket(settings.posts_per_minute, MINUTE)
        self.refusals = Bucket(settings.posts_per_minute, MINUTE)


class Allowances:
    """One for each user who is here or left in the last minute; where nobody says who they are, one a connection."""

    def __init__(self, settings: Settings, *, per_user: bool) -> None:
        self._settings = settings
        self._per_user = per_user
        self._by_user: WeakValueDictionary[str, Allowance] = WeakValueDictionary()
        self._left: deque[tuple[float, Allowance]] = deque()

    def enter(self, user: str) -> Allowance | None:
        """Count a connection of this user; None where there are too many. End it with `leave`."""
        while self._left and self._left[0][0] <= monotonic() - MINUTE:
            self._left.popleft()
        allowance = self._by_user.get(user) if self._per_user else None
        if allowance is None:
            allowance = Allowance(user, self._settings)
            if self._per_user:
                self._by_user[user] = allowance
        if allowance.connections >= self._settings.user_connections:
            return None
        allowance.connections += 1
        return allowance

    def leave(self, allowance: Allowance) -> None:
        """Count a connection no longer."""
        allowance.connections -= 1
        if self._per_user:
            self._left.append((monotonic(), allowance))
