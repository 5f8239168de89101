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
    """What one user has, and may have.

    Attributes:
        connections: that the user has now.
        runs: of the user's posts, that wait or go on.
        posts: how fast they may come.
        refusals: how many may be too fast for it before the connection is closed.
    """

    def __init__(self, user: str, settings: ChatSettings, clock: Callable[[], float] = current_time) -> None:
        self.user = user
        self.connections = 0
        self.runs = 0
        self.posts = TokenBucket(settings.posts_per_minute, MINUTE, clock)
        self.refusals = TokenBucket(settings.posts_per_minute, MINUTE, clock)


class Quotas:
    """One for each user who has a connection or a run, or had one in the last minute, in which a bucket fills up.

    Unless `per_user`: where nobody has to say who they are, one for each connection.
    """

    def __init__(self, settings: ChatSettings, *, per_user: bool, clock: Callable[[], float] = current_time) -> None:
        self._clock = clock
        self._settings = settings
        self._per_user = per_user
        self._by_user: WeakValueDictionary[str, Quota] = WeakValueDictionary()
        self._left: deque[tuple[float, Quota]] = deque()

    def enter(self, user: str) -> Quota | None:
        """Count a connection of this user; None where there are too many. End it with `leave`."""
        while self._left and self._left[0][0] <= self._clock() - MINUTE:
            self._left.popleft()
        allowance = self._by_user.get(user)
        if allowance is None:
            allowance = Quota(user, self._settings, self._clock)
            if self._per_user:
                self._by_user[user] = allowance
        if allowance.connections >= self._settings.user_connections:
            return None
        allowance.connections += 1
        return allowance

    def leave(self, allowance: Quota) -> None:
        """Count a connection no longer."""
        allowance.connections -= 1
        self._left.append((self._clock(), allowance))
