"""Conversations that are only in memory because somebody may come back: so many for each user, the latest."""

from __future__ import annotations

from typing import Protocol


class Idle(Protocol):
    """A conversation that nobody follows or posts in. Hashable.

    Attributes:
        key: `user/id`.
    """

    key: str

    def hurry(self) -> None:
        """End soon, unless there is something to answer. Does not block."""


class IdleConversations:
    """Those of all users. Beyond `limit` of one user, the one that has been idle longest ends."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_user: dict[str, dict[Idle, None]] = {}  # the oldest first

    def add(self, conversation: Idle) -> None:
        """Nobody follows this conversation any more."""
        idle = self._by_user.setdefault(_user(conversation), {})
        idle[conversation] = None
        if len(idle) > self._limit:
            oldest = next(iter(idle))
            del idle[oldest]
            oldest.hurry()

    def discard(self, conversation: Idle) -> None:
        """Somebody follows it again, or it has ended."""
        user = _user(conversation)
        idle = self._by_user.get(user)
        if idle is not None:
            idle.pop(conversation, None)
            if not idle:
                del self._by_user[user]


def _user(conversation: Idle) -> str:
    return conversation.key.rpartition("/")[0]
