"""How many threads of one kind may be at work."""

from __future__ import annotations

from trio import CapacityLimiter
from trio.lowlevel import RunVar


class ThreadLimit:
    """A limiter that each run of Trio has for itself: a thread that was abandoned may end in a later one."""

    def __init__(self, name: str, threads: int) -> None:
        self._threads = threads
        self._limiter = RunVar[CapacityLimiter](name)

    def limiter(self) -> CapacityLimiter:
        """Return the limiter for this run of Trio."""
        try:
            return self._limiter.get()
        except LookupError:
            limiter = CapacityLimiter(self._threads)
        self._limiter.set(limiter)
        return limiter
