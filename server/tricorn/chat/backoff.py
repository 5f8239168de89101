"""Pauses between attempts that double each time."""

from __future__ import annotations


class Backoff:
    """Pauses in seconds: `first`, then twice as long each time, at most `longest`."""

    def __init__(self, first: float, longest: float) -> None:
        self.first = first
        self.longest = longest
        self._next = first

    def next(self) -> float:
        """Return how long to wait before the next attempt."""
        pause = self._next
        self._next = min(2 * pause, self.longest)
        return pause

    def reset(self) -> None:
        """Start over at `first`: an attempt has succeeded."""
        self._next = self.first
