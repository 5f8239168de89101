"""`to_asyncio` and `from_asyncio`: code of asyncio in an agent, with results, errors and cancellation both ways."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import pytest
import sniffio
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fixtures.chats import errors, until
from fixtures.records import Records
from tricorn.chat import Run
from tricorn.chat.asyncio_bridge import CLEAN_UP, LOOPS, from_asyncio, to_asyncio
from tricorn.chat.testing import ask

variable: ContextVar[str] = ContextVar("variable", default="unset")


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    return Records(capfd)


@pytest.fixture(autouse=True)
async def no_loop_is_left() -> AsyncIterator[None]:
    """Every thread of a loop has ended: Trio names a thread by what it does."""
    yield
    with trio.CancelScope(shield=True):
        await until(lambda: not any("_Bridge" in each.name for each in threading.enumerate()))


async def add(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


async def fail(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


async def of_trio(text: str) -> str:
    assert sniffio.current_async_library() == "trio"
    await trio.lowlevel.checkpoint()
    return text.upper()


# Results and errors


async def test_the_result_comes_back() -> None:
    assert await to_asyncio(add, 1, 2) == 3


async def test_the_code_runs_in_another_thread_where_libraries_find_asyncio() -> None:
    async def where() -> tuple[bool, str]:
        return threading.current_thread() is threading.main_thread(), sniffio.current_async_library()

    assert await to_asyncio(where) == (False, "asyncio")
    assert sniffio.current_async_library() == "trio"


@pytest.mark.parametrize("error", [LookupError("x"), SystemExit(3), asyncio.CancelledError("x")])
async def test_what_it_raises_comes_back(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        await to_asyncio(fail, error)
    assert raised.value is error


async def test_an_exception_group_comes_back_as_it_is() -> None:
    async def group() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail(LookupError("one")))
            tasks.create_task(fail(OSError("two")))

    with pytest.RaisesGroup(LookupError, OSError):
        await to_asyncio(group)


async def test_tasks_that_it_leaves_behind_end_with_it() -> None:
    ended: list[str] = []

    async def background() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("background")

    async def leave() -> asyncio.Task[None]:
        task = asyncio.create_task(background())
        await asyncio.sleep(0)
        return task

    await to_asyncio(leave)
    assert ended == ["background"]


async def test_an_error_of_a_task_that_nobody_asks_for_is_reported(records: Records) -> None:
    async def leave() -> None:
        task = asyncio.create_task(fail(LookupError("lost")))
        await asyncio.wait([task])
        del task

    await to_asyncio(leave)
    [record] = records.read("ERROR")
    assert record["message"] == "LookupError: lost"
    assert record["context"] == {"asyncio": "Task exception was never retrieved"}


# Back to Trio


async def test_it_can_call_functions_of_trio() -> None:
    async def both() -> list[str]:
        return [await from_asyncio(of_trio, "a"), *await asyncio.gather(*(from_asyncio(of_trio, x) for x in "bcd"))]

    assert await to_asyncio(both) == ["A", "B", "C", "D"]


async def test_what_a_function_of_trio_raises_is_raised_in_asyncio() -> None:
    async def broken() -> None:
        raise LookupError("of Trio")

    async def catch() -> str:
        try:
            await from_asyncio(broken)
        except LookupError as error:
            return str(error)
        return "nothing"

    assert await to_asyncio(catch) == "of Trio"
    with pytest.raises(LookupError):
        await to_asyncio(from_asyncio, broken)


async def test_an_async_generator_and_a_callback_stream_into_a_run() -> None:
    async def pieces() -> AsyncIterator[str]:
        for piece in ("Ra", "in"):
            await asyncio.sleep(0)
            yield piece

    async def library(on_end: Any) -> None:
        await on_end(".")

    async def agent(run: Run) -> None:
        async def answer() -> None:
            async for piece in pieces():
                await from_asyncio(run.say, piece)
            await library(lambda text: from_asyncio(run.say, text))

        await to_asyncio(answer)

    result = await ask(agent, "go")
    assert (result.outcome, result.answer) == ("success", "Rain.")


async def test_a_callback_that_is_not_async_can_wait_for_trio_in_its_thread() -> None:
    async def agent(run: Run) -> None:
        async def answer() -> None:
            for piece in "ab":
                trio.from_thread.run(run.say, piece)

        await to_asyncio(answer)

    assert (await ask(agent, "go")).answer == "ab"


async def test_context_variables_go_there_and_back() -> None:
    async def look() -> str:
        return variable.get()

    async def there() -> list[str]:
        before = variable.get()
        variable.set("inner")
        return [before, await from_asyncio(look)]

    variable.set("outer")
    assert await to_asyncio(there) == ["outer", "inner"]
    assert variable.get() == "outer"


async def test_elsewhere_from_asyncio_is_refused() -> None:
    with pytest.raises(RuntimeError, match="from_asyncio is for code that to_asyncio runs"):
        await trio.to_thread.run_sync(asyncio.run, from_asyncio(of_trio, "x"))


# Cancellation


class Waiter:
    """A coroutine of asyncio that waits for ever, and tells how it goes."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.ended = threading.Event()
        self.may_end = threading.Event()
        self.happened: list[str] = []

    async def wait(self) -> None:
        self.started.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.happened.append("cancelled")
            raise
        finally:
            self.ended.set()

    async def swallow(self) -> str:
        self.started.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return "swallowed"
        return "never"

    async def fail_in_clean_up(self) -> None:
        self.started.set()
        try:
            await asyncio.sleep(3600)
        finally:
            raise LookupError("in the clean-up")

    async def block(self) -> None:
        self.started.set()
        try:
            self.may_end.wait()  # and with it the loop
            await asyncio.sleep(0)
            raise AssertionError("it was not cancelled")
        except asyncio.CancelledError:
            self.happened.append("cancelled")
            raise LookupError("too late") from None
        finally:
            self.ended.set()

    async def go_on(self) -> None:
        self.started.set()
        while not self.may_end.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.happened.append("cancelled")
        self.ended.set()


async def cancelled(function: Any, waiter: Waiter) -> trio.CancelScope:
    """Cancel a function once it has started, and return when that is over."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(to_asyncio, function)
            await trio.to_thread.run_sync(waiter.started.wait)
            scope.cancel()
    return scope


async def test_a_run_that_is_cancelled_cancels_the_task_and_waits_for_its_end(records: Records) -> None:
    waiter = Waiter()
    with trio.fail_after(15):  # it would sleep for an hour
        scope = await cancelled(waiter.wait, waiter)
    assert scope.cancelled_caught
    assert (waiter.happened, waiter.ended.is_set()) == (["cancelled"], True)
    assert records.read("ERROR") == []


async def test_stop_reaches_the_task_while_it_waits_for_trio(records: Records) -> None:
    happened: list[str] = []
    started = trio.Event()

    async def wait() -> None:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            happened.append("Trio")

    async def asking() -> None:
        try:
            await from_asyncio(wait)
        finally:
            await asyncio.sleep(0)  # it is cancelled once only
            happened.append("asyncio")

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(to_asyncio, asking)
            await started.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert happened == ["Trio", "asyncio"]
    assert records.read("ERROR") == []


async def test_a_task_that_is_cancelled_in_asyncio_cancels_what_it_waits_for_in_trio() -> None:
    happened: list[str] = []

    async def wait() -> None:
        try:
            await trio.sleep_forever()
        finally:
            happened.append("Trio")

    async def timing_out() -> str:
        try:
            async with asyncio.timeout(0.01):
                await from_asyncio(wait)
        except TimeoutError:
            happened.append("asyncio")
        return await from_asyncio(of_trio, "next")

    assert await to_asyncio(timing_out) == "NEXT"
    assert happened == ["Trio", "asyncio"]


async def test_what_trio_raises_when_asyncio_cancels_it_is_not_lost() -> None:
    async def wait() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise LookupError("in the clean-up")

    async def timing_out() -> None:
        async with asyncio.timeout(0.01):
            await from_asyncio(wait)

    with pytest.raises(LookupError):
        await to_asyncio(timing_out)


async def test_a_task_that_swallows_its_cancellation_and_returns_has_its_result_returned() -> None:
    waiter = Waiter()
    found: list[str] = []

    async def agent() -> None:
        found.append(await to_asyncio(waiter.swallow))
        await trio.lowlevel.checkpoint()
        raise AssertionError("it was not cancelled")

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent)
            await trio.to_thread.run_sync(waiter.started.wait)
            scope.cancel()
    assert (found, scope.cancelled_caught) == (["swallowed"], True)


async def test_what_a_task_raises_in_its_clean_up_is_raised() -> None:
    waiter = Waiter()
    with pytest.RaisesGroup(LookupError, flatten_subgroups=True):
        await cancelled(waiter.fail_in_clean_up, waiter)


@pytest.mark.parametrize("way", ["block", "go_on"])
async def test_a_task_that_does_not_end_is_abandoned_with_a_report(way: str, records: Records) -> None:
    waiter = Waiter()
    began = trio.current_time()
    scope = await cancelled(getattr(waiter, way), waiter)
    assert scope.cancelled_caught
    assert trio.current_time() - began >= CLEAN_UP
    assert not waiter.ended.is_set()
    [record] = records.read("ERROR")
    assert record["message"] == "asyncio code does not end when it is cancelled; its thread goes on without it"
    assert record["function"] == f"Waiter.{way}"
    assert any(each.endswith(f"in {way}") for each in record["tasks"])
    waiter.may_end.set()
    await trio.to_thread.run_sync(waiter.ended.wait)
    assert waiter.happened == ["cancelled"]
    if way == "block":
        found = await errors(records)
        assert [each["message"] for each in found] == ["LookupError: too late"]


async def test_code_that_was_abandoned_cannot_call_trio_any_more() -> None:
    waiter = Waiter()
    found: list[str] = []
    asked = threading.Event()

    async def late() -> None:
        await waiter.go_on()
        try:
            await from_asyncio(of_trio, "x")
        except RuntimeError as error:
            found.append(str(error))
        asked.set()

    await cancelled(late, waiter)
    waiter.may_end.set()
    await trio.to_thread.run_sync(asked.wait)
    assert found == ["to_asyncio has abandoned this code"]


async def test_what_is_cancelled_before_it_begins_does_not_begin(autojump_clock: MockClock) -> None:
    began: list[str] = []

    async def begin() -> None:
        began.append("began")

    with trio.CancelScope() as scope:
        scope.cancel()
        await to_asyncio(begin)
    assert (began, scope.cancelled_caught) == ([], True)


async def test_loops_are_bounded_and_waiting_for_one_can_be_cancelled(records: Records) -> None:
    may_end = threading.Event()
    begun: list[int] = []

    async def hold(number: int) -> None:
        begun.append(number)
        await asyncio.to_thread(may_end.wait) if number == 0 else await hold_on()

    async def hold_on() -> None:
        while not may_end.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        for number in range(LOOPS):
            nursery.start_soon(to_asyncio, hold, number)
        await until(lambda: len(begun) == LOOPS)
        with trio.move_on_after(0.1) as scope:
            await to_asyncio(hold, LOOPS)
        assert scope.cancelled_caught
        may_end.set()
    assert len(begun) == LOOPS
    assert records.read("ERROR") == []


async def test_a_run_with_asyncio_in_it_is_stopped(records: Records) -> None:
    waiter = Waiter()

    async def agent(run: Run) -> None:
        await to_asyncio(waiter.wait)

    result = await ask(agent, "go", cancel_after=0.05)
    assert (result.outcome, waiter.happened) == ("cancelled", ["cancelled"])
    assert records.read("ERROR") == []
    await wait_all_tasks_blocked()
