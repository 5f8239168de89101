"""What one user may have at a time, over all connections and conversations."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from weakref import WeakValueDictionary

from trio import current_time

from tricorn.chat.settings import ChatSettings
from tricorn.transport.rate_limit import TokenBucket

MINUTE = 60.0  # seconds


class Quota:
    """What one user has now, and may have.

    Attributes:
        connections: open connections.
        runs: posts whose runs wait or are in progress.
        posts: how fast posts may come.
        refusals: how many may be refused for that before the connection is closed.
    """

    def __init__(self, user: str, settings: ChatSettings, clock: Callable[[], float] = current_time) -> None:
        self.user = user
        self.connections = 0
        self.runs = 0
        self.posts = TokenBucket(settings.posts_per_minute, MINUTE, clock)
        self.refusals = TokenBucket(settings.posts_per_minute, MINUTE, clock)


class Quotas:
    """One quota for each user who has a connection or a run, or had one in the last minute, while buckets fill up.

    If users do not identify themselves (`per_user` is false), each connection has its own.
    """

    def __init__(self, settings: ChatSettings, *, per_user: bool, clock: Callable[[], float] = current_time) -> None:
        self._clock = clock
        self._settings = settings
        self._per_user = per_user
        self._by_user: WeakValueDictionary[str, Quota] = WeakValueDictionary()
        self._left: deque[tuple[float, Quota]] = deque()

    def enter(self, user: str) -> Quota | None:
        """Count a connection of this user; None if there are too many. End it with `leave`."""
        while self._left and self._left[0][0] <= self._clock() - MINUTE:
            self._left.popleft()
        quota = self._by_user.get(user)
        if quota is None:
            quota = Quota(user, self._settings, self._clock)
            if self._per_user:
                self._by_user[user] = quota
        if quota.connections >= self._settings.user_connections:
            return None
        quota.connections += 1
        return quota

    def leave(self, quota: Quota) -> None:
        """Count a connection no longer."""
        quota.connections -= 1
        self._left.append((self._clock(), quota))
