"""The first error of a run is the one that is reported, whatever the log and the ends of tools do then: E8 and E9."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from fixtures.chats import Refusing, log, talk
from fixtures.records import Records
from tricorn.chat import Run
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
        with trio.fail_after(30):
            while not (found := records.read("ERROR")):
                await trio.sleep(0.01)
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
        with trio.fail_after(30):
            while not (found := records.read("ERROR")):
                await trio.sleep(0.01)
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


@pytest.mark.parametrize("shows", ["__str__"])
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
