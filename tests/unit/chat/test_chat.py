"""The chat as a whole: its nursery, and how it ends."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing

from fixtures.clock import seconds
from tricorn.chat import Chat, Run
from tricorn.chat.logs.memory import MemoryLog
from tricorn.chat.quota import Quota
from tricorn.chat.readiness import BELIEVED, LOG_PATIENCE
from tricorn.chat.settings import ChatSettings

Connect = Callable[..., Awaitable[Any]]


async def echo(run: Run) -> None:
    await run.say(run.message)


async def in_tool(run: Run) -> None:
    async with run.tool("wait"):
        await trio.sleep_forever()


def types(objects: list[dict[str, Any]]) -> list[str]:
    return [object["type"] for object in objects]


async def logged(log: MemoryLog) -> str:
    return b"\n".join(entry.json for entry in await log.read("local/c", 0, 1000)).decode()


async def test_leaving_the_chat_interrupts_its_runs(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(in_tool, log=log) as chat:
        client = await connect(chat)
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_all()
    text = await logged(log)
    assert text.count('"interrupted"') == 2  # of the tool and of the run
    assert text.splitlines()[-1].startswith('{"type":"agent_completed"')


async def test_cancelling_the_chat_interrupts_its_runs(connect: Connect) -> None:
    log = MemoryLog()
    with trio.CancelScope() as scope:
        async with Chat(in_tool, log=log) as chat:
            client = await connect(chat)
            client.say("post", id="p", conversation="c", text="x")
            await client.hear_all()
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert '"interrupted"' in (await logged(log)).splitlines()[-1]


async def test_an_error_in_the_block_ends_the_chat_and_comes_out() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with Chat(echo):
            raise ValueError
    assert caught.group_contains(ValueError)


async def test_chats_share_nothing(connect: Connect) -> None:
    async with Chat(echo) as one, Chat(echo) as two:
        client, other = await connect(one), await connect(two)
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_all()
        other.say("open", conversation="c")
        assert (await other.hear())["head"] == 0


async def test_a_conversation_is_forgotten_when_it_has_lingered_out_but_not_its_log(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    async with Chat(echo, ChatSettings(linger=5.0)) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        opened, *_ = await client.hear_until("agent_completed")
        client.say("leave", conversation="c")
        await trio.sleep(4)
        assert chat._conversations
        await trio.sleep(2)
        assert not chat._conversations
        client.say("open", conversation="c")
        client.say("post", id="p2", conversation="c", text="y")
        again, *heard = await client.hear_all()
    assert (again["epoch"], again["head"]) == (opened["epoch"], 4)
    assert [each["seq"] for each in heard if "at" in each] == list(range(1, 9))


async def test_a_conversation_whose_time_has_just_run_out_goes_on_for_who_comes(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with Chat(echo, ChatSettings(linger=5.0)) as chat:
        first = chat.conversation("c")
        with first.held():
            await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(6)
        second = chat.conversation("c")  # the task of the first has not noticed yet
        assert second is first
        with second.held():
            await trio.testing.wait_all_tasks_blocked()
            assert chat.conversation("c") is second
            await second.post("p", "x", Quota("local", ChatSettings()))


async def test_cancelling_in_conversations_that_are_not_there_creates_nothing(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(echo, log=log) as chat:
        client = await connect(chat)
        for n in range(100):
            client.say("cancel", conversation=f"c{n}", run="r")
        errors = await client.hear_all()
        assert [error["code"] for error in errors] == ["not_found"] * 100
        assert chat._conversations == {}
        assert log.store.conversations == {}


async def test_of_conversations_that_a_user_has_left_so_many_stay_in_memory(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = MemoryLog()
    async with Chat(in_tool, ChatSettings(open_conversations=3), log) as chat:
        client = await connect(chat)
        client.say("post", id="p", conversation="running", text="x")
        for n in range(1000):
            client.say("open", conversation=f"c{n}")
            client.say("leave", conversation=f"c{n}")
        assert (await client.hear_until("posted"))[-1]["id"] == "p"
        await client.hear_all()
        assert sorted(chat._conversations) == ["local/c997", "local/c998", "local/c999", "local/running"]
        client.say("open", conversation="c997")  # used again: the others are older
        client.say("leave", conversation="c997")
        client.say("open", conversation="new")
        client.say("leave", conversation="new")
        await client.hear_all()
        assert sorted(chat._conversations) == ["local/c997", "local/c999", "local/new", "local/running"]
        client.say("open", conversation="running")
        assert "agent_completed" not in types(await client.hear_all())
    assert list(log.store.conversations) == ["local/running"]


# Drain


async def test_drain_says_closing_interrupts_runs_and_sends_all_that_is_in_the_log(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    async with Chat(in_tool) as chat:
        client, other = await connect(chat), await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_until("tool_executing")
        client.say("post", id="waiting", conversation="c", text="y")
        await client.hear_until("user_message")
        await chat.drain()
        writes = client.writes
        closing, completed, last = await client.hear_all()  # what waits is left to whoever has the log next
        assert client.writes == writes  # nothing came after the drain
        assert types(await other.hear_all()) == ["closing"]
    assert closing["type"] == "closing"
    assert closing["reason"]
    assert (completed["type"], completed["error"]) == ("tool_completed", "interrupted")
    assert (last["type"], last["outcome"]) == ("agent_completed", "interrupted")


async def test_runs_that_need_less_than_there_is_finish_during_the_drain_and_what_waits_is_not_begun(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    async def needs(run: Run) -> None:
        await trio.sleep(float(run.message))
        await run.say("done")

    log = MemoryLog()
    async with Chat(needs, ChatSettings(drain_timeout=8.0, close_timeout=2.0), log) as chat:
        client = await connect(chat)
        for conversation, text in (("two", "2"), ("two", "0"), ("three", "3.9"), ("long", "100")):
            client.say("open", conversation=conversation)
            client.say("post", id=f"{conversation}-{text}", conversation=conversation, text=text)
        await client.hear_all()
        with trio.move_on_after(6) as scope:  # as the server gives it
            await chat.drain()
        assert not scope.cancelled_caught
        assert trio.current_time() == pytest.approx(4)  # with 2 seconds left for last words
        heard = [each for each in await client.hear_all() if each["type"] == "agent_completed"]
        assert {each["conversation"]: each["outcome"] for each in heard} == {
            "two": "success",
            "three": "success",
            "long": "interrupted",
        }
        assert [each.get("text") for each in heard] == ["done", "done", None]
        assert await log.unanswered(10) == ["local/two"]


async def test_a_drain_without_runs_takes_no_time(connect: Connect, autojump_clock: trio.testing.MockClock) -> None:
    async with Chat(echo) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_until("agent_completed")
        await chat.drain()
        assert trio.current_time() == 0


async def test_a_run_can_be_cancelled_while_the_chat_drains(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    async with Chat(in_tool) as chat, trio.open_nursery() as nursery:
        client = await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        run = (await client.hear_until("tool_executing"))[-1]["run"]
        nursery.start_soon(chat.drain)
        await client.hear_until("closing")
        client.say("cancel", conversation="c", run=run)
        assert (await client.hear_until("agent_completed"))[-1]["outcome"] == "cancelled"
        assert trio.current_time() == 0


async def test_who_is_alone_may_come_back_at_once_and_many_are_spread(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def told(clients: int) -> list[float]:
        async with Chat(echo) as chat:
            connected = [await connect(chat) for _ in range(clients)]
            await chat.drain()
            return [(await client.hear())["retry_after"] for client in connected]

    assert await told(1) == [1.0]
    random.seed(1)
    monkeypatch.setattr("tricorn.chat.chat.RETURNS_PER_SECOND", 10)
    after = await told(101)
    assert 1.0 <= min(after) < 1.5
    assert 10.5 < max(after) <= 11.0
    busiest = max(Counter(map(int, after)).values())
    assert busiest <= 20  # in one second; all in all it is ten times as many


async def test_while_it_is_closing_a_chat_can_be_read_but_not_posted_to(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    async with Chat(in_tool) as chat:
        client = await connect(chat)
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_all()
        await chat.drain()
        assert types(await client.hear_all()) == ["closing"]
        for conversation in ("c", "new"):
            client.say("post", id="q", conversation=conversation, text="x")
            (error,) = await client.hear_all()
            assert (error["code"], error["ref"]) == ("closing", "q")
        client.say("open", conversation="c")
        assert types(await client.hear_all())[-1] == "agent_completed"
        late = await connect(chat)
        assert types(await late.hear_all()) == ["closing"]


async def test_who_opens_while_runs_are_ending_hears_the_end(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    ending, end = trio.Event(), trio.Event()

    async def stubborn(run: Run) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ending.set()
            with trio.CancelScope(shield=True):
                await end.wait()

    async with Chat(stubborn) as chat:
        client = await connect(chat)
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_all()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(chat.drain)
            await ending.wait()
            client.say("open", conversation="c")
            assert types(await client.hear_all()) == ["closing", "opened", "user_message", "agent_started"]
            end.set()
        assert types(await client.hear_all()) == ["agent_completed"]


async def test_a_peer_that_does_not_read_holds_a_drain_only_as_long_as_its_caller_waits(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = MemoryLog()
    async with Chat(in_tool, log=log) as chat:
        client = await connect(chat)
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_all()
        client.stop_reading()
        with trio.move_on_after(3) as scope:
            await chat.drain()
        assert scope.cancelled_caught
        assert trio.current_time() == pytest.approx(3)
        assert '"interrupted"' in await logged(log)


async def test_a_peer_that_goes_ends_the_drains_waiting(connect: Connect) -> None:
    async with Chat(echo) as chat:
        client = await connect(chat)
        client.stop_reading()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(chat.drain)
            await trio.testing.wait_all_tasks_blocked()
            await client.leave()


async def test_draining_a_chat_without_anybody_is_a_checkpoint() -> None:
    async with Chat(echo) as chat:
        with trio.testing.assert_checkpoints():
            await chat.drain()


# Poller


class UselessLog(MemoryLog):
    """Does what it was told to when it is asked whether it works."""

    immediate = False

    def __init__(self, ask: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self._ask = ask

    async def check(self) -> None:
        await self._ask()


async def test_a_chat_is_ready_until_it_drains() -> None:
    async with Chat(echo) as chat:
        with trio.testing.assert_checkpoints():
            assert await chat.why_not_ready() is None
        await chat.drain()
        with trio.testing.assert_checkpoints():
            assert await chat.why_not_ready() == "draining"


async def test_a_chat_whose_log_fails_is_not_ready_and_the_failure_is_reported(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def fail() -> None:
        raise OSError("the disk is gone")

    async with Chat(echo, log=UselessLog(fail)) as chat:
        assert await chat.why_not_ready() == "the log fails"
    assert "OSError: the disk is gone" in capfd.readouterr().err


async def test_a_chat_whose_log_says_nothing_is_not_ready(autojump_clock: trio.testing.MockClock) -> None:
    async with Chat(echo, log=UselessLog(trio.sleep_forever)) as chat:
        async with seconds(LOG_PATIENCE):
            assert await chat.why_not_ready() == "the log does not answer"
            assert await chat.why_not_ready() == "the log does not answer"  # at once: it was asked just now
        await trio.sleep(BELIEVED)
        with trio.move_on_after(LOG_PATIENCE / 2) as scope:
            await chat.why_not_ready()
        assert scope.cancelled_caught


async def test_the_log_is_checked_once_a_second_for_any_number_of_probes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    checks: list[float] = []

    async def check() -> None:
        checks.append(trio.current_time())
        await trio.sleep(0.25)

    answers: list[str | None] = []

    async def probe() -> None:
        answers.append(await chat.why_not_ready())

    async with Chat(echo, log=UselessLog(check)) as chat, trio.open_nursery() as nursery:
        for _ in range(101):
            nursery.start_soon(probe)
        for _ in range(40):
            await trio.sleep(0.1)
            await probe()
    assert answers == [None] * 141
    assert len(checks) == 4
    assert all(later - earlier >= BELIEVED for earlier, later in pairwise(checks))


async def test_whoever_waits_checks_the_log_if_the_one_who_did_is_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with Chat(echo, log=UselessLog(partial(trio.sleep, 0.25))) as chat, trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def leave() -> None:
            with scope:
                await chat.why_not_ready()

        nursery.start_soon(leave)
        await trio.testing.wait_all_tasks_blocked()
        async with seconds(0.25):
            scope.cancel()
            assert await chat.why_not_ready() is None
