"""Runs below a run: what they show, and that each ends once, before its parent, whoever dies."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import pytest
import trio
import trio.testing
from msgspec import to_builtins
from trio.testing import MockClock

from tricorn.chat import AgentError, Chat, Run, Turn, testing
from tricorn.chat.logs.base import Append
from tricorn.chat.logs.memory import MemoryLog
from tricorn.chat.protocol import AgentCompleted, AgentMessage, AgentStarted, Usage
from tricorn.chat.settings import ChatSettings
from tricorn.chat.testing import AgentEvent, _Appender, ask

LEASE = 15.0
Connect = Callable[..., Awaitable[Any]]


async def researcher(run: Run) -> None:
    for word in run.message.split():
        async with run.tool("look_up", word=word) as tool:
            tool.result = len(word)
        await run.say(f"{word} {tool.result}. ")


async def logged(log: MemoryLog) -> list[dict[str, Any]]:
    return [json.loads(entry.json) for entry in await log.read("local/c", 0, 10_000)]


def check(events: list[dict[str, Any]]) -> None:
    """Each run, call and question begins in a run that is open, and ends once, before the run that it is in."""
    open_in: dict[str, str] = {}  # what is open → the run that it is in
    for event in events:
        run = event.get("run", "")
        match event["type"]:
            case "agent_started":
                assert (event["post"] == "") is ("parent" in event)
                assert "parent" not in event or event["parent"] in open_in
                assert run not in open_in
                open_in[run] = event.get("parent", "")
            case "tool_executing" | "agent_asking":
                assert run in open_in
                open_in[event.get("call") or event["ask"]] = run
            case "tool_completed" | "agent_asked":
                assert open_in.pop(event.get("call") or event["ask"]) == run
            case "agent_completed":
                assert run not in open_in.values(), "something in it is still open"
                del open_in[run]
            case "user_message":
                pass
            case _:
                assert run in open_in
    assert not open_in


def dicts(events: list[AgentEvent]) -> list[dict[str, Any]]:
    plain: list[dict[str, Any]] = to_builtins(events)
    return plain


async def test_what_a_child_does_is_shown_under_its_parent_and_name() -> None:
    async def agent(run: Run) -> None:
        await run.say("Well: ")
        async with run.agent("researcher", "tri corn") as child:
            assert (child.message, child.user, child.conversation) == ("tri corn", run.user, run.conversation)
            assert child.id != run.id
            await researcher(child)
            child.used(input=5, output=1)
        await run.say(child.text.upper())

    result = await ask(agent, "x")
    check(dicts(result.events))
    assert result.answer == "Well: TRI 3. CORN 4. "
    _, started = [event for event in result.events if isinstance(event, AgentStarted)]
    assert (started.agent, started.parent, started.post, started.post_seq) == (
        "researcher",
        result.events[0].run,
        "",
        0,
    )
    of_child, end = [event for event in result.events if isinstance(event, AgentCompleted)]
    assert (of_child.run, of_child.text, of_child.outcome) == (started.run, "tri 3. corn 4. ", "success")
    assert of_child.usage == Usage(5, 1)
    assert (end.text, end.usage) == (result.answer, None)


async def test_two_in_parallel_do_not_mix_their_texts(autojump_clock: MockClock) -> None:
    async def slowly(run: Run) -> None:
        for letter in run.message:
            await trio.sleep(1)
            await run.say(letter)

    async def agent(run: Run) -> None:
        async def part(task: str) -> None:
            async with run.agent(task, task) as child:
                await slowly(child)
            texts.append(child.text)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(part, "abc")
            nursery.start_soon(part, "xyz")

    texts: list[str] = []
    result = await ask(agent, "x")
    check(dicts(result.events))
    assert sorted(texts) == ["abc", "xyz"]
    assert result.answer == ""
    said = [event.run for event in result.events if isinstance(event, AgentMessage)]
    assert said[:3] != [said[0]] * 3, "they spoke at the same time"


async def test_a_child_that_raises_has_failed_and_its_parent_can_go_on() -> None:
    async def agent(run: Run) -> None:
        for error in (AgentError("no papers"), ValueError("secret")):
            try:
                async with run.agent("researcher", "x") as child:
                    await child.say("so far")
                    raise error
            except (AgentError, ValueError):
                await run.think("it failed")
        await run.say("anyway")

    result = await ask(agent, "x")
    ends = [event for event in result.events if isinstance(event, AgentCompleted)]
    assert [(end.outcome, end.error, end.text) for end in ends] == [
        ("failed", "no papers", "so far"),
        ("failed", None, "so far"),
        ("success", None, "anyway"),
    ]


async def test_a_deadline_of_the_agents_own_cancels_only_the_child(autojump_clock: MockClock) -> None:
    async def agent(run: Run) -> None:
        with trio.move_on_after(3):
            async with run.agent("sleeper", "x") as child, child.agent("inner", "y") as inner, inner.tool("wait"):
                await trio.sleep_forever()
        await run.say("anyway")

    result = await ask(agent, "x")
    check(dicts(result.events))
    ends = [event.outcome for event in result.events if isinstance(event, AgentCompleted)]
    assert ends == ["cancelled", "cancelled", "success"]


async def deep(run: Run) -> None:
    """Open all that there is at two depths, twice at a time."""

    async def part(name: str) -> None:
        async with run.agent(name, "x") as child:
            await child.say(name)
            async with child.agent(f"{name}.{name}", "y") as inner:
                await inner.think(name)
                async with inner.tool("wait"):
                    await inner.ask("Go on?")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(part, "a")
        nursery.start_soon(part, "b")


@pytest.mark.parametrize("ending", ["cancelled", "timeout"])
async def test_the_end_of_a_run_ends_its_children_first(ending: str, autojump_clock: MockClock) -> None:
    async def impatient(run: Run) -> None:
        async with run.agent("outer", "x") as outer, outer.agent("inner", "y") as inner, inner.tool("wait"):
            await trio.sleep_forever()

    how: dict[str, Any] = {"cancel_after": 3} if ending == "cancelled" else {"settings": ChatSettings(run_timeout=3)}
    result = await ask(impatient, "x", **how)
    check(dicts(result.events))
    assert [event.outcome for event in result.events if isinstance(event, AgentCompleted)] == [ending] * 3


class Waiting(_Appender):
    """An appender that is a checkpoint before each event."""

    def append_nowait(self, append: Append) -> None:
        raise trio.WouldBlock

    async def append(self, append: Append) -> None:
        await trio.lowlevel.checkpoint()
        super().append_nowait(append)


async def test_a_run_that_is_cancelled_at_any_checkpoint_leaves_no_child_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many checkpoints it had passed."""
    monkeypatch.setattr(testing, "_Appender", Waiting)
    lengths = set()
    for steps in range(60):

        async def agent(run: Run, steps: int = steps) -> None:
            async with trio.open_nursery() as nursery:

                async def stop() -> None:
                    for _ in range(steps):
                        await trio.lowlevel.cancel_shielded_checkpoint()
                    run._execution.cancel()

                nursery.start_soon(stop)
                await deep(run)

        result = await ask(agent, "x")
        check(dicts(result.events))
        assert result.outcome == "cancelled"
        lengths.add(len(result.events))
    assert len(lengths) > 1, "it was cancelled at several depths"
    assert max(lengths) == 22, "and with everything open"


async def test_a_child_left_open_in_a_task_outside_the_run_ends_with_it() -> None:
    refused: list[BaseException] = []
    async with trio.open_nursery() as outside:
        opened, go_on = trio.Event(), trio.Event()

        async def work(run: Run) -> None:
            async with run.agent("stray", "x") as child:
                opened.set()
                await go_on.wait()
                try:
                    await child.say("late")
                except RuntimeError as error:
                    refused.append(error)

        async def agent(run: Run) -> None:
            outside.start_soon(work, run)
            await opened.wait()

        result = await ask(agent, "x")
        go_on.set()
    check(dicts(result.events))
    assert [event.outcome for event in result.events if isinstance(event, AgentCompleted)] == ["cancelled", "success"]
    assert [str(each) for each in refused] == ["the run is over"]


async def test_a_child_asks_and_the_answer_comes_to_it(connect: Connect) -> None:
    async def agent(run: Run) -> None:
        async with run.agent("mailer", "x") as child:
            await child.say(await child.ask("Send it?", choices=["yes", "no"]))
        await run.say(child.text)

    log = MemoryLog()
    async with Chat(agent, log=log) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        client.say("post", id="q", conversation="c", text="x")
        for _ in range(2):
            asking = (await client.hear_until("agent_asking"))[-1]
            client.say("answer", conversation="c", ask=asking["ask"], text="yes")
            assert (await client.hear_until("agent_completed"))[-1]["run"] == asking["run"]
            assert (await client.hear_until("agent_completed"))[-1]["text"] == "yes"
        events = await logged(log)
    check(events)
    assert [event["post_seq"] for event in events if event["type"] == "agent_started" and event["post"]] == [1, 2]


async def test_the_children_of_an_instance_that_died_end_innermost_first(
    connect: Connect, autojump_clock: MockClock
) -> None:
    log = MemoryLog(lease=LEASE * 2 / 3)
    async with Chat(deep, ChatSettings(lease=LEASE), log) as dying:
        client = await connect(dying)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        for _ in range(2):
            await client.hear_until("agent_asking")
        heirs = MemoryLog(lease=LEASE * 2 / 3, beside=log)
        async with Chat(researcher, ChatSettings(lease=LEASE, linger=inf, heartbeat=3600), heirs) as heir:
            log.vanish()
            follower = await connect(heir)
            follower.say("open", conversation="c")
            heard = []
            for _ in range(5):
                heard += await follower.hear_until("agent_completed")
            assert {event["outcome"] for event in heard if event["type"] == "agent_completed"} == {"interrupted"}
            events = await logged(log)
    check(events)


async def test_history_has_the_answer_of_the_parent_only(connect: Connect) -> None:
    seen: list[Turn] = []

    async def agent(run: Run) -> None:
        seen.extend(await run.history())
        async with run.agent("researcher", "tri") as child:
            await researcher(child)
        await run.say("done")

    async with Chat(agent) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        for id in ("p", "q"):
            client.say("post", id=id, conversation="c", text=id)
            for _ in range(2):
                await client.hear_until("agent_completed")
    (turn,) = seen
    assert (turn.text, turn.answer, turn.tools) == ("p", "done", ())


@pytest.mark.parametrize(("name", "task"), [("", "x"), ("x" * 129, "x"), (1, "x"), ("x", 1)])
async def test_what_is_no_child_is_refused(name: Any, task: Any) -> None:
    async def agent(run: Run) -> None:
        async with run.agent(name, task):
            pass

    result = await ask(agent, "x")
    assert isinstance(result.error, TypeError | ValueError)
    assert len(result.events) == 2
