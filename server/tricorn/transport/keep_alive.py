"""Looking after connections whose peers are gone, and after whatever does not end in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from trio import current_time, sleep_until

from tricorn.errors.report import report_error
from tricorn.waiter import Waiter

if TYPE_CHECKING:
    from collections.abc import Collection

    from tricorn.connection import Connection
    from tricorn.settings import Settings

LOOKS_PER_TIMEOUT = 4  # looks in the shortest timeout: a look may be late by a quarter of it
MARGIN = 0.1  # seconds that tasks which have been cancelled have for their last steps


async def keep_alive(connections: Collection[Connection], settings: Settings) -> None:
    """Keep the connections alive that there are at any time, or give them up. Runs until cancelled.

    Time in which the loop stood still, because a handler blocked it or the process was stopped, does not count.
    """
    period = min(settings.ping_interval, settings.ping_timeout, settings.stall_timeout) / LOOKS_PER_TIMEOUT
    due = current_time() + period
    while True:
        await sleep_until(due)
        now = current_time()
        blocked = now - due
        for connection in list(connections):
            try:
                connection.transport.keep_alive(now, blocked)
            except Exception as error:
                connection.transport.failed(error)
        due = now + period


class Bounded(Protocol):
    """What must end in time: a connection whose tasks were cancelled, or a run of the chat."""

    @property
    def patience(self) -> float:
        """When, in Trio's time."""

    def give_up(self) -> None:
        """It has not ended."""


class Reaper:
    """Gives up whatever goes on after its time.

    All in the line have the same patience, so that those that came first are first in line.
    """

    def __init__(self) -> None:
        self._line: dict[Bounded, None] = {}
        self._some = Waiter()

    def watch(self, bounded: Bounded) -> None:
        self._line[bounded] = None
        self._some.wake()

    def forget(self, bounded: Bounded) -> None:
        self._line.pop(bounded, None)

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            if not self._line:
                await self._some.wait()
            while self._line:
                first = next(iter(self._line))
                if first.patience + MARGIN > current_time():
                    await sleep_until(first.patience + MARGIN)
                    if first.patience + MARGIN > current_time() and first in self._line:
                        self._line[first] = self._line.pop(first)  # it was told since, and has more time
                else:
                    del self._line[first]
                    try:
                        first.give_up()
                    except Exception as error:
                        report_error(error, phase="giving up what does not end")
