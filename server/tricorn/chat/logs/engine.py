"""What engines have in common that work in tasks of their own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from trio import CancelScope, Nursery, move_on_after, open_nursery, sleep

from tricorn.chat.backoff import Backoff
from tricorn.chat.logs.base import Retention, Unavailable
from tricorn.chat.settings import ChatSettings
from tricorn.errors.report import report, report_error
from tricorn.errors.text import title

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds between two attempts to reach the store
FAREWELL = 1.0  # seconds to let go of everything at the end
SILENCE = "it does not answer"
SWEEP_PERIOD = 600.0  # seconds between two searches for entries that retention no longer asks to keep


class Engine:
    """A log whose tasks run while its block does, and longer than the scopes around the block: last words come late."""

    def __init__(self, where: str, settings: ChatSettings) -> None:
        """`where` tells operators which store this is."""
        self._where = where
        self._timeout = settings.log_timeout
        self._retention = Retention(settings.retention_events, settings.retention_seconds)
        self._problem = SILENCE  # why the store cannot be reached at the moment
        self._reported: set[str] = set()  # problems, since it could be reached last
        self._running = CancelScope(shield=True)

    @property
    def problem(self) -> str:
        """Why the store does not answer, as far as that is known: one line for operators."""
        return f"{self._where}: {self._problem}"

    async def __aenter__(self) -> Self:
        """Raises Unavailable if the store cannot be used within `log_timeout`."""
        await self._in_time(self._open_store)
        self._tasks = open_nursery()
        nursery = await self._tasks.__aenter__()
        nursery.start_soon(self._run)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        with move_on_after(FAREWELL, shield=True):
            try:
                await self._let_go()
            except Unavailable:
                pass
            except Exception as failure:
                report_error(failure)
        self._running.cancel()
        return await self._tasks.__aexit__(kind, error, traceback)

    def _start(self, nursery: Nursery) -> None:
        """Start the engine's tasks."""
        raise NotImplementedError

    async def _open_store(self) -> None:
        """Prepare the store before the tasks start."""

    async def _let_go(self) -> None:
        """Tell the store that this instance is gone."""

    async def _run(self) -> None:
        with self._running:
            async with open_nursery() as nursery:
                self._start(nursery)

    async def _in_time(self, step: Callable[[], Awaitable[object]]) -> None:
        with move_on_after(self._timeout) as scope:
            await step()
        if scope.cancelled_caught:
            raise self._unavailable(self._problem)

    async def _every(self, seconds: float, step: Callable[[], Awaitable[object]]) -> None:
        """Take a step again and again. If it fails it has to wait for the next time."""
        while True:
            try:
                await step()
            except Unavailable:  # callers learn that from their own calls
                pass
            except Exception as error:  # a bug
                report_error(error)
            await sleep(seconds)

    def _backoff(self) -> Backoff:
        return Backoff(FIRST_PAUSE, LONGEST_PAUSE)

    def _failed(self, problem: str) -> None:
        """The store cannot be reached. Each problem is reported once, until it can be."""
        self._problem = problem
        if problem not in self._reported:
            self._reported.add(problem)
            report("WARNING", f"the log is not available: {self.problem}")

    def _works(self) -> None:
        """The store can be reached."""
        self._problem = SILENCE
        self._reported.clear()

    def _unavailable(self, problem: str) -> Unavailable:
        return Unavailable(f"{self._where}: {problem}")

    def _broken(self, error: Exception) -> Unavailable:
        """Make an Unavailable of what no store raises: a bug, an import that was refused, no thread. To be reported."""
        unavailable = self._unavailable(title(error))
        unavailable.__cause__ = error
        return unavailable
