"""Questions of a run: who may answer them, what the answer is, and how they end."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import pytest
import trio
import trio.testing

from tricorn.chat import Chat, NotAnswered, Run
from tricorn.chat.execution import completed_key
from tricorn.chat.logs.base import Append
from tricorn.chat.logs.memory import MemoryLog
from tricorn.chat.protocol import AgentAsked
from tricorn.chat.settings import ChatSettings
from tricorn.chat.testing import ask as ask_agent

LEASE = 15.0
Connect = Callable[..., Awaitable[Any]]


async def asker(run: Run) -> None:
    choices = run.message.split()
    try:
        await run.say(await run.ask("Which one?", choices=choices, seconds=100))
    except NotAnswered:
        await run.say("nobody")


async def logged(log: MemoryLog) -> list[dict[str, Any]]:
    return [json.loads(entry.json) for entry in await log.read("local/c", 0, 10_000)]


def check(events: list[dict[str, Any]], *outcomes: str) -> None:
    """Each question has one end, before that of its run, and these are their outcomes."""
    types = [event["type"] for event in events]
    asked = [event for event in events if event["type"] == "agent_asked"]
    assert [event["outcome"] for event in asked] == list(outcomes)
    assert sorted(event["ask"] for event in asked) == sorted(
        event["ask"] for event in events if event["type"] == "agent_asking"
    )
    assert types[-1] == "agent_completed"
    assert types.count("agent_completed") == types.count("agent_started")


async def put(client: Any, text: str = "red green") -> dict[str, Any]:
    """Post, and return the question."""
    client.say("open", conversation="c")
    client.say("post", id="p", conversation="c", text=text)
    asking: dict[str, Any] = (await client.hear_until("agent_asking"))[-1]
    return asking


async def test_an_answer_of_any_client_goes_to_the_agent(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(asker, log=log) as chat:
        client, other = await connect(chat), await connect(chat)
        asking = await put(client)
        assert (asking["text"], asking["choices"]) == ("Which one?", ["red", "green"])
        assert asking["until"] == pytest.approx(asking["at"] + 100, abs=5)
        other.say("answer", conversation="c", ask=asking["ask"], text="green")
        asked, said, completed = await client.hear_until("agent_completed")
        assert (asked["outcome"], asked["answer"], asked["user"]) == ("answered", "green", "local")
        assert (said["text"], completed["outcome"]) == ("green", "success")
        check(await logged(log), "answered")
        assert await other.hear_all() == []


async def test_an_answer_that_is_none_is_refused_and_the_question_waits_on(connect: Connect) -> None:
    async with Chat(asker, ChatSettings(text_characters=20)) as chat:
        client = await connect(chat)
        ask = (await put(client))["ask"]
        for text, code in [("blue", "malformed"), (" ", "malformed"), ("x" * 21, "too_long")]:
            client.say("answer", conversation="c", ask=ask, text=text)
            error = await client.hear()
            assert (error["code"], error["ref"]) == (code, ask)
        client.say("answer", conversation="c", ask="another", text="red")
        client.say("answer", conversation="d", ask=ask, text="red")
        assert [error["code"] for error in await client.hear_all()] == ["not_found", "not_found"]
        client.say("answer", conversation="c", ask=ask, text="red")
        client.say("answer", conversation="c", ask=ask, text="green")
        heard = await client.hear_all()
        assert [each["text"] for each in heard if each["type"] == "agent_message"] == ["red"]
        assert [(each["code"], each["ref"]) for each in heard if each["type"] == "error"] == [("not_found", ask)]


async def test_without_choices_any_text_is_an_answer(connect: Connect) -> None:
    async def name(run: Run) -> None:
        await run.say(f"Hello {await run.ask('Your name?')}.")

    async with Chat(name) as chat:
        client = await connect(chat)
        asking = await put(client)
        assert "choices" not in asking
        client.say("answer", conversation="c", ask=asking["ask"], text="Ann Ä")
        assert (await client.hear_until("agent_completed"))[-1]["text"] == "Hello Ann Ä."


async def test_the_first_of_two_answers_at_two_instances_counts(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(asker, log=log) as one, Chat(asker, log=MemoryLog(beside=log)) as two:
        here, there = await connect(one), await connect(two)
        ask = (await put(here))["ask"]
        there.say("open", conversation="c")
        await there.hear_until("agent_asking")
        there.say("answer", conversation="c", ask=ask, text="green")
        here.say("answer", conversation="c", ask=ask, text="red")
        heard = [await here.hear_all(), await there.hear_all()]
        events = await logged(log)
    check(events, "answered")
    answer = next(event["answer"] for event in events if event["type"] == "agent_asked")
    assert events[-1]["text"] == answer
    refused = [each for each in heard[0] + heard[1] if each["type"] == "error"]
    assert [each["code"] for each in refused] == ["not_found"]


async def test_an_answer_to_a_question_of_which_the_news_are_on_their_way(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(asker, log=log) as one, Chat(asker, log=(late := MemoryLog(beside=log))) as two:
        here, there = await connect(one), await connect(two)
        there.say("open", conversation="c")
        await there.hear_all()
        late._watchers.clear()
        ask = (await put(here))["ask"]
        there.say("answer", conversation="c", ask=ask, text="green")
        assert (await here.hear_until("agent_completed"))[-1]["text"] == "green"


async def test_who_comes_back_finds_the_question_and_can_answer(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    async with Chat(asker, ChatSettings(linger=30)) as chat:
        client = await connect(chat)
        asking = await put(client)
        await client.leave()
        await trio.sleep(20)
        back = await connect(chat)
        back.say("open", conversation="c", after=0)
        assert (await back.hear_until("agent_asking"))[-1] == asking
        back.say("answer", conversation="c", ask=asking["ask"], text="red")
        assert (await back.hear_until("agent_completed"))[-1]["text"] == "red"


async def test_if_nobody_comes_back_the_run_is_abandoned(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = MemoryLog()
    async with Chat(asker, ChatSettings(abandon_after=30), log) as chat:
        client = await connect(chat)
        await put(client)
        await client.leave()
        await trio.sleep(40)
        events = await logged(log)
        check(events, "cancelled")
        assert events[-1]["outcome"] == "abandoned"


async def test_nobody_answers_in_time(connect: Connect, autojump_clock: trio.testing.MockClock) -> None:
    log = MemoryLog()
    async with Chat(asker, ChatSettings(run_timeout=10, heartbeat=3600), log) as chat:
        client = await connect(chat)
        asking = await put(client)
        began = trio.current_time()
        asked, _, completed = await client.hear_until("agent_completed")
        assert trio.current_time() - began == pytest.approx(100)
        assert "answer" not in asked
        assert (completed["outcome"], completed["text"]) == ("success", "nobody")
        client.say("answer", conversation="c", ask=asking["ask"], text="red")
        assert (await client.hear())["code"] == "not_found"
        check(await logged(log), "timeout")


async def test_cancelling_the_run_ends_the_question(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(asker, log=log) as chat:
        client = await connect(chat)
        client.say("cancel", conversation="c", run=(await put(client))["run"])
        assert (await client.hear_until("agent_completed"))[-1]["outcome"] == "cancelled"
        check(await logged(log), "cancelled")


async def test_the_end_of_the_chat_ends_the_question(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(asker, log=log) as chat:
        await put(await connect(chat))
    check(await logged(log), "interrupted")


async def test_the_question_of_an_instance_that_died_is_closed(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = MemoryLog(lease=LEASE * 2 / 3)
    async with Chat(asker, ChatSettings(lease=LEASE), log) as dying:
        ask = (await put(await connect(dying)))["ask"]
        async with Chat(
            asker, ChatSettings(lease=LEASE, linger=inf), MemoryLog(lease=LEASE * 2 / 3, beside=log)
        ) as heir:
            log.vanish()
            follower = await connect(heir)
            follower.say("open", conversation="c")
            heard = await follower.hear_until("agent_completed")
            assert heard[-1]["outcome"] == "interrupted"
            follower.say("answer", conversation="c", ask=ask, text="red")
            assert (await follower.hear())["code"] == "not_found"
            check(await logged(log), "interrupted")


async def test_an_answer_while_no_instance_has_the_lease_stays_the_end_of_its_question(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    """The agent that asked is gone, which nobody knows yet. The heir does not end the question a second time."""
    log = MemoryLog(lease=LEASE * 2 / 3)
    async with Chat(asker, ChatSettings(lease=LEASE), log) as dying:
        ask = (await put(await connect(dying)))["ask"]
        async with Chat(
            asker, ChatSettings(lease=LEASE, linger=inf), MemoryLog(lease=LEASE * 2 / 3, beside=log)
        ) as heir:
            follower = await connect(heir)
            follower.say("open", conversation="c")
            await follower.hear_until("agent_asking")
            log.vanish()
            follower.say("answer", conversation="c", ask=ask, text="red")
            heard = await follower.hear_until("agent_completed")
    assert heard[-1]["outcome"] == "interrupted"
    check(await logged(log), "answered")


async def test_an_answer_that_is_in_the_log_before_the_time_is_up_counts_though_it_was_not_heard_of(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = MemoryLog()
    async with Chat(asker, log=log) as chat:
        client = await connect(chat)
        asking = await put(client)
        about: dict[str, Any] = {"conversation": "c", "run": asking["run"], "ask": asking["ask"], "seq": 0, "at": 0.0}
        answer = Append(AgentAsked(**about, outcome="answered", answer="green"), completed_key(asking["ask"]))
        log.append_nowait("local/c", (await log.open("local/c")).epoch, answer)  # of which it is not told
        assert (await client.hear_until("agent_completed"))[-1]["text"] == "green"
        check(await logged(log), "answered")


async def test_the_time_of_a_run_and_of_its_blocks_stands_still_while_it_waits(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    async def slow(run: Run) -> None:
        with run.move_on_after(4) as scope:
            await trio.sleep(3)
            await run.ask("Go on?")
            await trio.sleep(3)
        await run.say(f"{trio.current_time() - began:g} {scope.cancelled_caught}")
        await trio.sleep_forever()

    async with Chat(slow, ChatSettings(run_timeout=10)) as chat:
        client = await connect(chat)
        began = trio.current_time()
        asking = await put(client)
        await trio.sleep(200)
        client.say("answer", conversation="c", ask=asking["ask"], text="yes")
        *_, said, completed = await client.hear_until("agent_completed")
    assert said["text"] == "204 True"
    assert (completed["outcome"], completed["seconds"]) == ("timeout", pytest.approx(210))


async def test_a_run_that_has_asked_and_ignores_its_end_is_given_up_in_time(
    connect: Connect, autojump_clock: trio.testing.MockClock, capfd: pytest.CaptureFixture[str]
) -> None:
    is_done = trio.Event()

    async def stubborn(run: Run) -> None:
        await run.ask("Go on?")
        with trio.CancelScope(shield=True):
            await is_done.wait()

    async with Chat(stubborn, ChatSettings(run_timeout=10, close_timeout=2, linger=inf)) as chat:
        client = await connect(chat)
        asking = await put(client)
        await trio.sleep(200)
        client.say("answer", conversation="c", ask=asking["ask"], text="yes")
        completed = (await client.hear_until("agent_completed"))[-1]
        is_done.set()
    assert (completed["outcome"], completed["seconds"]) == ("timeout", pytest.approx(212, abs=0.5))
    assert "a run's task does not end when it is cancelled" in capfd.readouterr().err


async def test_several_questions_wait_at_a_time(connect: Connect) -> None:
    async def two(run: Run) -> None:
        async def one(text: str) -> None:
            await run.say(f"{text}: {await run.ask(text)}. ")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "a")
            nursery.start_soon(one, "b")

    log = MemoryLog()
    async with Chat(two, log=log) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        asks = {each["text"]: each["ask"] for each in await client.hear_all() if each["type"] == "agent_asking"}
        client.say("answer", conversation="c", ask=asks["b"], text="2")
        await client.hear_until("agent_message")
        client.say("answer", conversation="c", ask=asks["a"], text="1")
        assert (await client.hear_until("agent_completed"))[-1]["text"] == "b: 2. a: 1. "
        check(await logged(log), "answered", "answered")


async def test_a_deadline_of_the_agents_own_ends_only_the_question(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    async def hasty(run: Run) -> None:
        with trio.move_on_after(5):
            await run.ask("Quick?")
        await run.say("too slow")

    log = MemoryLog()
    async with Chat(hasty, log=log) as chat:
        client = await connect(chat)
        await put(client)
        assert (await client.hear_until("agent_completed"))[-1]["outcome"] == "success"
        check(await logged(log), "cancelled")


async def test_what_is_no_question_is_refused() -> None:
    from_agent: list[BaseException] = []

    async def agent(run: Run) -> None:
        for question, options in [
            (1, {}),
            ("x" * 300_000, {}),
            ("x", {"seconds": 0}),
            ("x", {"seconds": inf}),
            ("x", {"choices": "yes"}),
            ("x", {"choices": ["yes", ""]}),
        ]:
            try:
                await run.ask(question, **options)  # type: ignore[arg-type]
            except (TypeError, ValueError) as error:
                from_agent.append(error)

    result = await ask_agent(agent, "x")
    assert [type(each) for each in from_agent] == [TypeError, ValueError, ValueError, ValueError, TypeError, TypeError]
    assert [event.__struct_config__.tag for event in result.events] == ["agent_started", "agent_completed"]
