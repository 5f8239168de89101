"""The one-task wake-up."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator

import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from tricorn.waiter import WOKEN, Waiter


async def test_wake_lets_the_waiting_task_go_on_again_and_again(nursery: trio.Nursery) -> None:
    waiter, woken = Waiter(), 0

    async def wait() -> None:
        nonlocal woken
        while True:
            await waiter.wait()
            woken += 1

    nursery.start_soon(wait)
    for expected in (1, 2, 3):
        await wait_all_tasks_blocked()
        assert waiter.waiting
        waiter.wake()
        assert not waiter.waiting
        waiter.wake()  # the task has not run yet: nothing to wake
        await wait_all_tasks_blocked()
        assert woken == expected


async def test_a_wake_up_without_a_waiting_task_is_not_remembered(autojump_clock: trio.testing.MockClock) -> None:
    waiter = Waiter()
    waiter.wake()
    with trio.move_on_after(1) as scope:
        await waiter.wait()
    assert scope.cancelled_caught


async def test_a_cancelled_wait_leaves_nobody_to_wake(autojump_clock: trio.testing.MockClock) -> None:
    waiter = Waiter()
    with trio.move_on_after(1):
        await waiter.wait()
    assert not waiter.waiting
    waiter.wake()  # must not reschedule the task, which is running
    await trio.sleep(1)


async def test_the_outcome_of_a_wake_up_works_any_number_of_times() -> None:
    sent: list[None] = []

    def generator() -> Generator[None, None, None]:
        while True:
            sent.append((yield))

    async def asynchronous() -> AsyncGenerator[None, None]:
        while True:
            sent.append((yield))

    waiting, waiting_too = generator(), asynchronous()
    next(waiting)
    await waiting_too.asend(None)
    for _ in range(2):
        assert WOKEN.unwrap() is None  # type: ignore[func-returns-value]
        WOKEN.send(waiting)
        await WOKEN.asend(waiting_too)
    assert sent == [None] * 4
    await waiting_too.aclose()
