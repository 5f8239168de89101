"""What tasks ask of those that have a connection: a caller that is cancelled leaves no connection in disorder."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from trio import Event
from trio.lowlevel import ParkingLot


class Request:
    """What a task asked, until it is answered or nobody waits for it any more."""

    def __init__(self, conversation: str, statement: str, parameters: Sequence[Any]) -> None:
        self.conversation = conversation
        self.statement = statement
        self.parameters = parameters
        self.rows: list[Any] = []
        self.error: Exception | None = None
        self.answered = Event()
        self.abandoned = False


class Requests:
    """Those that wait."""

    def __init__(self) -> None:
        self._waiting: deque[Request] = deque()
        self._takers = ParkingLot()

    def put(self, requests: Sequence[Request]) -> None:
        self._waiting.extendleft(reversed(requests))
        self._takers.unpark()

    def add(self, request: Request) -> None:
        self._waiting.append(request)
        self._takers.unpark()

    async def take(self, limit: int) -> list[Request]:
        """At most `limit` of them, at least one. Never yields where there are some."""
        while True:
            taken: list[Request] = []
            while self._waiting and len(taken) < limit:
                request = self._waiting.popleft()
                if not request.abandoned:
                    taken.append(request)
            if taken:
                return taken
            await self._takers.park()
