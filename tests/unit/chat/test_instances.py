"""Several instances with one log: each post is answered once, in order, whoever is asked, and whoever dies."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import pytest
import trio
import trio.testing

from tricorn.chat import Chat, Run
from tricorn.chat.chat import LOOK_AT_ONCE
from tricorn.chat.logs.base import Append, Entry, LogState, Unavailable
from tricorn.chat.logs.memory import MemoryLog
from tricorn.chat.protocol import AgentThinking
from tricorn.chat.settings import ChatSettings

LEASE = 15.0
Connect = Callable[..., Awaitable[Any]]


async def echo(run: Run) -> None:
    await run.say(run.message)


async def stuck(run: Run) -> None:
    async with run.tool("wait"):
        await trio.sleep_forever()


def beside(log: MemoryLog) -> MemoryLog:
    return MemoryLog(lease=LEASE * 2 / 3, beside=log)


async def logged(log: MemoryLog, conversation: str = "c") -> list[dict[str, Any]]:
    return [json.loads(entry.json) for entry in await log.read(f"local/{conversation}", 0, 10_000)]


def check(events: list[dict[str, Any]]) -> None:
    """What must hold of any conversation in which nothing goes on."""
    posts = [event["seq"] for event in events if event["type"] == "user_message"]
    started = [event["post_seq"] for event in events if event["type"] == "agent_started"]
    ended = Counter(event["run"] for event in events if event["type"] == "agent_completed")
    assert started == posts
    assert set(ended.values()) <= {1}
    assert len(ended) == len(posts)
    open_calls: set[str] = set()
    going_on = None
    for event in events:
        if event["type"] == "agent_started":
            assert going_on is None
            going_on = event["run"]
        elif "run" in event:
            assert event["run"] == going_on
        if event["type"] == "tool_executing":
            open_calls.add(event["call"])
        elif event["type"] == "tool_completed":
            open_calls.remove(event["call"])
        elif event["type"] == "agent_completed":
            assert not open_calls
            going_on = None


async def test_who_is_asked_elsewhere_sees_the_answer_as_it_comes(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(echo, log=log) as one, Chat(echo, log=beside(log)) as other:
        here, there = await connect(one), await connect(other)
        for client in (here, there):
            client.say("open", conversation="c")
            await client.hear_until("opened")
        for n in range(6):
            (here, there)[n % 2].say("post", id=f"p{n}", conversation="c", text=f"{n}")
        seen = []
        for client in (here, there):
            heard: list[dict[str, Any]] = []
            while sum(event["type"] == "agent_completed" for event in heard) < 6:
                heard.append(await client.hear())
            seen.append([event for event in heard if "seq" in event and "at" in event])
    assert seen[0] == seen[1] == await logged(log)
    check(seen[0])


async def test_an_instance_that_died_in_a_run_is_replaced_within_the_lease(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = MemoryLog(lease=LEASE * 2 / 3)
    async with Chat(stuck, ChatSettings(lease=LEASE), log) as dying:
        client = await connect(dying)
        client.say("open", conversation="c")
        client.say("post", id="p0", conversation="c", text="0")
        client.say("post", id="p1", conversation="c", text="1")
        await client.hear_until("tool_executing")
        async with Chat(echo, ChatSettings(lease=LEASE, linger=inf, abandon_after=inf), beside(log)) as heir:
            log.vanish()
            died = trio.current_time()
            follower = await connect(heir)
            follower.say("open", conversation="c")
            last = await follower.hear_until("agent_completed")
            assert last[-1]["outcome"] == "interrupted"
            assert last[-2]["type"] == "tool_completed"
            assert trio.current_time() - died <= LEASE
            assert (await follower.hear_until("agent_completed"))[-1]["outcome"] == "success"
            await trio.testing.wait_all_tasks_blocked()
            check(await logged(log))


async def test_who_was_thought_dead_says_nothing_more(
    connect: Connect, autojump_clock: trio.testing.MockClock, capfd: pytest.CaptureFixture[str]
) -> None:
    """It had only been away: its run is ended for it, and it does not end it again."""
    go_on, went_on = trio.Event(), trio.Event()

    async def slow(run: Run) -> None:
        await go_on.wait()
        await run.say("late")
        went_on.set()

    log = MemoryLog(lease=LEASE * 2 / 3)
    async with Chat(slow, ChatSettings(lease=LEASE, linger=inf, abandon_after=inf), log) as away:
        client = await connect(away)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_until("agent_started")
        log.vanish()
        async with Chat(echo, ChatSettings(lease=LEASE, linger=inf, abandon_after=inf), beside(log)):
            await trio.sleep(2 * LEASE)
            go_on.set()
            await trio.testing.wait_all_tasks_blocked()
            events = await logged(log)
    check(events)
    assert not went_on.is_set()
    assert [event["outcome"] for event in events if "outcome" in event] == ["interrupted"]
    assert "another instance has taken over a conversation" in capfd.readouterr().err


async def test_a_run_is_cancelled_from_another_instance(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(stuck, log=log) as one, Chat(stuck, log=beside(log)) as other:
        here, there = await connect(one), await connect(other)
        here.say("open", conversation="c")
        here.say("post", id="p", conversation="c", text="x")
        run = (await here.hear_until("tool_executing"))[-1]["run"]
        there.say("cancel", conversation="c", run="another")
        assert (await there.hear())["code"] == "not_found"
        there.say("cancel", conversation="c", run=run)
        assert (await here.hear_until("agent_completed"))[-1]["outcome"] == "cancelled"
        check(await logged(log))


async def test_who_moves_to_another_instance_keeps_the_run_going(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    async def long(run: Run) -> None:
        await trio.sleep(100)
        await run.say("done")

    log = MemoryLog()
    settings = ChatSettings(linger=10.0, abandon_after=10.0)
    async with Chat(long, settings, log) as one, Chat(long, settings, beside(log)) as other:
        here = await connect(one)
        here.say("open", conversation="c")
        here.say("post", id="p", conversation="c", text="x")
        await here.hear_until("agent_started")
        await here.leave()
        await trio.sleep(5)
        there = await connect(other)
        there.say("open", conversation="c")
        assert (await there.hear_until("agent_completed"))[-1]["outcome"] == "success"
        there.say("post", id="q", conversation="c", text="x")
        await there.hear_until("agent_started")
        await there.leave()
        await trio.sleep(50)
        assert (await logged(log))[-1]["outcome"] == "abandoned"
        check(await logged(log))


async def test_a_drain_leaves_what_waits_to_others(connect: Connect, autojump_clock: trio.testing.MockClock) -> None:
    log = MemoryLog()
    async with Chat(echo, ChatSettings(linger=inf, abandon_after=inf), beside(log)):
        async with Chat(stuck, log=log) as drained:
            client = await connect(drained)
            client.say("open", conversation="c")
            for n in range(3):
                client.say("post", id=f"p{n}", conversation="c", text=f"{n}")
            await client.hear_until("tool_executing")
            await client.hear_all()
            await drained.drain()
        await trio.sleep(LEASE)
        events = await logged(log)
    check(events)
    assert [event["outcome"] for event in events if "outcome" in event] == ["interrupted", "success", "success"]


async def test_what_a_process_left_is_answered_by_the_next(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = MemoryLog()
    async with Chat(stuck, log=log) as first:
        client = await connect(first)
        client.say("post", id="p0", conversation="c", text="0")
        client.say("post", id="p1", conversation="c", text="1")
        await client.hear_all()
        await first.drain()
    async with Chat(echo, log=log):
        await trio.sleep(1)
    check(await logged(log))


async def test_a_drain_hands_over_at_once_to_who_follows(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = MemoryLog()
    async with Chat(echo, log=beside(log)) as heir, Chat(stuck, log=log) as drained:
        client, follower = await connect(drained), await connect(heir)
        for id in "pq":
            client.say("post", id=id, conversation="c", text="x")
        await client.hear_all()
        follower.say("open", conversation="c")
        await follower.hear_all()
        await drained.drain()
        ends = [event["outcome"] for event in await follower.hear_all() if event["type"] == "agent_completed"]
    assert ends == ["interrupted", "success"]
    check(await logged(log))


async def test_however_many_an_instance_left_they_are_ended_within_the_lease(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log, conversations = MemoryLog(lease=LEASE * 2 / 3), 3 * LOOK_AT_ONCE + 1
    settings = ChatSettings(lease=LEASE, waiting_posts=conversations, user_runs=conversations, posts_per_minute=1000)
    async with Chat(stuck, settings, log) as dying, Chat(echo, settings, beside(log)):
        client = await connect(dying)
        for n in range(conversations):
            client.say("post", id="p", conversation=f"c{n}", text="x")
        await client.hear_all()
        log.vanish()
        await trio.sleep(LEASE)
        assert await log.unanswered(10) == []
        assert await logged(log, f"c{conversations - 1}")


# Lingering


async def test_who_left_elsewhere_has_the_time_to_come_back(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = MemoryLog()
    settings = ChatSettings(linger=10.0, abandon_after=10.0)
    async with Chat(stuck, settings, log) as one, Chat(stuck, settings, beside(log)) as other:
        here, there = await connect(one), await connect(other)
        here.say("post", id="p", conversation="c", text="x")
        await here.hear_all()
        there.say("open", conversation="c")
        await trio.sleep(19)  # the log has been asked at 10, and will be at 20
        await there.leave()
        await trio.sleep(9.5)
        assert (await logged(log))[-1]["type"] == "tool_executing"
        await trio.sleep(11)
        assert (await logged(log))[-1]["outcome"] == "abandoned"


async def test_without_lingering_a_run_ends_soon_after_the_last_has_left_anywhere(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = MemoryLog()
    settings = ChatSettings(linger=0.0, abandon_after=0.0)
    async with Chat(stuck, settings, log) as one, Chat(stuck, settings, beside(log)) as other:
        here, there = await connect(one), await connect(other)
        here.say("open", conversation="c")
        here.say("post", id="p", conversation="c", text="x")
        await here.hear_all()
        there.say("open", conversation="c")
        await there.hear_all()
        await here.leave()
        await trio.sleep(60)
        assert (await logged(log))[-1]["type"] == "tool_executing"
        await there.leave()
        await trio.sleep(1.5)
        assert (await logged(log))[-1]["outcome"] == "abandoned"


async def test_a_post_elsewhere_counts_from_when_it_came(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = MemoryLog()
    settings = ChatSettings(linger=10.0, abandon_after=10.0)
    async with Chat(stuck, settings, log) as one, Chat(stuck, settings, beside(log)) as other:
        here, there = await connect(one), await connect(other)
        here.say("post", id="p", conversation="c", text="x")
        await trio.sleep(9)
        there.say("post", id="q", conversation="c", text="x")
        await trio.sleep(9)
        assert not [event for event in await logged(log) if "outcome" in event]
        await trio.sleep(2)
        assert [event["outcome"] for event in await logged(log) if "outcome" in event] == ["abandoned"] * 2
        check(await logged(log))


async def test_what_was_not_heard_of_is_answered_before_the_lease_is_let_go(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = MemoryLog()
    settings = ChatSettings(linger=5.0, abandon_after=5.0)
    async with Chat(echo, settings, log) as one, Chat(echo, settings, other_log := beside(log)) as other:
        here, there = await connect(one), await connect(other)
        here.say("post", id="p", conversation="c", text="x")
        await here.hear_all()
        log._watchers.clear()
        there.say("post", id="q", conversation="c", text="x")
        await there.hear_all()
        assert (await logged(log))[-1]["type"] == "user_message"
        await trio.sleep(6)
        assert [event["outcome"] for event in await logged(log) if "outcome" in event] == ["success"] * 2
        await trio.sleep(6)
        assert await other_log.claim("local/c") is not None


# What is late, and what is lost


async def test_a_run_is_cancelled_of_which_the_news_are_on_their_way(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(stuck, log=log) as one, Chat(stuck, log=(late := beside(log))) as other:
        here, there = await connect(one), await connect(other)
        there.say("open", conversation="c")
        await there.hear_all()
        late._watchers.clear()
        here.say("open", conversation="c")
        here.say("post", id="p", conversation="c", text="x")
        run = (await here.hear_until("tool_executing"))[-1]["run"]
        there.say("cancel", conversation="c", run=run)
        assert (await here.hear_until("agent_completed"))[-1]["outcome"] == "cancelled"


async def test_who_follows_a_new_conversation_hears_while_the_lost_one_still_ends(connect: Connect) -> None:
    log, end = MemoryLog(), trio.Event()

    async def stubborn(run: Run) -> None:
        if run.message == "lost":
            with trio.CancelScope(shield=True):
                await end.wait()
        await run.say("x")

    async with Chat(stubborn, log=log) as one, Chat(echo, log=beside(log)) as other:
        client, elsewhere = await connect(one), await connect(other)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="lost")
        await client.hear_all()
        log.store.lose("local/c")
        client.say("post", id="q", conversation="c", text="x")
        await client.ended.wait()
        client = await connect(one)
        client.say("open", conversation="c")
        assert (await client.hear_all())[0]["head"] == 0
        end.set()
        await trio.testing.wait_all_tasks_blocked()
        elsewhere.say("post", id="r", conversation="c", text="x")
        await elsewhere.hear_all()
        assert [event["seq"] for event in await client.hear_all()] == [1, 2, 3, 4]


async def test_who_has_a_lease_of_before_the_loss_finds_out_when_others_answer(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(echo, log=log) as one, Chat(echo, log=beside(log)) as other:
        here, there = await connect(one), await connect(other)
        here.say("open", conversation="c")
        here.say("post", id="p", conversation="c", text="x")
        await here.hear_all()
        log.store.lose("local/c")
        for id in "qr":  # more than it had, so that it looks like the rest
            there.say("post", id=id, conversation="c", text="x")
        await there.hear_all()
        assert here.closed == (1012, "the log has lost its past")


async def test_what_is_written_before_the_log_is_watched_is_not_missed(connect: Connect) -> None:
    """A conversation is opened at once for who asks, and watched when the log has taken notice of that."""
    slow = trio.Event()

    class Slow(MemoryLog):
        async def watch(self, *what: Any) -> None:
            await slow.wait()
            await super().watch(*what)

    log = MemoryLog()
    async with Chat(echo, log=log) as one, Chat(echo, log=Slow(beside=log)) as other:
        here, there = await connect(one), await connect(other)
        there.say("open", conversation="c")
        await there.hear_until("opened")
        here.say("open", conversation="c")
        here.say("post", id="p", conversation="c", text="x")
        await here.hear_until("agent_completed")
        slow.set()
        with trio.fail_after(5):
            await there.hear_until("agent_completed")


async def test_who_comes_from_an_instance_that_knows_more_can_go_on(connect: Connect) -> None:
    """What a client has heard is in the log, whether or not the news of it have come to where it is now."""

    class Deaf(MemoryLog):
        async def watch(self, conversation: str, hear: Any) -> None:
            await super().watch(conversation, lambda *news: None)

    log = MemoryLog()
    async with Chat(echo, log=log) as one, Chat(echo, log=Deaf(beside=log)) as other:
        here, there = await connect(one), await connect(other)
        there.say("open", conversation="c")
        await there.hear_until("opened")
        await trio.testing.wait_all_tasks_blocked()
        here.say("open", conversation="c")
        here.say("post", id="p", conversation="c", text="x")
        last = (await here.hear_until("agent_completed"))[-1]["seq"]
        late = await connect(other)
        late.say("open", conversation="c", after=last)
        opened = await late.hear()
        assert (opened["type"], opened["head"]) == ("opened", last)


# A log that fails


class Failing(MemoryLog):
    """Does not answer while `error` is set."""

    immediate = False

    error: Exception | None = None
    hangs = False

    async def _may_fail(self) -> None:
        if self.hangs:
            await trio.sleep_forever()
        error = self.error
        await trio.lowlevel.checkpoint()
        if error is not None:
            raise error

    async def open(self, conversation: str) -> LogState:
        await self._may_fail()
        return await super().open(conversation)

    async def append(self, *what: Any, **how: Any) -> tuple[Entry, bool]:
        await self._may_fail()
        return await super().append(*what, **how)

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        await self._may_fail()
        return await super().read(conversation, after, limit)

    async def claim(self, conversation: str) -> Any:
        await self._may_fail()
        return await super().claim(conversation)


class Refusing(MemoryLog):
    """Does not answer one kind of question, `refused`; what was asked is done or not."""

    immediate = False

    refused = ""
    does = False


def _refusing(name: str) -> Callable[..., Awaitable[Any]]:
    async def method(self: Refusing, *what: Any, **how: Any) -> Any:
        if name != self.refused or self.does:
            done = await getattr(MemoryLog, name)(self, *what, **how)
        else:
            await trio.lowlevel.checkpoint()
        if name == self.refused:
            raise Unavailable("it is away")
        return done

    return method


QUESTIONS = ["open", "append", "read", "watch", "claim", "release", "attend", "attended", "unanswered"]
for question in QUESTIONS:
    setattr(Refusing, question, _refusing(question))


@pytest.mark.parametrize("does", [False, True])
@pytest.mark.parametrize("question", QUESTIONS)
async def test_a_question_that_is_not_answered_for_a_while_delays_and_loses_nothing(
    question: str, does: bool, connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = Refusing(lease=LEASE * 2 / 3)
    settings = ChatSettings(lease=LEASE, linger=5.0, abandon_after=5.0)
    async with Chat(echo, settings, log) as one, Chat(echo, settings, other_log := beside(log)) as other:
        here, there = await connect(one), await connect(other)
        log.refused, log.does = question, does
        here.say("open", conversation="c")
        here.say("post", id="p", conversation="c", text="x")
        there.say("post", id="q", conversation="c", text="x")
        await trio.sleep(20)
        log.refused = ""
        await trio.sleep(20)
        for client in (here, there):
            client.say("open", conversation="c")
        here.say("post", id="p", conversation="c", text="x")
        await trio.sleep(20)
        for client in (here, there):
            log.refused, log.does = question, does
            await client.leave()
            await trio.sleep(20)
            log.refused = ""
        await trio.sleep(20)
        check(await logged(log))
        assert not one._conversations
        assert not other._conversations
        assert await other_log.claim("local/c") is not None


async def test_the_end_of_a_chat_does_not_depend_on_its_log(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = Refusing()
    async with Chat(stuck, log=log) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_until("tool_executing")
        log.refused = "release"
    assert (await logged(log))[-1]["outcome"] == "interrupted"


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_post_that_the_log_cannot_take_is_told_and_made_certain_later(
    connect: Connect, autojump_clock: trio.testing.MockClock, hangs: bool
) -> None:
    log = Failing()
    async with Chat(echo, log=log) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        await client.hear_until("opened")
        log.hangs, log.error = hangs, Unavailable("it is away")
        client.say("post", id="p", conversation="c", text="x")
        error = (await client.hear_until("error"))[-1]
        assert (error["code"], error["ref"]) == ("unavailable", "p")
        log.hangs, log.error = False, None
        client.say("post", id="p", conversation="c", text="x")
        assert (await client.hear_until("agent_completed"))[-1]["outcome"] == "success"
    check(await logged(log))


async def test_a_run_whose_log_goes_away_has_its_end_when_it_is_back(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    log = Failing()

    async def agent(run: Run) -> None:
        log.error = Unavailable("it is away")
        await run.say("nobody hears this")

    async with Chat(agent, log=log) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_until("agent_started")
        await trio.sleep(20)
        log.error = None
        assert (await client.hear_until("agent_completed"))[-1]["outcome"] == "interrupted"
    check(await logged(log))


async def test_a_reader_goes_on_when_the_log_is_back(connect: Connect, autojump_clock: trio.testing.MockClock) -> None:
    log = Failing()
    epoch = (await log.open("local/c")).epoch
    for n in range(1000):
        await log.append("local/c", epoch, Append(AgentThinking(conversation="c", seq=0, at=0.0, run="r", text=f"{n}")))
    async with Chat(echo, log=log) as chat:
        client = await connect(chat)
        client.stop_reading()
        client.say("open", conversation="c")
        await trio.testing.wait_all_tasks_blocked()
        log.error = Unavailable("it is away")
        client.readable.set()
        await trio.sleep(5)
        log.error = None
        heard = [event["seq"] for event in await client.hear_until("heartbeat") if "at" in event]
    assert heard == list(range(1, 1001))


async def test_a_bug_of_an_engine_holds_up_one_conversation(
    connect: Connect, autojump_clock: trio.testing.MockClock, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Failing()
    async with Chat(echo, log=log) as chat:
        client = await connect(chat)
        log.error = ValueError("a bug")
        client.say("post", id="p", conversation="c", text="x")
        assert (await client.hear_until("error"))[-1]["code"] == "internal"
        log.error = None
        client.say("post", id="p", conversation="d", text="x")
        await client.hear_until("posted")
    assert "a bug" in capfd.readouterr().err


async def test_who_follows_a_lost_conversation_starts_over(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(echo, log=log) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_until("agent_completed")
        log.store.lose("local/c")
        client.say("post", id="q", conversation="c", text="x")
        await client.ended.wait()
        assert client.closed == (1012, "the log has lost its past")
        again = await connect(chat)
        again.say("open", conversation="c", after=4, epoch="of old")
        again.say("post", id="q", conversation="c", text="x")
        events = await again.hear_until("agent_completed")
    assert [event["seq"] for event in events if "at" in event] == [1, 2, 3, 4]


async def test_a_conversation_that_is_lost_while_nobody_posts(connect: Connect) -> None:
    log = MemoryLog()
    async with Chat(echo, log=log) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_until("agent_completed")
        log.store.lose("local/c")
        log._watchers["local/c"](0, "")  # what an engine tells after a restart
        await client.ended.wait()
    assert client.closed == (1012, "the log has lost its past")


async def test_retention_that_overtakes_a_reader_is_told(connect: Connect) -> None:
    log = MemoryLog()
    epoch = (await log.open("local/c")).epoch
    for n in range(600):
        await log.append("local/c", epoch, Append(AgentThinking(conversation="c", seq=0, at=0.0, run="r", text=f"{n}")))
    async with Chat(echo, log=log) as chat:
        client = await connect(chat)
        client.stop_reading()
        client.say("open", conversation="c")
        await trio.testing.wait_all_tasks_blocked()
        past = log.store.conversations["local/c"]
        while past.entries[0].entry.seq < 500:
            past.entries.popleft()
        client.readable.set()
        heard = await client.hear_all()
    seqs = [event["seq"] for event in heard if "at" in event]
    assert seqs == [*range(1, 257), *range(500, 601)]
    assert [event["first"] for event in heard if event["type"] == "opened" and "first" in event] == [500]
