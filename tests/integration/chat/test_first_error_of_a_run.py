"""The first error of a run is the one that is reported, whatever the log and the ends of tools do then: E8 and E9."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

import tricorn.testing
from fixtures.chats import Refusing, errors, log, talk
from fixtures.records import Records
from tricorn.chat import Chat, Run
from tricorn.chat.identity import Identity
from tricorn.chat.logs.base import Unavailable
from tricorn.chat.tools import ToolError

__all__ = ["log"]


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    return Records(capfd)


async def fails_in_a_tool(run: Run) -> None:
    async with run.tool("forecast"):
        raise LookupError("the first error")


async def gives_no_json(run: Run) -> None:
    async with run.tool("forecast") as tool:
        tool.result = object()


@pytest.mark.parametrize("error", [Unavailable("full"), trio.TooSlowError(), RuntimeError("a bug")])
async def test_an_agent_that_fails_in_a_tool_while_the_log_refuses(
    log: Refusing, error: Exception, records: Records
) -> None:
    log.error = error
    async with talk(fails_in_a_tool, log) as client:
        log.refused = {"tool_completed"}
        await client.post()
        await client.until("tool_executing")
        found = await errors(records)
        log.refused = set()
        end = await client.until("agent_completed")
    assert found[0]["message"] == "LookupError: the first error"
    assert end["outcome"] in ("failed", "interrupted")  # the latter if another lease had to say so
    notes = found[0]["stack_trace"].partition("LookupError: the first error\n")[2]
    if not isinstance(error, trio.TooSlowError):  # it is the same as no answer in time, and tried again
        assert notes.startswith("The end of the tool 'forecast' is not in the log: ")
        assert type(error).__name__ in notes


async def test_a_result_without_json_while_the_log_refuses(log: Refusing, records: Records) -> None:
    log.error = Unavailable("full")
    async with talk(gives_no_json, log) as client:
        log.refused = {"tool_completed"}
        await client.post()
        await client.until("tool_executing")
        found = await errors(records)
        log.refused = set()
        await client.until("agent_completed")
    assert "has no JSON form" in found[0]["stack_trace"]
    assert found[0]["message"].startswith("TypeError: ")


async def test_a_log_that_refuses_a_word_is_the_first_error(log: Refusing, records: Records) -> None:
    async def agent(run: Run) -> None:
        await run.say("x")

    log.error = Unavailable("full")
    async with talk(agent, log) as client:
        log.refused = {"agent_message"}
        end = await client.run()
    [record] = records.read("ERROR")
    assert record["message"] == "Unavailable: full"
    assert record["error_id"] == end["error_id"]


@pytest.mark.parametrize("type", ["agent_started", "agent_message", "tool_completed", "agent_completed"])
async def test_an_error_of_the_log_without_a_text_is_named(log: Refusing, type: str, records: Records) -> None:
    async def agent(run: Run) -> None:
        async with run.tool("forecast"):
            pass
        await run.say("x")

    log.error = trio.TooSlowError()
    async with talk(agent, log) as client:
        log.refused = {type}
        await client.post()
        found: list[dict[str, Any]] = []
        if type != "tool_completed":  # that is tried again at the end of the run
            found = await errors(records)
        log.refused = set()
        await client.until("agent_completed")
    for record in found:
        assert record["message"] == "Unavailable: the log did not answer within 10 s"


@pytest.mark.parametrize("shows", ["__str__", "exceptions"])
async def test_an_error_of_a_tool_that_cannot_be_shown(log: Refusing, shows: str, records: Records) -> None:
    class Mute(ToolError):
        def __str__(self) -> str:
            raise RuntimeError("cannot be shown")

    class Closed(ExceptionGroup[Any]):
        @property
        def exceptions(self) -> Any:
            raise RuntimeError("cannot be asked")

        def derive(self, excs: Any) -> Any:
            raise RuntimeError("cannot be derived")

    async def agent(run: Run) -> None:
        async with run.tool("forecast"):
            raise Mute("the first error") if shows == "__str__" else Closed("", [LookupError("the first error")])

    async with talk(agent, log) as client:
        await client.post()
        assert (await client.until("tool_completed"))["error"] == "the tool failed"
        end = await client.until("agent_completed")
    [record] = records.read("ERROR")
    assert end["outcome"] == "failed"
    assert end["error_id"] == record["error_id"]
    assert record["message"].startswith("Mute" if shows == "__str__" else "LookupError: the first error")


# What ends a run and hides an error: E9


async def handle_all(run: Run) -> None:
    try:
        raise LookupError("the first error")
    except Exception:
        await trio.sleep_forever()
        raise


async def clean_up(run: Run) -> None:
    try:
        raise LookupError("the first error")
    finally:
        await trio.sleep_forever()


@asynccontextmanager
async def slow_to_leave() -> AsyncIterator[None]:
    try:
        yield
    finally:
        await trio.sleep_forever()


async def leave_a_block(run: Run) -> None:
    async with slow_to_leave():
        raise LookupError("the first error")


async def swallow(run: Run) -> None:
    try:
        await handle_all(run)
    except trio.Cancelled as cancelled:
        raise GeneratorExit from cancelled


async def handle_on_purpose(run: Run) -> None:
    try:
        raise LookupError("not an error")
    except LookupError:
        await trio.sleep_forever()


Agent = Callable[[Run], Awaitable[None]]


@pytest.mark.parametrize("ended", ["cancelled", "timeout"])
@pytest.mark.parametrize("agent", [handle_all, clean_up, leave_a_block, swallow])
async def test_a_cancellation_hides_no_error_of_an_agent(
    log: Refusing, agent: Agent, ended: str, records: Records
) -> None:
    async with talk(agent, log, run_timeout=1.0 if ended == "timeout" else 60.0) as client:
        await client.post()
        started = await client.until("agent_started")
        if ended == "cancelled":
            await trio.sleep(0.05)  # until it waits
            await client.say("cancel", run=started["run"])
        end = await client.until("agent_completed")
    [record] = records.read("ERROR")
    assert record["message"] == "LookupError: the first error"
    assert (end["outcome"], end["error_id"]) == (ended, record["error_id"])


async def test_a_cancellation_of_an_agent_that_has_not_failed_is_no_error(log: Refusing, records: Records) -> None:
    async with talk(handle_on_purpose, log, run_timeout=1.0) as client:
        end = await client.run()
    assert (end["outcome"], "error_id" in end) == ("timeout", False)
    assert records.read("ERROR") == []


async def test_a_log_that_refuses_an_apology_hides_no_error(log: Refusing, records: Records) -> None:
    async def agent(run: Run) -> None:
        try:
            raise LookupError("the first error")
        except Exception:
            await run.say("sorry")
            raise

    log.error = Unavailable("full")
    async with talk(agent, log) as client:
        log.refused = {"agent_message"}
        end = await client.run()
    [record] = records.read("ERROR")
    assert record["message"] == "LookupError: the first error"
    assert (end["outcome"], end["error_id"]) == ("failed", record["error_id"])


class Slow:
    """A gate that fails, and whose handling of that waits for the peer to go."""

    wants_token = False

    def __init__(self) -> None:
        self.waits = trio.Event()

    async def admit(self, token: str | None, peer: str, headers: Mapping[str, str]) -> Identity:
        try:
            raise LookupError("the first error")
        except Exception:
            self.waits.set()
            await trio.sleep_forever()
            raise


async def test_a_peer_that_goes_hides_no_error_of_a_session(records: Records) -> None:
    gate = Slow()
    async with Chat(handle_all, gate=gate) as chat, tricorn.testing.connect(chat.session) as client:
        await gate.waits.wait()
        client.vanish()
    [record] = records.read("ERROR")
    assert record["message"] == "LookupError: the first error"


# What a failed agent held


async def test_nothing_of_a_failed_agent_is_alive_when_the_end_of_its_run_is_written(log: Refusing) -> None:
    class Big:
        pass

    held: list[weakref.ref[Big]] = []
    alive: list[bool] = []

    async def agent(run: Run) -> None:
        big = Big()
        held.append(weakref.ref(big))
        raise MemoryError

    log.on_append = lambda type: alive.append(held[0]() is not None) if type == "agent_completed" else None
    async with talk(agent, log) as client:
        assert (await client.run())["outcome"] == "failed"
    assert alive == [False]
