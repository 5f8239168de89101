"""Calls that other tasks carry out: a caller that is cancelled leaves no connection half way through an answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from trio import current_time
from trio.lowlevel import ParkingLot, checkpoint_if_cancelled

from tricorn.chat.logs.base import too_slow
from tricorn.transport.keep_alive import Reaper
from tricorn.waiter import Waiter


class Call:
    """What a task asks for, until it has the result, or stops waiting, or `patience` is over, in Trio's time."""

    __slots__ = ("_done", "_error", "_result", "_seconds", "_waiter", "abandoned", "arguments", "patience")

    def __init__(self, arguments: tuple[Any, ...], seconds: float) -> None:
        self.arguments = arguments
        self.patience = current_time() + seconds
        self._seconds = seconds
        self.abandoned = False
        self._waiter = Waiter()
        self._done = False
        self._result: Any = None
        self._error: Exception | None = None

    def succeed(self, result: Any) -> None:
        self._result = result
        self._done = True
        self._waiter.wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._done = True
        self._waiter.wake()

    def give_up(self) -> None:
        """Nobody has carried it out in time."""
        self.fail(too_slow(self._seconds))

    async def result(self) -> Any:
        """Wait for the result and return it, or raise the error. If cancelled, the call may be carried out or not."""
        try:
            while not self._done:
                await self._waiter.wait()
        finally:
            self.abandoned = True
        if self._error is not None:
            raise self._error
        return self._result


class CallQueue:
    """Calls that wait for a task to carry them out, first come, first served, for at most `seconds`.

    One task watches over the time of all of them: a scope for each would cost more than everything else here.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waiting: deque[Call] = deque()
        self._takers = ParkingLot()
        self._reaper = Reaper()

    async def watch(self) -> None:
        """Have calls fail whose time is over. Runs until cancelled."""
        await self._reaper.run()

    async def call(self, *arguments: Any) -> Any:
        """Return the result, or raise the error. If cancelled, the call may be carried out or not.

        Raises Unavailable if nobody carries it out in time; it may be carried out later.
        """
        await checkpoint_if_cancelled()
        call = Call(arguments, self._seconds)
        self._waiting.append(call)
        self._takers.unpark()
        self._reaper.watch(call)
        try:
            return await call.result()
        finally:
            self._reaper.forget(call)

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
