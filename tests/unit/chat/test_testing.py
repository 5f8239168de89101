"""`tricorn.chat.testing`: an agent is asked something without a server."""

from __future__ import annotations

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from tricorn.chat import AgentError, Asked, NotAnswered, Run, ToolCall, ToolError, Turn
from tricorn.chat.protocol import (
    AgentCompleted,
    AgentMessage,
    AgentStarted,
    AgentThinking,
    RunEvent,
    ToolCompleted,
    ToolExecuting,
    Usage,
)
from tricorn.chat.settings import ChatSettings
from tricorn.chat.testing import ask


async def echo(run: Run) -> None:
    await run.say(f"{run.user}: ")
    await run.say(run.message)


async def sleeper(run: Run) -> None:
    await run.say("one moment")
    async with run.tool("wait"):
        await trio.sleep_forever()


async def test_a_success_has_the_events_in_order_and_the_whole_answer() -> None:
    result = await ask(echo, "hello")
    started, first, second, completed = result.events
    assert isinstance(started, AgentStarted)
    assert (started.agent, started.post, started.post_seq, started.seq) == ("echo", "post", 1, 2)
    assert isinstance(first, AgentMessage)
    assert isinstance(second, AgentMessage)
    assert (first.text, second.text) == ("local: ", "hello")
    assert isinstance(completed, AgentCompleted)
    assert (completed.outcome, completed.text, completed.seq) == ("success", "local: hello", 5)
    assert (result.answer, result.outcome, result.error) == ("local: hello", "success", None)
    assert len({(event.conversation, event.run) for event in result.events}) == 1


async def test_text_that_an_agent_returns_is_said_after_the_rest() -> None:
    async def agent(run: Run) -> str:
        await run.say("one, ")
        return "two"

    result = await ask(agent, "count")
    assert (result.answer, result.outcome) == ("one, two", "success")
    end = result.events[-1]
    assert isinstance(end, AgentCompleted)
    assert end.text == "one, two"


@pytest.mark.parametrize("nothing", [None, ""])
async def test_nothing_that_an_agent_returns_is_no_event(nothing: str | None) -> None:
    async def agent(run: Run) -> str | None:
        return nothing

    assert [type(event) for event in (await ask(agent, "x")).events] == [AgentStarted, AgentCompleted]


async def test_an_agent_that_returns_something_else_has_failed() -> None:
    async def agent(run: Run) -> int:
        return 5

    result = await ask(agent, "x")  # type: ignore[arg-type]
    assert (result.outcome, result.answer) == ("failed", "")


async def test_a_tool_shows_arguments_result_and_time(autojump_clock: MockClock) -> None:
    async def weather(run: Run) -> None:
        await run.think("looking it up")
        async with run.tool("forecast", city=run.message) as tool:
            await trio.sleep(2)
            tool.result = {"rain": True}

    result = await ask(weather, "Oslo")
    thinking, executing, completed = result.events[1:-1]
    assert isinstance(thinking, AgentThinking)
    assert isinstance(executing, ToolExecuting)
    assert isinstance(completed, ToolCompleted)
    assert (executing.tool, executing.arguments) == ("forecast", {"city": "Oslo"})
    assert (completed.result, completed.error, completed.call) == ({"rain": True}, None, executing.call)
    assert completed.seconds == pytest.approx(2)
    assert result.answer == ""


async def test_the_exception_of_an_agent_that_fails_is_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    failure = ToolError("no such city")

    async def fail(run: Run) -> None:
        await run.say("well")
        async with run.tool("forecast"):
            raise failure

    result = await ask(fail, "Atlantis")
    assert (result.outcome, result.answer) == ("failed", "well")
    assert result.error is failure
    tool, completed = result.events[-2:]
    assert isinstance(tool, ToolCompleted)
    assert tool.error == "no such city"
    assert isinstance(completed, AgentCompleted)
    assert completed.error_id
    assert completed.error_id in capfd.readouterr().err


async def test_a_run_that_takes_too_long_times_out(autojump_clock: MockClock) -> None:
    result = await ask(sleeper, "", settings=ChatSettings(run_timeout=60))
    assert trio.current_time() == 60
    assert (result.outcome, result.answer, result.error) == ("timeout", "one moment", None)
    tool = result.events[-2]
    assert isinstance(tool, ToolCompleted)
    assert tool.error == "timed out"


async def test_a_run_is_cancelled_when_the_test_says(autojump_clock: MockClock) -> None:
    result = await ask(sleeper, "", cancel_after=3)
    assert trio.current_time() == 3
    assert (result.outcome, result.answer, result.error) == ("cancelled", "one moment", None)


async def test_an_agent_that_fails_while_it_is_cancelled_hides_nothing(autojump_clock: MockClock) -> None:
    async def clumsy(run: Run) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("in cleanup")

    result = await ask(clumsy, "", cancel_after=3)
    assert result.outcome == "cancelled"
    assert isinstance(result.error, ValueError)


async def test_cancelling_the_scope_around_cancels_the_agent(autojump_clock: MockClock) -> None:
    cancelled = trio.Event()

    async def agent(run: Run) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled.set()
            raise

    with trio.move_on_after(3) as scope:
        await ask(agent, "")
    assert scope.cancelled_caught
    assert cancelled.is_set()


async def test_an_interrupt_is_not_an_outcome() -> None:
    async def agent(run: Run) -> None:
        raise KeyboardInterrupt

    with pytest.RaisesGroup(KeyboardInterrupt):
        await ask(agent, "")


async def test_the_user_is_the_one_given() -> None:
    assert (await ask(echo, "hello", user="ann")).answer == "ann: hello"


async def test_two_asks_share_nothing() -> None:
    results: dict[str, list[RunEvent]] = {}

    async def collect(text: str) -> None:
        results[text] = list((await ask(echo, text)).events)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect, "one")
        nursery.start_soon(collect, "two")
    one, two = results["one"], results["two"]
    assert [event.seq for event in one] == [event.seq for event in two] == [2, 3, 4, 5]
    assert {event.run for event in one}.isdisjoint({event.run for event in two})


async def test_a_history_is_what_the_run_finds() -> None:
    seen: list[list[Turn]] = []

    async def agent(run: Run) -> None:
        seen.append(await run.history())
        await run.say("done")

    history = [
        Turn("ann", "one", 0.0, "1", "success", (ToolCall("count", {"to": 1}, 1), ToolCall("count", {}, None, "no"))),
        Turn("bob", "two", 0.0, "", "failed", (), "it failed", (Asked("Send it?", "no"), Asked("Now?"))),
    ]
    result = await ask(agent, "three", history=history)
    assert [replace(turn, at=0.0) for turn in seen[0]] == history
    assert (result.outcome, result.answer) == ("success", "done")
    await ask(agent, "alone")
    assert seen[1] == []


async def test_questions_are_answered_in_order_or_by_a_function(autojump_clock: MockClock) -> None:
    async def agent(run: Run) -> None:
        await run.say(await run.ask("one?", choices=["yes", "no"]))
        await run.say(await run.ask("two?"))

    assert (await ask(agent, "x", answers=["no", "maybe"])).answer == "nomaybe"
    assert (await ask(agent, "x", answers={"one?": "yes", "two?": "2"}.get)).answer == "yes2"
    refused = await ask(agent, "x", answers=["maybe"])
    assert isinstance(refused.error, ValueError)
    result = await ask(agent, "x", answers=["yes"])
    assert isinstance(result.error, NotAnswered)
    completed = result.events[-1]
    assert isinstance(completed, AgentCompleted)
    assert completed.error == "nobody answered within 600 s: two?"


async def test_tokens_add_up() -> None:
    async def agent(run: Run) -> None:
        run.used(input=10, output=2, cached=4)
        run.used(input=1, output=1)

    completed = (await ask(agent, "x")).events[-1]
    assert isinstance(completed, AgentCompleted)
    assert completed.usage == Usage(11, 3, 4)


async def test_people_are_told_what_an_agent_error_says_and_nothing_of_others() -> None:
    async def agent(run: Run) -> None:
        if run.message == "for people":
            raise ExceptionGroup("", [AgentError("out of coffee"), AgentError("out of tea")])
        if run.message == "mixed":
            raise ExceptionGroup("", [AgentError("out of coffee"), ValueError("secret")])
        if run.message == "without a text":
            raise AgentError
        raise ValueError("secret")

    async def end(text: str) -> AgentCompleted:
        completed = (await ask(agent, text)).events[-1]
        assert isinstance(completed, AgentCompleted)
        assert completed.outcome == "failed"
        assert completed.error_id
        return completed

    assert (await end("for people")).error == "out of coffee; out of tea"
    for text in ("mixed", "without a text", "another"):
        assert (await end(text)).error is None
