"""The life of a log that works in tasks of its own."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tricorn.chat.logs.base import Unavailable
from tricorn.chat.logs.engine import FAREWELL, Engine
from tricorn.chat.settings import ChatSettings

TIMEOUT = 5.0
PERIOD = 10.0


class Fake(Engine):
    """Takes a step every `PERIOD` seconds, which fails with the errors given."""

    def __init__(self, *errors: Exception, opening: float = 0.0, farewell: float = 0.0) -> None:
        super().__init__("Fake at home", ChatSettings(log_timeout=TIMEOUT))
        self.errors = list(errors)
        self.steps = 0
        self._opening = opening
        self._farewell = farewell

    async def _open_store(self) -> None:
        await trio.sleep(self._opening)

    def _start(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._every, PERIOD, self._step)

    async def _let_go(self) -> None:
        await trio.sleep(self._farewell)
        raise self._unavailable("it is gone already")

    async def _step(self) -> None:
        await trio.lowlevel.checkpoint()
        self.steps += 1
        if self.errors:
            raise self.errors.pop(0)


async def test_a_store_that_does_not_open_in_time_is_unavailable(autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(Unavailable, match=r"^Fake at home: it does not answer$"):
        async with Fake(opening=TIMEOUT + 1):
            pass
    assert trio.current_time() == TIMEOUT


async def test_steps_go_on_after_failures_and_only_bugs_are_reported(
    autojump_clock: trio.testing.MockClock, capfd: pytest.CaptureFixture[str]
) -> None:
    async with Fake(Unavailable("away"), ValueError("a bug")) as log:
        await trio.sleep(3.5 * PERIOD)
    assert log.steps == 4
    (record,) = capfd.readouterr().err.splitlines()
    assert "a bug" in record


async def test_tasks_run_until_the_block_is_left_although_it_is_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.CancelScope() as scope:
        async with Fake() as log:
            scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.sleep(3.5 * PERIOD)
    assert log.steps == 4


async def test_letting_go_is_bounded_and_not_cut_short(autojump_clock: trio.testing.MockClock) -> None:
    with trio.CancelScope() as scope:
        async with Fake(farewell=FAREWELL + 1):
            scope.cancel()
    assert trio.current_time() == FAREWELL
