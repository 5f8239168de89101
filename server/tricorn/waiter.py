"""The one-task wake-up: what a `trio.Event` does for many tasks once, this does for one task again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outcome import Outcome
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Generator


class _Woken(Outcome[None]):
    """What a woken task is rescheduled with: `outcome.Value(None)`, but usable any number of times."""

    __slots__ = ()

    def unwrap(self) -> None: ...

    def send(self, gen: Generator[Any, None, object]) -> Any:
        return gen.send(None)

    async def asend(self, agen: AsyncGenerator[Any, None]) -> Any:
        return await agen.asend(None)


WOKEN = _Woken()  # making one for each wake-up would be a tenth of what an echo costs in Python


class Waiter:
    """Lets one task at a time wait until another one wakes it.

    A wake-up is not remembered: look whether what you wait for is already there, and wait without a checkpoint between.

    Attributes:
        waiting: the task that waits, or None.
    """

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: Task | None = None

    def wait(self) -> Awaitable[Any]:
        """Wait for `wake`: to be awaited at once. A checkpoint. If cancelled, it only stops waiting."""
        self.waiting = current_task()
        return wait_task_rescheduled(self._stop_waiting)  # noqa: ASYNC105 (an idle connection needs no second coroutine)

    def wake(self) -> None:
        """Wake the task that waits, if any. Not a checkpoint."""
        if self.waiting is not None:
            reschedule(self.waiting, WOKEN)
            self.waiting = None

    def _stop_waiting(self, _: object) -> Abort:
        self.waiting = None
        return Abort.SUCCEEDED
