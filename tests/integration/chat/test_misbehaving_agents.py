"""What an agent does to its task, its context or its cancellation concerns its own run and nothing else."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio

from fixtures.chats import Refusing, log, talk, until
from fixtures.records import Records
from tricorn.chat import Run

__all__ = ["log"]

CLOSE_TIMEOUT = 0.3  # seconds
SECRET: contextvars.ContextVar[str] = contextvars.ContextVar("secret", default="unset")


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    return Records(capfd)


# Its context


async def test_a_run_sees_no_context_of_an_earlier_one(log: Refusing) -> None:
    async def look(run: Run, seen: list[str]) -> None:
        seen.append(SECRET.get())

    async def agent(run: Run) -> None:
        before = SECRET.get()
        SECRET.set(run.message)
        seen: list[str] = []
        async with run.tool("look"), trio.open_nursery() as nursery:
            nursery.start_soon(look, run, seen)
        await run.say(f"{before} {seen[0]}")

    async with talk(agent, log) as client:
        for text in ("one", "two"):
            await client.post(text)
            assert (await client.until("agent_message"))["text"] == f"unset {text}"
        assert SECRET.get() == "unset"


async def test_a_run_sees_no_context_of_the_connection_that_came_first(log: Refusing) -> None:
    async def agent(run: Run) -> None:
        await run.say(SECRET.get())

    async with talk(agent, log, first=lambda: SECRET.set("of a connection")) as client:
        assert (await client.run())["text"] == "unset"


# Its cancellation


async def swallows(run: Run) -> None:
    with suppress(trio.Cancelled):
        await trio.sleep_forever()


async def raises_something_else(run: Run) -> None:
    try:
        await trio.sleep_forever()
    finally:
        raise LookupError("in the cleanup")


async def says_more(run: Run) -> None:
    try:
        await trio.sleep_forever()
    except trio.Cancelled:
        with trio.CancelScope(shield=True):
            await run.say("more")


Agent = Callable[[Run], Awaitable[None]]


@pytest.mark.parametrize("ended", ["cancelled", "timeout"])
@pytest.mark.parametrize("agent", [swallows, raises_something_else, says_more])
async def test_an_agent_that_does_not_raise_its_cancellation(log: Refusing, agent: Agent, ended: str) -> None:
    async with talk(agent, log, run_timeout=1.0 if ended == "timeout" else 60.0) as client:
        await client.post()
        started = await client.until("agent_started")
        if ended == "cancelled":
            await client.say("cancel", run=started["run"])
        end = await client.until("agent_completed")
    assert end["outcome"] == ended
    assert ("error_id" in end) == (agent is raises_something_else)


class Endless:
    """Agents that go on after they were cancelled, until `over` is set. What they say then is in `refused`."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.refused: list[str] = []

    async def sleep(self) -> None:
        with trio.CancelScope(shield=True):
            while not self.over.is_set():  # noqa: ASYNC110 (it is where this waits that is reported)
                await trio.sleep(0.01)

    async def shield(self, run: Run) -> None:
        await self.sleep()
        await self.go_on(run)

    async def bare(self, run: Run) -> None:
        while not self.over.is_set():
            with suppress(BaseException):
                await trio.sleep(0.01)
        await self.go_on(run)

    async def thread(self, run: Run) -> None:
        await trio.to_thread.run_sync(self.over.wait)
        await self.go_on(run)

    async def in_a_tool(self, run: Run) -> None:
        async with run.tool("endless"):
            await self.sleep()
        await self.go_on(run)

    async def go_on(self, run: Run) -> None:
        for say in (run.say, run.think):
            try:
                await say("more")
            except RuntimeError as refusal:
                self.refused.append(str(refusal))


@pytest.mark.parametrize("ended", ["cancelled", "timeout"])
@pytest.mark.parametrize("kind", ["shield", "bare", "thread", "in_a_tool"])
async def test_a_conversation_goes_on_without_a_run_that_does_not_end(
    log: Refusing, kind: str, ended: str, records: Records
) -> None:
    endless = Endless()

    async def agent(run: Run) -> None:
        if run.message == "endless":
            await getattr(endless, kind)(run)
        else:
            await run.say(run.message)

    settings = {"run_timeout": 5.0 if ended == "timeout" else 60.0, "close_timeout": CLOSE_TIMEOUT}
    async with talk(agent, log, **settings) as client:
        try:
            await client.post("endless")
            started = await client.until("agent_started")
            if kind == "in_a_tool":
                await client.until("tool_executing")
            if ended == "cancelled":
                await trio.sleep(0.05)  # until it is where it does not end
                await client.say("cancel", run=started["run"])
            end = await client.until("agent_completed")
            assert (end["run"], end["outcome"]) == (started["run"], ended)
            assert (await client.run("next"))["text"] == "next"
            [record] = records.read("ERROR")
            assert "does not end when it is cancelled" in record["message"]
            assert (record["run"], record["outcome"]) == (started["run"], ended)
            assert record["context"] == {"user": "local"}
            assert any("test_misbehaving_agents.py:" in task for task in record["tasks"])
            assert endless.refused == []
            endless.over.set()
            await until(lambda: len(endless.refused) == 2)
            assert set(endless.refused) == {"the run is over"}
            assert (await client.run("last"))["text"] == "last"
            told = await client.all_events()
        finally:
            endless.over.set()
    assert [event["outcome"] for event in told if event["type"] == "agent_completed"] == [ended, "success", "success"]
    assert [event["text"] for event in told if event["type"] == "agent_message"] == ["next", "last"]


async def test_what_an_abandoned_agent_raises_later_is_reported(log: Refusing, records: Records) -> None:
    endless = Endless()

    async def agent(run: Run) -> None:
        await endless.sleep()
        raise LookupError("later")

    async with talk(agent, log, run_timeout=1.0, close_timeout=CLOSE_TIMEOUT) as client:
        try:
            assert (await client.run())["outcome"] == "timeout"
            records.read("ERROR")
            endless.over.set()
            found: list[str] = []
            await until(lambda: found.extend(record["message"] for record in records.read("ERROR")) or found)
            assert found == ["LookupError: later"]
        finally:
            endless.over.set()


@pytest.mark.parametrize("error", [SystemExit(2), asyncio.CancelledError(), GeneratorExit()])
async def test_what_ends_other_programs_fails_only_the_run(
    log: Refusing, error: BaseException, records: Records
) -> None:
    async def agent(run: Run) -> None:
        if run.message == "fail":
            raise error
        await run.say(run.message)

    async with talk(agent, log) as client:
        end = await client.run("fail")
        [record] = records.read("ERROR")
        assert (end["outcome"], end["error_id"]) == ("failed", record["error_id"])
        assert record["message"].startswith(type(error).__name__)
        assert (await client.run("next"))["text"] == "next"
