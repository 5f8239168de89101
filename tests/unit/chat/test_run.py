"""A run, from agent_started to agent_completed, whatever the agent does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from tricorn.chat.execution import LAST_WORDS, SAID_AT_ONCE, Execution, Runs
from tricorn.chat.logs.base import Append
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.protocol import UserMessage
from tricorn.chat.run import Agent, Run
from tricorn.chat.settings import ChatSettings
from tricorn.chat.tools import ToolError


class Events(list[dict[str, Any]]):
    """A log of one conversation that can be told to fail or to stall at one type of event."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.asked = 0
        self.fail: set[str] = set()
        self.stall: set[str] = set()

    def append_nowait(self, append: Append) -> None:
        raise trio.WouldBlock

    async def append(self, append: Append) -> None:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        key = append.key
        plain = msgspec.json.decode(msgspec.json.encode(append.event))
        if plain["type"] in self.fail:
            self.fail.remove(plain["type"])
            raise OSError("the disk is gone")
        if plain["type"] in self.stall:
            await trio.sleep_forever()
        if key is None or key not in self.keys:
            self.append_plain(plain)
        if key is not None:
            self.keys.add(key)

    def append_plain(self, event: dict[str, Any]) -> None:
        super().append(event)

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self]

    def only(self, type: str) -> dict[str, Any]:
        (found,) = [event for event in self if event["type"] == type]
        return found


@pytest.fixture
def events() -> Events:
    return Events()


Play = Callable[..., Awaitable[Execution]]
NewExecution = Callable[..., Execution]


def execute(events: Events, seconds: float = 300) -> Execution:
    post = UserMessage(conversation="c", seq=1, at=0.0, id="post-1", user="local", text="hello")
    return Execution(post, None, events, ChatSettings(run_timeout=seconds, event_bytes=10_000), ChatMetrics())


async def perform(execution: Execution, agent: Agent) -> None:
    async with trio.open_nursery() as nursery:
        await execution.perform(agent, Run(execution), Runs(nursery))


@pytest.fixture
def new_execution(events: Events) -> NewExecution:
    return partial(execute, events)


@pytest.fixture
def play(new_execution: NewExecution) -> Play:
    async def play(agent: Agent, seconds: float = 300) -> Execution:
        execution = new_execution(seconds)
        await perform(execution, agent)
        return execution

    return play


async def sleeper(run: Run) -> None:
    await trio.sleep_forever()


async def in_tool(run: Run) -> None:
    async with run.tool("wait", seconds=9):
        await trio.sleep_forever()


# What an agent shows


async def test_a_run_shows_its_work_in_order(
    play: Play, events: Events, autojump_clock: trio.testing.MockClock
) -> None:
    async def weather(run: Run) -> None:
        assert (run.conversation, run.user, run.message) == ("c", "local", "hello")
        await run.think("looking it up")
        async with run.tool("forecast", name="Oslo", self=1) as tool:
            await trio.sleep(2)
            tool.result = {"rain": True}
        await run.say("Ra")
        await run.say("in.")

    execution = await play(weather)
    assert events.types == [
        "agent_started",
        "agent_thinking",
        "tool_executing",
        "tool_completed",
        "agent_message",
        "agent_message",
        "agent_completed",
    ]
    assert {event["run"] for event in events} == {execution.id}
    assert events[0]["agent"] == "weather"
    assert events[0]["post"] == "post-1"
    executing, completed = events[2:4]
    assert executing["arguments"] == {"name": "Oslo", "self": 1}
    assert executing["call"] == completed["call"]
    assert (completed["tool"], completed["result"]) == ("forecast", {"rain": True})
    assert completed["seconds"] == pytest.approx(2)
    assert "error" not in completed
    last = events[-1]
    assert (last["outcome"], last["text"]) == ("success", "Rain.")
    assert last["seconds"] == pytest.approx(2)
    assert "error_id" not in last
    assert events.asked == len(events)


async def test_an_agent_that_says_nothing_has_no_text(play: Play, events: Events) -> None:
    async def silent(run: Run) -> None:
        await run.say("")
        await run.think("")

    await play(silent)
    assert events.types == ["agent_started", "agent_completed"]
    assert "text" not in events[-1]


class AtOnce(Events):
    """A log that waits for nothing."""

    def append_nowait(self, append: Append) -> None:
        self.append_plain(msgspec.json.decode(msgspec.json.encode(append.event)))


async def test_where_the_log_does_not_wait_others_have_their_turn_now_and_then() -> None:
    events = AtOnce()

    async def agent(run: Run) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await run.say("not")
        assert scope.cancelled_caught
        with trio.testing.assert_checkpoints():
            for _ in range(SAID_AT_ONCE):
                await run.say("x")

    await perform(execute(events), agent)
    assert events.asked == 0
    assert events[-1]["text"] == "x" * SAID_AT_ONCE


async def test_what_an_agent_calls_is_a_checkpoint(play: Play) -> None:
    async def agent(run: Run) -> None:
        for text in ("", "x"):
            with trio.testing.assert_checkpoints():
                await run.say(text)
        tool = run.tool("t")
        with trio.testing.assert_checkpoints():
            await tool.__aenter__()
        await tool.__aexit__(None, None, None)

    await play(agent)


async def test_an_agent_may_be_an_object_without_a_name(play: Play, events: Events) -> None:
    class Quiet:
        async def __call__(self, run: Run) -> None:
            await trio.lowlevel.checkpoint()

    await play(Quiet())
    assert events[0]["agent"] == "Quiet"


async def test_an_agent_may_open_nurseries(play: Play, events: Events, autojump_clock: trio.testing.MockClock) -> None:
    async def work(run: Run, n: int) -> None:
        async with run.tool("work", n=n) as tool:
            await trio.sleep(3 - n)
            tool.result = n

    async def agent(run: Run) -> None:
        async with trio.open_nursery() as nursery:
            for n in range(3):
                nursery.start_soon(work, run, n)

    await play(agent)
    assert events[-1]["outcome"] == "success"
    executing = {event["call"]: event["arguments"]["n"] for event in events if event["type"] == "tool_executing"}
    completed = [(executing[event["call"]], event["result"]) for event in events if event["type"] == "tool_completed"]
    assert completed == [(2, 2), (1, 1), (0, 0)]


# How a run ends


class Odd(BaseException):
    pass


async def grouped(run: Run) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeper, run)
        raise ValueError("secret")


async def plain(run: Run) -> None:
    raise ValueError("secret")


async def odd(run: Run) -> None:
    raise Odd("secret")


@pytest.mark.parametrize("agent", [plain, grouped, odd])
async def test_an_agent_that_raises_has_failed(
    agent: Agent, play: Play, events: Events, capfd: pytest.CaptureFixture[str]
) -> None:
    execution = await play(agent)
    assert events.types == ["agent_started", "agent_completed"]
    last = events[-1]
    assert last["outcome"] == "failed"
    record = msgspec.json.decode(capfd.readouterr().err)
    assert "secret" in record["stack_trace"]
    assert "secret" not in str(last)
    assert record["error_id"] == last["error_id"]
    assert (record["conversation"], record["run"], record["context"]["user"]) == ("c", execution.id, "local")


async def test_an_agent_that_is_no_coroutine_function_has_failed(play: Play, events: Events) -> None:
    await play(lambda run: None)  # type: ignore[arg-type, return-value]
    assert events[-1]["outcome"] == "failed"


async def test_what_was_said_before_a_failure_is_in_the_text(play: Play, events: Events) -> None:
    async def agent(run: Run) -> None:
        await run.say("half")
        raise ValueError

    await play(agent)
    assert (events[-1]["outcome"], events[-1]["text"]) == ("failed", "half")


async def test_cancel_ends_a_run(new_execution: NewExecution, events: Events, nursery: trio.Nursery) -> None:
    execution = new_execution()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, execution, sleeper)
        await trio.testing.wait_all_tasks_blocked()
        execution.cancel()
        execution.cancel("interrupted")  # the first cause is kept
    assert events[-1]["outcome"] == "cancelled"
    assert "error_id" not in events[-1]


async def test_the_deadline_ends_a_run(play: Play, events: Events, autojump_clock: trio.testing.MockClock) -> None:
    await play(sleeper, seconds=7)
    assert events[-1]["outcome"] == "timeout"
    assert events[-1]["seconds"] == pytest.approx(7)


async def test_cancelling_after_the_deadline_changes_nothing(
    new_execution: NewExecution, events: Events, autojump_clock: trio.testing.MockClock
) -> None:
    async def stubborn(run: Run) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(10)
        execution.cancel()
        await trio.sleep_forever()

    execution = new_execution(seconds=5)
    await perform(execution, stubborn)
    assert events[-1]["outcome"] == "timeout"


@pytest.mark.parametrize("swallows", [True, False])
async def test_an_agent_that_returns_after_its_cancellation_was_cancelled(
    swallows: bool, new_execution: NewExecution, events: Events
) -> None:
    async def agent(run: Run) -> None:
        await run.say("done")
        execution.cancel()
        if swallows:
            with suppress(trio.Cancelled):
                await trio.sleep_forever()

    execution = new_execution()
    await perform(execution, agent)
    assert events[-1]["outcome"] == "cancelled"


async def test_a_run_cancelled_before_it_began_has_a_beginning_and_an_end(
    new_execution: NewExecution, events: Events
) -> None:
    async def never(run: Run) -> None:
        raise AssertionError

    execution = new_execution()
    execution.cancel("interrupted")
    await perform(execution, never)
    assert events.types == ["agent_started", "agent_completed"]
    assert events[-1]["outcome"] == "interrupted"


@pytest.mark.parametrize("at_once", [True, False])
async def test_cancellation_from_around_interrupts_and_goes_on(
    new_execution: NewExecution, events: Events, at_once: bool
) -> None:
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(lambda: cancel_when_blocked(scope))
            if at_once:
                scope.cancel()
            await perform(new_execution(), in_tool)
        assert scope.cancelled_caught
    assert events.types[0] == "agent_started"
    assert events.types.count("agent_completed") == 1
    assert events[-1]["outcome"] == "interrupted"


async def cancel_when_blocked(scope: trio.CancelScope) -> None:
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()


@pytest.mark.parametrize(("cause", "outcome"), [("cancel", "cancelled"), ("around", "interrupted")])
async def test_an_agent_that_raises_while_it_is_ended_keeps_the_first_cause(
    cause: str, outcome: str, new_execution: NewExecution, events: Events, capfd: pytest.CaptureFixture[str]
) -> None:
    async def messy(run: Run) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeper, run)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("in the cleanup")

    execution = new_execution()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, execution, messy)
            await trio.testing.wait_all_tasks_blocked()
            if cause == "cancel":
                execution.cancel()
            else:
                scope.cancel()
    assert scope.cancelled_caught == (cause == "around")
    assert events[-1]["outcome"] == outcome
    assert events[-1]["error_id"] in capfd.readouterr().err  # and the error is not hidden


async def test_a_cancelled_that_nobody_asked_for_is_a_failure(play: Play, events: Events) -> None:
    async def agent(run: Run) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as cancelled:
                kept = cancelled
        raise kept

    async with trio.open_nursery() as nursery:  # where a Cancelled would end without a trace
        nursery.start_soon(play, agent)
    assert not nursery.cancel_scope.cancel_called
    assert events[-1]["outcome"] == "failed"


@pytest.mark.parametrize("is_in_a_group", [True, False])
async def test_a_keyboard_interrupt_goes_on(is_in_a_group: bool, play: Play, events: Events) -> None:
    async def agent(run: Run) -> None:
        raise BaseExceptionGroup("", [KeyboardInterrupt()]) if is_in_a_group else KeyboardInterrupt

    with pytest.raises(BaseExceptionGroup) as caught:
        await play(agent)
    assert caught.group_contains(KeyboardInterrupt)
    assert events[-1]["outcome"] == "interrupted"


@pytest.mark.parametrize("error", [SystemExit(2), asyncio.CancelledError(), GeneratorExit()])
async def test_what_ends_other_programs_fails_only_the_run(
    error: BaseException, play: Play, events: Events, capfd: pytest.CaptureFixture[str]
) -> None:
    async def agent(run: Run) -> None:
        raise error

    await play(agent)
    assert events[-1]["outcome"] == "failed"
    assert msgspec.json.decode(capfd.readouterr().err)["error_id"] == events[-1]["error_id"]


async def test_an_agent_that_leaves_a_cancel_scope_open_has_failed(
    play: Play, events: Events, capfd: pytest.CaptureFixture[str]
) -> None:
    async def agent(run: Run) -> None:
        trio.CancelScope().__enter__()

    await play(agent)
    assert events[-1]["outcome"] == "failed"
    assert "stack corrupted" in capfd.readouterr().err


async def test_after_its_end_a_run_can_say_nothing(play: Play, events: Events) -> None:
    run = Run(await play(sleeper, seconds=1e-6))
    before = list(events)
    with pytest.raises(RuntimeError, match="the run is over"):
        await run.say("more")
    with pytest.raises(RuntimeError, match="the run is over"):
        await run.think("more")
    with pytest.raises(RuntimeError, match="the run is over"):
        async with run.tool("more"):
            pass
    assert events == before


# Tools


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ToolError("no such city"), "no such city"),
        (ToolError(), "the tool failed"),
        (ToolError("\ud800"), "?"),
        (ExceptionGroup("", [ToolError("a"), ExceptionGroup("", [ToolError("b")])]), "a; b"),
        (ExceptionGroup("", [ToolError("a"), ValueError("secret")]), "the tool failed"),
        (ValueError("secret"), "the tool failed"),
        (Odd("secret"), "the tool failed"),
    ],
)
async def test_a_tool_that_raises_shows_an_error_and_the_exception_goes_on(
    error: BaseException, shown: str, play: Play, events: Events
) -> None:
    async def agent(run: Run) -> None:
        with pytest.raises(type(error)) as caught:
            async with run.tool("forecast"):
                raise error
        assert caught.value is error
        await run.say("sorry")

    await play(agent)
    completed = events.only("tool_completed")
    assert completed["error"] == shown
    assert "result" not in completed
    assert events[-1]["outcome"] == "success"


def by_scope(execution: Execution, scope: trio.CancelScope) -> None:
    scope.cancel()


@pytest.mark.parametrize(
    ("end", "shown", "outcome"),
    [
        (lambda execution, scope: execution.cancel(), "cancelled", "cancelled"),
        (lambda execution, scope: execution.cancel("interrupted"), "interrupted", "interrupted"),
        (by_scope, "", "interrupted"),
    ],
)
async def test_tools_in_progress_are_completed_before_the_run(
    end: Callable[[Execution, trio.CancelScope], None],
    shown: str,
    outcome: str,
    new_execution: NewExecution,
    events: Events,
) -> None:
    async def two(run: Run) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_tool, run)
            nursery.start_soon(in_tool, run)

    execution = new_execution()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, execution, two)
            await trio.testing.wait_all_tasks_blocked()
            end(execution, scope)
    assert events.types == [
        "agent_started",
        "tool_executing",
        "tool_executing",
        "tool_completed",
        "tool_completed",
        "agent_completed",
    ]
    if end is not by_scope:  # which may cancel the tools before the run knows why
        assert [event["error"] for event in events if event["type"] == "tool_completed"] == [shown, shown]
    assert {event["call"] for event in events[1:3]} == {event["call"] for event in events[3:5]}
    assert events[-1]["outcome"] == outcome


async def test_a_tool_that_runs_out_of_time(play: Play, events: Events, autojump_clock: trio.testing.MockClock) -> None:
    await play(in_tool, seconds=4)
    assert events.types == ["agent_started", "tool_executing", "tool_completed", "agent_completed"]
    assert events[2]["error"] == "timed out"
    assert events[2]["seconds"] == pytest.approx(4)


async def test_a_timeout_of_the_agents_own_ends_only_the_tool(
    play: Play, events: Events, autojump_clock: trio.testing.MockClock
) -> None:
    async def agent(run: Run) -> None:
        with trio.move_on_after(1):
            await in_tool(run)
        assert events.types[-1] == "tool_completed"
        await run.say("never mind")

    await play(agent)
    assert events.only("tool_completed")["error"] == "cancelled"
    assert events[-1]["outcome"] == "success"


async def test_a_tool_entered_under_a_cancelled_scope_is_never_seen(play: Play, events: Events) -> None:
    async def agent(run: Run) -> None:
        with trio.move_on_after(0):
            await in_tool(run)

    await play(agent)
    assert events.types == ["agent_started", "agent_completed"]


@pytest.mark.parametrize("fails", [False, True])
async def test_a_tool_left_open_is_completed_before_the_run(fails: bool, play: Play, events: Events) -> None:
    left = []

    async def agent(run: Run) -> None:
        left.append(await run.tool("a").__aenter__())
        left.append(await run.tool("b").__aenter__())
        if fails:
            raise ValueError

    await play(agent)
    assert events.types[-3:] == ["tool_completed", "tool_completed", "agent_completed"]
    assert [event["error"] for event in events[-3:-1]] == ["not finished"] * 2
    asked = events.asked
    for tool in left:
        await tool.__aexit__(None, None, None)  # too late to say anything
    assert events.asked == asked


async def test_a_tool_in_a_task_outside_the_run_is_completed_once(
    new_execution: NewExecution, events: Events, nursery: trio.Nursery
) -> None:
    async def agent(run: Run) -> None:
        nursery.start_soon(in_tool, run)
        await trio.testing.wait_all_tasks_blocked()

    await perform(new_execution(), agent)
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await trio.testing.wait_all_tasks_blocked()
    assert events.types == ["agent_started", "tool_executing", "tool_completed", "agent_completed"]


async def test_arguments_that_are_not_json_are_refused_before_anybody_sees_the_tool(play: Play, events: Events) -> None:
    async def agent(run: Run) -> None:
        with pytest.raises(TypeError, match=r"an argument of the tool 'forecast' has no JSON form: .*object"):
            async with run.tool("forecast", city=object()):
                raise AssertionError
        with pytest.raises(TypeError, match="name of a tool must be a str, not int"):
            async with run.tool(5):  # type: ignore[arg-type]
                raise AssertionError

    await play(agent)
    assert events.types == ["agent_started", "agent_completed"]


@pytest.mark.parametrize("result", [object(), "\ud800", {None: 1}])
async def test_a_result_that_is_not_json_is_an_error_of_the_tool(result: object, play: Play, events: Events) -> None:
    async def agent(run: Run) -> None:
        with pytest.raises(TypeError, match="the result of the tool 'forecast' has no JSON form"):
            async with run.tool("forecast") as tool:
                tool.result = result

    await play(agent)
    assert events.types == ["agent_started", "tool_executing", "tool_completed", "agent_completed"]
    assert events[2]["error"] == "the tool failed"


async def test_a_result_that_refers_to_itself_is_an_error_of_the_tool(play: Play, events: Events) -> None:
    async def agent(run: Run) -> None:
        loop: list[object] = []
        loop.append(loop)
        async with run.tool("forecast") as tool:
            tool.result = loop

    await play(agent)
    assert events[-1]["outcome"] == "failed"
    assert events.only("tool_completed")["error"] == "the tool failed"


async def test_a_result_is_taken_as_it_was_when_the_tool_ended(new_execution: NewExecution, events: Events) -> None:
    result: list[object] = [1]

    async def agent(run: Run) -> None:
        async with run.tool("count") as tool:
            tool.result = result
            execution.cancel()
        raise AssertionError

    execution = new_execution()
    try:
        await perform(execution, agent)
    finally:
        result.append(object())
    assert events.only("tool_completed")["result"] == [1]
    assert events[-1]["outcome"] == "cancelled"


@pytest.mark.parametrize(("text", "error"), [(5, TypeError), (None, TypeError), ("\ud800", UnicodeEncodeError)])
async def test_a_text_that_is_none_is_refused(text: Any, error: type[Exception], play: Play, events: Events) -> None:
    async def agent(run: Run) -> None:
        with pytest.raises(error):
            await run.say(text)
        with pytest.raises(error):
            await run.think(text)

    await play(agent)
    assert events.types == ["agent_started", "agent_completed"]


# What does not fit; a run of these tests has events of 10,000 bytes


@pytest.mark.parametrize("text", ["x" * 10_000, "\n" * 5000, "é" * 5000], ids=["plain", "escaped", "not ASCII"])
async def test_a_text_that_is_too_long_is_refused(text: str, play: Play, events: Events) -> None:
    async def agent(run: Run) -> None:
        for show in (run.say, run.think):
            with pytest.raises(ValueError, match=r"^the text has \d+ bytes in JSON; an event has room for 7952$"):
                await show(text)
        await run.say("short")

    await play(agent)
    assert events.types == ["agent_started", "agent_message", "agent_completed"]
    assert events[-1]["text"] == "short"


async def test_the_name_of_a_tool_is_bounded(play: Play, events: Events) -> None:
    async def agent(run: Run) -> None:
        with pytest.raises(ValueError, match="the name of a tool has 129 characters; the limit is 128"):
            async with run.tool("x" * 129):
                raise AssertionError

    await play(agent)
    assert events.types == ["agent_started", "agent_completed"]


async def test_the_text_of_a_tool_error_is_cut(play: Play, events: Events) -> None:
    async def agent(run: Run) -> None:
        async with run.tool("forecast"):
            raise ToolError("x" * 10_000)

    await play(agent)
    assert events.only("tool_completed")["error"] == "x" * 500 + "…"


@pytest.mark.parametrize(("pieces", "told"), [(7, True), (8, False), (1000, False)])
async def test_the_end_repeats_the_answer_only_where_it_fits(
    pieces: int, told: bool, play: Play, events: Events
) -> None:
    async def agent(run: Run) -> None:
        for _ in range(pieces):
            await run.say("x" * 1000)

    execution = await play(agent)
    assert events.types.count("agent_message") == pieces
    assert events[-1].get("text") == ("x" * 1000 * pieces if told else None)
    assert events[-1]["outcome"] == "success"
    assert len(execution._answer) <= 8  # and so much of it is kept


# A log that fails


@pytest.mark.parametrize("type", ["agent_started", "agent_thinking", "tool_executing", "tool_completed"])
async def test_an_append_that_fails_fails_the_run_and_leaves_the_stream_whole(
    type: str, play: Play, events: Events
) -> None:
    async def agent(run: Run) -> None:
        await run.think("hm")
        async with run.tool("t") as tool:
            tool.result = 1

    events.fail.add(type)
    await play(agent)
    assert events[-1]["outcome"] == "failed"
    assert events.types[0] == "agent_started"
    assert events.types.count("tool_executing") == events.types.count("tool_completed")


async def test_an_end_that_cannot_be_logged_is_reported(
    play: Play, events: Events, capfd: pytest.CaptureFixture[str]
) -> None:
    events.fail.add("agent_completed")
    await play(lambda run: run.say("x"))
    assert "the disk is gone" in capfd.readouterr().err


async def test_a_log_that_stalls_holds_the_end_only_so_long(
    play: Play, events: Events, autojump_clock: trio.testing.MockClock, capfd: pytest.CaptureFixture[str]
) -> None:
    events.stall.add("agent_completed")
    await play(lambda run: run.say("x"))
    assert trio.current_time() == pytest.approx(LAST_WORDS)
    assert "TooSlowError" in capfd.readouterr().err


async def test_all_that_a_run_owes_at_its_end_shares_one_deadline(
    new_execution: NewExecution, events: Events, autojump_clock: trio.testing.MockClock
) -> None:
    async def nested(run: Run) -> None:
        async with run.tool("outer"), run.tool("inner"):
            execution.cancel()
            await trio.sleep_forever()

    events.stall |= {"tool_completed", "agent_completed"}
    execution = new_execution()
    await perform(execution, nested)
    assert trio.current_time() == pytest.approx(LAST_WORDS)


async def test_an_error_in_a_tool_of_a_run_that_is_being_ended_is_not_hidden(
    new_execution: NewExecution, events: Events, capfd: pytest.CaptureFixture[str]
) -> None:
    async def agent(run: Run) -> None:
        async with run.tool("t"):
            execution.cancel()
            raise ValueError("in the tool")

    execution = new_execution()
    await perform(execution, agent)
    assert events.only("tool_completed")["error"] == "the tool failed"
    assert events[-1]["outcome"] == "cancelled"
    assert "in the tool" in capfd.readouterr().err


async def test_a_tool_whose_end_cannot_be_logged_in_time_is_made_up_for(
    play: Play, events: Events, autojump_clock: trio.testing.MockClock
) -> None:
    async def agent(run: Run) -> None:
        events.stall.add("tool_completed")
        async with run.tool("t") as tool:
            tool.result = 1
        events.stall.clear()
        await run.say("on")

    await play(agent)
    assert events.types[-3:] == ["agent_message", "tool_completed", "agent_completed"]
    assert events[-2]["result"] == 1
    assert events[-1]["outcome"] == "success"
