"""Calls that other tasks carry out: a caller that is cancelled leaves no connection half way through an answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from trio import Event
from trio.lowlevel import ParkingLot, checkpoint_if_cancelled


class Call:
    """What a task asks for, until it has the result or stops waiting."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.abandoned = False
        self._done = Event()
        self._result: Any = None
        self._error: Exception | None = None

    def succeed(self, result: Any) -> None:
        self._result = result
        self._done.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._done.set()

    async def result(self) -> Any:
        """Wait for the result and return it, or raise the error. If cancelled, the call may be carried out or not."""
        try:
            await self._done.wait()
        finally:
            self.abandoned = True
        if self._error is not None:
            raise self._error
        return self._result


class CallQueue:
    """Calls that wait for a task to carry them out, first come, first served."""

    def __init__(self) -> None:
        self._waiting: deque[Call] = deque()
        self._takers = ParkingLot()

    async def call(self, *arguments: Any) -> Any:
        """Return the result, or raise the error. If cancelled, the call may be carried out or not."""
        await checkpoint_if_cancelled()
        call = Call(*arguments)
        self._waiting.append(call)
        self._takers.unpark()
        return await call.result()

    def put_back(self, calls: Sequence[Call]) -> None:
        """Let another task carry out what was taken."""
        self._waiting.extendleft(reversed(calls))
        self._takers.unpark()

    async def take(self, limit: int) -> list[Call]:
        """Return the first calls that somebody still waits for: at least one, at most `limit`.

        Not a checkpoint if there are some.
        """
        while True:
            taken: list[Call] = []
            while self._waiting and len(taken) < limit:
                call = self._waiting.popleft()
                if not call.abandoned:
                    taken.append(call)
            if taken:
                return taken
            await self._takers.park()
