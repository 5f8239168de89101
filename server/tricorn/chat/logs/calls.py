"""What tasks ask of those that have a connection: so a caller that is cancelled leaves no connection in disorder."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from trio import Event
from trio.lowlevel import ParkingLot, checkpoint_if_cancelled


class Call:
    """What a task asked, until it is answered or nobody waits for it any more."""

    def __init__(self, *what: Any) -> None:
        self.what = what
        self.abandoned = False
        self._answered = Event()
        self._answer: Any = None
        self._error: Exception | None = None

    def answer(self, answer: Any) -> None:
        self._answer = answer
        self._answered.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._answered.set()

    async def answered(self) -> Any:
        """The answer, or the error raised. If cancelled, what was asked may be done all the same, or not."""
        try:
            await self._answered.wait()
        finally:
            self.abandoned = True
        if self._error is not None:
            raise self._error
        return self._answer


class Calls:
    """Those that wait, in order."""

    def __init__(self) -> None:
        self._waiting: deque[Call] = deque()
        self._takers = ParkingLot()

    async def ask(self, *what: Any) -> Any:
        """Ask, and return the answer or raise the error. If cancelled, what was asked may be done, or not."""
        await checkpoint_if_cancelled()
        request = Call(*what)
        self._waiting.append(request)
        self._takers.unpark()
        return await request.answered()

    def put_back(self, requests: Sequence[Call]) -> None:
        """Let others answer what was taken."""
        self._waiting.extendleft(reversed(requests))
        self._takers.unpark()

    async def take(self, limit: int) -> list[Call]:
        """At most `limit` that somebody waits for, at least one. No checkpoint where there are some."""
        while True:
            taken: list[Call] = []
            while self._waiting and len(taken) < limit:
                request = self._waiting.popleft()
                if not request.abandoned:
                    taken.append(request)
            if taken:
                return taken
            await self._takers.park()
