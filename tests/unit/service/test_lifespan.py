"""An agent's factory: how it is entered and left, and what becomes of what it raises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from fixtures.records import Records
from tricorn.chat import Run
from tricorn.service.lifespan import AgentFailed, Life, living
from tricorn.service.loader import AgentFactory, agent_name
from tricorn.settings import SettingError

CLOSE_TIMEOUT = 2.0

NAME = agent_name("mine:factory")


async def agent(run: Run) -> None: ...


def lifespan(factory: Callable[[], Any]) -> AbstractAsyncContextManager[Life]:
    return living(AgentFactory(NAME, factory), CLOSE_TIMEOUT)


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    return Records(capfd)


async def test_an_agent_without_a_factory_is_itself() -> None:
    async with living(agent, CLOSE_TIMEOUT) as life:
        assert life.agent is agent


async def test_a_factory_is_entered_before_the_block_and_left_after_it(records: Records) -> None:
    steps = []

    @asynccontextmanager
    async def factory() -> AsyncIterator[Any]:
        async with trio.open_nursery() as nursery:
            steps.append("entered")
            yield agent
            steps.append("left")
            nursery.cancel_scope.cancel()

    async with lifespan(factory) as life:
        assert life.agent is agent
        steps.append("block")
    assert steps == ["entered", "block", "left"]
    assert records.read("ERROR") == []


async def test_what_a_factory_raises_when_entered_is_one_line_with_its_place() -> None:
    @asynccontextmanager
    async def factory() -> AsyncIterator[Any]:
        async with trio.open_nursery():
            raise OSError("no\ndatabase")
        yield

    with pytest.raises(AgentFailed) as raised:
        await lifespan(factory).__aenter__()
    line = factory.__wrapped__.__code__.co_firstlineno + 3  # type: ignore[attr-defined]
    place = f"(test_lifespan.py, line {line})"
    assert str(raised.value) == f"--agent mine:factory: starting it raised OSError: no database {place}"


async def test_cancelled_while_it_is_entered_it_cleans_up() -> None:
    cleaned = []

    @asynccontextmanager
    async def factory() -> AsyncIterator[Any]:
        try:
            await trio.sleep_forever()
            yield
        finally:
            cleaned.append(True)

    with trio.CancelScope() as scope:
        scope.cancel()
        await lifespan(factory).__aenter__()
    assert scope.cancelled_caught
    assert cleaned


async def test_what_is_no_context_manager_is_refused() -> None:
    with pytest.raises(SettingError, match="mine:factory: returns an object of type int; must return an async context"):
        await lifespan(lambda: 5).__aenter__()


async def test_a_factory_that_yields_no_agent_is_left_and_refused() -> None:
    left = []

    @asynccontextmanager
    async def factory() -> AsyncIterator[Any]:
        try:
            yield 5
        finally:
            left.append(True)

    with pytest.raises(SettingError, match=r"--agent mine:factory, what it yields: is of type int; must be an async"):
        await lifespan(factory).__aenter__()
    assert left


async def test_what_it_raises_when_left_is_reported_only(records: Records) -> None:
    @asynccontextmanager
    async def factory() -> AsyncIterator[Any]:
        yield agent
        raise OSError("gone")

    async with lifespan(factory):
        pass
    [record] = records.read("ERROR")
    assert record["message"] == "OSError: gone"
    assert record["action"] == "closing what the agent had opened"


@pytest.mark.parametrize("swallows", [True, False])
async def test_it_neither_hides_nor_swallows_what_the_block_raises(records: Records, swallows: bool) -> None:
    class Factory:
        async def __aenter__(self) -> Any:
            return agent

        async def __aexit__(self, *_: object) -> bool:
            if not swallows:
                raise OSError("gone")
            return True

    with pytest.raises(KeyError, match="ours"):
        async with lifespan(Factory):
            raise KeyError("ours")
    assert len(records.read("ERROR")) == (not swallows)


async def test_an_error_of_the_block_in_the_group_of_its_nursery_is_no_other_error(records: Records) -> None:
    @asynccontextmanager
    async def factory() -> AsyncIterator[Any]:
        async with trio.open_nursery():
            yield agent

    with pytest.raises(KeyError, match="ours"):
        async with lifespan(factory):
            raise KeyError("ours")
    assert records.read("ERROR") == []


@pytest.mark.parametrize(("leave_by", "seconds"), [(None, CLOSE_TIMEOUT), (1.5, 1.5), (0.0, 0.0)])
async def test_leaving_has_a_deadline(
    records: Records, autojump_clock: MockClock, leave_by: float | None, seconds: float
) -> None:
    @asynccontextmanager
    async def factory() -> AsyncIterator[Any]:
        yield agent
        await trio.sleep_forever()

    began = trio.current_time()
    async with lifespan(factory) as life:
        if leave_by is not None:
            life.leave_by = began + leave_by
    assert trio.current_time() - began == pytest.approx(seconds)
    [record] = records.read("ERROR")
    assert record["message"] == "what the agent had opened was not closed in time"


async def test_a_block_that_is_cancelled_leaves_it_time_to_close(autojump_clock: MockClock) -> None:
    closed = []

    class Factory:
        async def __aenter__(self) -> Any:
            return agent

        async def __aexit__(self, *_: object) -> None:
            await trio.sleep(1)
            closed.append(True)

    with trio.move_on_after(1) as scope:
        async with lifespan(Factory):
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert closed


async def test_a_task_of_the_factory_that_fails_ends_the_block(records: Records) -> None:
    async def fail() -> None:
        raise OSError("connection lost")

    @asynccontextmanager
    async def factory() -> AsyncIterator[Any]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            yield agent

    with pytest.raises(AgentFailed, match=r"mine:factory: raised OSError: connection lost \(test_lifespan.py, line"):
        async with lifespan(factory):
            await trio.sleep_forever()
    assert [record["message"] for record in records.read("ERROR")] == ["OSError: connection lost"]


async def test_a_cancellation_around_it_goes_on(records: Records) -> None:
    @asynccontextmanager
    async def factory() -> AsyncIterator[Any]:
        async with trio.open_nursery():
            yield agent

    with trio.CancelScope() as scope:
        async with lifespan(factory):
            scope.cancel()
            await trio.sleep_forever()
        raise AssertionError("it must not get here")
    assert scope.cancelled_caught
    assert records.read("ERROR") == []
