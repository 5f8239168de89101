"""A conversation: its order, its life, and those who follow it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from tricorn.chat.conversation.conversation import Conversation, ConversationClosed, TooManyPosts
from tricorn.chat.conversation.log_view import TAIL
from tricorn.chat.execution import Runs
from tricorn.chat.logs.base import Append, Entry, LogState, PastLost
from tricorn.chat.logs.memory import MemoryLog
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.protocol import AgentThinking
from tricorn.chat.quota import Quota
from tricorn.chat.run import Agent, Run
from tricorn.chat.settings import ChatSettings
from tricorn.waiter import Waiter


class WatchedLog(MemoryLog):
    """Counts what it is asked, and can be held up or fail."""

    immediate = False

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.error: Exception | None = None
        self.hangs = False  # when it is asked where a conversation stands
        self.gate = trio.Event()
        self.gate.set()

    async def open(self, conversation: str) -> LogState:
        if self.hangs:
            await trio.sleep_forever()
        if self.error is not None:
            raise self.error
        return await super().open(conversation)

    async def append(self, *what: Any, **how: Any) -> tuple[Entry, bool]:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return await super().append(*what, **how)

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        self.reads += 1
        return await super().read(conversation, after, limit)


@pytest.fixture
def log() -> WatchedLog:
    return WatchedLog()


@pytest.fixture
def begin(nursery: trio.Nursery, log: WatchedLog) -> Callable[..., Conversation]:
    def begin(agent: Agent, **settings: Any) -> Conversation:
        conversation = Conversation("c", agent, log, ChatSettings(**settings), ChatMetrics(), Runs(nursery))
        nursery.start_soon(conversation.live)
        return conversation

    return begin


Begin = Callable[..., Conversation]


def local() -> Quota:
    return Quota("local", ChatSettings())


async def events(log: MemoryLog) -> list[dict[str, Any]]:
    return [json.loads(entry.json) for entry in await log.read("c", 0, 10_000)]


async def types(log: MemoryLog) -> list[str]:
    return [event["type"] for event in await events(log)]


async def echo(run: Run) -> None:
    await run.say(run.message)


async def sleeper(run: Run) -> None:
    await trio.sleep_forever()


def event(text: str = "x", key: str | None = None) -> Append:
    """One that nobody has to answer."""
    return Append(AgentThinking(conversation="c", seq=0, at=0.0, run="r", text=text), key)


# Posts and runs


async def test_posts_are_answered_in_order_one_at_a_time(
    begin: Begin, log: WatchedLog, autojump_clock: trio.testing.MockClock
) -> None:
    async def slow(run: Run) -> None:
        await trio.sleep(3 - len(run.message))
        await run.say(run.message)

    conversation = begin(slow)
    for n in range(3):
        await conversation.post(f"p{n}", "x" * n, local())
    await trio.sleep(10)
    logged = await events(log)
    assert [event["post"] for event in logged if event["type"] == "agent_started"] == ["p0", "p1", "p2"]
    runs = [event["run"] for event in logged if "run" in event]
    assert runs == sorted(runs, key=runs.index)  # no two runs are mixed
    assert [event["seq"] for event in logged] == list(range(1, len(logged) + 1))


async def test_a_repeated_post_gets_the_first_answer_and_no_second_run(begin: Begin, log: WatchedLog) -> None:
    conversation = begin(echo)
    seq = await conversation.post("p", "one", local())
    await trio.testing.wait_all_tasks_blocked()
    assert await conversation.post("p", "two", local()) == seq
    await trio.testing.wait_all_tasks_blocked()
    assert await types(log) == ["user_message", "agent_started", "agent_message", "agent_completed"]


async def test_a_run_that_fails_leaves_the_next_alone(begin: Begin, log: WatchedLog) -> None:
    async def agent(run: Run) -> None:
        if run.message == "fail":
            raise ValueError
        await run.say("fine")

    conversation = begin(agent)
    await conversation.post("p1", "fail", local())
    await conversation.post("p2", "go", local())
    await trio.testing.wait_all_tasks_blocked()
    outcomes = [event["outcome"] for event in await events(log) if event["type"] == "agent_completed"]
    assert outcomes == ["failed", "success"]


async def test_a_run_that_breaks_by_itself_is_reported_and_leaves_the_next_alone(
    begin: Begin, log: WatchedLog, capfd: pytest.CaptureFixture[str], autojump_clock: trio.testing.MockClock
) -> None:
    class Agents:
        """Its name cannot even be asked for."""

        broken = True

        @property
        def __name__(self) -> str:
            if self.broken:
                raise ValueError("no name")
            return "agents"

        async def __call__(self, run: Run) -> None:
            await run.say("fine")

    agents = Agents()
    conversation = begin(agents)
    await conversation.post("p1", "one", local())
    await trio.testing.wait_all_tasks_blocked()
    assert "no name" in capfd.readouterr().err
    agents.broken = False
    await conversation.post("p2", "two", local())
    await trio.sleep(10)  # it has nothing in the log, so it is tried again
    assert [event["outcome"] for event in await events(log) if "outcome" in event] == ["success"] * 2


async def test_only_the_run_that_goes_on_can_be_cancelled(begin: Begin, log: WatchedLog) -> None:
    conversation = begin(sleeper)
    assert not await conversation.cancel("r")
    await conversation.post("p", "x", local())
    await trio.testing.wait_all_tasks_blocked()
    run = (await events(log))[-1]["run"]
    assert not await conversation.cancel("other")
    assert await conversation.cancel(run)
    await trio.testing.wait_all_tasks_blocked()
    assert (await events(log))[-1]["outcome"] == "cancelled"
    assert not await conversation.cancel(run)


async def test_a_run_has_run_timeout_seconds(
    begin: Begin, log: WatchedLog, autojump_clock: trio.testing.MockClock
) -> None:
    conversation = begin(sleeper, run_timeout=5.0)
    await conversation.post("p", "x", local())
    await trio.sleep(6)
    assert (await events(log))[-1]["outcome"] == "timeout"


# Its life


async def test_it_lingers_and_ends(begin: Begin, log: WatchedLog, autojump_clock: trio.testing.MockClock) -> None:
    conversation = begin(echo, linger=30.0)
    await conversation.post("p", "x", local())
    await trio.sleep(29)
    assert not conversation.over
    await trio.sleep(2)
    assert conversation.ended.is_set()
    assert conversation.over


@pytest.mark.parametrize(
    ("abandon_after", "outcome"), [(0.0, "abandoned"), (600.0, "abandoned"), (math.inf, "success")]
)
async def test_runs_go_on_for_so_long_with_nobody_there(
    begin: Begin, log: WatchedLog, autojump_clock: trio.testing.MockClock, abandon_after: float, outcome: str
) -> None:
    async def long(run: Run) -> None:
        await trio.sleep(1000)

    conversation = begin(long, abandon_after=abandon_after, run_timeout=math.inf)
    for n in range(2):
        await conversation.post(f"p{n}", "x", local())
    await trio.sleep(max(0, min(abandon_after, 2000) - 1))
    assert not conversation.over
    await trio.sleep(62)  # and then two times `linger`
    assert [event["outcome"] for event in await events(log) if event["type"] == "agent_completed"] == [outcome] * 2
    assert conversation.ended.is_set()


async def test_who_comes_back_in_time_cancels_nothing(
    begin: Begin, log: WatchedLog, autojump_clock: trio.testing.MockClock
) -> None:
    async def long(run: Run) -> None:
        await trio.sleep(100)

    conversation = begin(long, abandon_after=30.0)
    await conversation.post("p", "x", local())
    await trio.sleep(29)
    follower = Waiter()
    conversation.attach(follower)
    await trio.sleep(100)
    assert (await events(log))[-1]["outcome"] == "success"
    conversation.detach(follower)


async def test_it_lives_while_somebody_follows_it(begin: Begin, autojump_clock: trio.testing.MockClock) -> None:
    conversation = begin(echo, linger=1.0)
    followers = [Waiter(), Waiter()]
    for follower in followers:
        conversation.attach(follower)
    await trio.sleep(100)
    conversation.detach(followers[0])
    await trio.sleep(100)
    assert not conversation.over
    conversation.detach(followers[1])
    await conversation.ended.wait()
    assert trio.current_time() == pytest.approx(201)


async def test_a_post_on_its_way_into_the_log_keeps_it_alive(
    begin: Begin, log: WatchedLog, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    conversation = begin(echo, linger=1.0, log_timeout=math.inf)
    await conversation.post("first", "x", local())
    await trio.testing.wait_all_tasks_blocked()
    log.gate = trio.Event()
    nursery.start_soon(conversation.post, "p", "x", local())
    await trio.sleep(100)
    log.gate.set()
    await trio.testing.wait_all_tasks_blocked()
    assert (await types(log)).count("agent_completed") == 2
    assert not conversation.over


async def test_its_end_interrupts_the_run_and_leaves_to_others_what_waits(begin: Begin, log: WatchedLog) -> None:
    conversation = begin(sleeper)
    for n in range(3):
        await conversation.post(f"p{n}", "x", local())
    await trio.testing.wait_all_tasks_blocked()
    conversation.end()
    await conversation.ended.wait()
    logged = await events(log)
    assert [event["post"] for event in logged if event["type"] == "agent_started"] == ["p0"]
    assert [event["outcome"] for event in logged if event["type"] == "agent_completed"] == ["interrupted"]
    assert await log.unanswered(10) == ["c"]
    with pytest.raises(ConversationClosed):
        await conversation.post("p3", "x", local())


async def test_who_has_too_many_posts_waiting_is_refused_until_one_is_answered(begin: Begin, log: WatchedLog) -> None:
    conversation, ann = begin(sleeper, user_runs=2), local()
    seq = await conversation.post("p0", "x", ann)
    await conversation.post("p1", "x", ann)
    with pytest.raises(TooManyPosts, match="2 of your posts are not answered yet") as caught:
        await conversation.post("p2", "x", ann)
    assert caught.value.limit == "user_runs"
    assert await conversation.post("p0", "x", ann) == seq  # it is in the log
    await conversation.post("of another", "x", Quota("bob", ChatSettings()))
    await trio.testing.wait_all_tasks_blocked()
    assert await conversation.cancel(next(event["run"] for event in await events(log) if "run" in event))
    await trio.testing.wait_all_tasks_blocked()
    assert ann.runs == 1
    await conversation.post("p2", "x", ann)


async def test_only_so_many_posts_wait(begin: Begin) -> None:
    conversation = begin(sleeper, waiting_posts=1)
    await conversation.post("goes on", "x", local())
    await trio.testing.wait_all_tasks_blocked()
    await conversation.post("waits", "x", local())
    with pytest.raises(TooManyPosts, match="1 posts wait in this conversation") as caught:
        await conversation.post("too many", "x", local())
    assert caught.value.limit == "waiting_posts"


async def test_what_is_not_posted_does_not_count(
    begin: Begin, log: WatchedLog, autojump_clock: trio.testing.MockClock
) -> None:
    conversation, ann = begin(sleeper), local()
    log.gate = trio.Event()
    with trio.move_on_after(1):
        await conversation.post("cancelled", "x", ann)
    log.gate.set()
    log.error = OSError("the disk is gone")
    with pytest.raises(OSError, match="the disk is gone"):
        await conversation.post("failed", "x", ann)
    log.error = None
    assert ann.runs == 0
    await conversation.post("p", "x", ann)
    await conversation.post("p", "repeated", ann)
    assert ann.runs == 1


async def test_its_cancellation_does_the_same(log: WatchedLog) -> None:
    async with trio.open_nursery() as nursery:
        conversation = Conversation("c", sleeper, log, ChatSettings(), ChatMetrics(), Runs(nursery))
        nursery.start_soon(conversation.live)
        for n in range(2):
            await conversation.post(f"p{n}", "x", local())
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    outcomes = [event["outcome"] for event in await events(log) if event["type"] == "agent_completed"]
    assert outcomes == ["interrupted"]
    assert await log.unanswered(10) == ["c"]
    assert conversation.ended.is_set()
    with pytest.raises(ConversationClosed):
        await conversation.post("late", "x", local())


async def test_a_post_on_its_way_at_the_end_is_left_to_others(
    begin: Begin, log: WatchedLog, nursery: trio.Nursery
) -> None:
    conversation = begin(sleeper)
    log.gate = trio.Event()
    nursery.start_soon(conversation.post, "p", "x", local())
    await trio.testing.wait_all_tasks_blocked()
    conversation.end()
    await trio.testing.wait_all_tasks_blocked()
    log.gate.set()
    await conversation.ended.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert await types(log) == ["user_message"]
    assert await log.unanswered(10) == ["c"]


async def test_a_log_that_stalls_holds_the_end_only_so_long(
    begin: Begin, log: WatchedLog, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    conversation = begin(sleeper)
    for n in range(5):
        await conversation.post(f"p{n}", "x", local())
    await trio.testing.wait_all_tasks_blocked()
    log.gate = trio.Event()
    conversation.end()
    await conversation.ended.wait()
    assert trio.current_time() <= 6


# Those who follow it


class Follower(Waiter):
    """Counts how often it is woken."""

    woken = 0

    def wake(self) -> None:
        self.woken += 1


async def test_an_append_wakes_a_follower_that_has_read_everything_once(begin: Begin) -> None:
    conversation = begin(echo)
    await conversation.view.open()
    follower = Follower()
    conversation.attach(follower)
    assert follower.woken == 0
    await conversation.view.append(event("x", "k"))
    assert follower.woken == 1
    await conversation.view.append(event())  # it knows already that there is something
    assert follower.woken == 1
    conversation.view.rest(follower)
    await conversation.view.append(event("x", "k"))  # a repetition is no news
    assert follower.woken == 1
    await conversation.view.append(event())
    assert follower.woken == 2
    conversation.view.rest(follower)
    conversation.detach(follower)
    await conversation.view.append(event())
    assert follower.woken == 2


async def test_a_follower_that_has_read_everything_is_woken_when_the_log_has_lost_entries(
    begin: Begin, log: WatchedLog
) -> None:
    conversation = begin(echo)
    await conversation.view.open()
    await conversation.view.append(event())
    followers = [Follower(), Follower()]
    for follower in followers:
        conversation.attach(follower)
    await conversation.view.append(event())
    conversation.view.rest(followers[0])  # the other one is reading, and finds out when it looks for more
    log.store.lose("c")
    with pytest.raises(PastLost):
        await conversation.look()
    await conversation.ended.wait()
    assert conversation.view.lost
    assert [follower.woken for follower in followers] == [2, 1]


async def test_followers_are_told_of_a_loss_that_a_run_finds_while_the_log_cannot_be_asked(
    begin: Begin, log: WatchedLog
) -> None:
    async def agent(run: Run) -> None:
        log.store.lose("c")
        log.hangs = True
        await run.say("into another epoch")

    conversation, follower = begin(agent), Follower()
    conversation.attach(follower)
    await conversation.post("p", "x", local())
    await conversation.ended.wait()
    assert conversation.view.lost
    assert conversation.over
    with pytest.raises(PastLost):
        await conversation.post("q", "x", local())


async def test_the_log_is_asked_where_it_stands_once(begin: Begin, log: WatchedLog) -> None:
    epoch, *_ = await log.open("c")
    entry, _ = await log.append("c", epoch, event())
    conversation = begin(echo)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(conversation.view.open)
    assert conversation.view.epoch
    assert conversation.view.head == entry.seq
    log.error = OSError()
    await conversation.view.open()


async def test_a_log_that_cannot_be_opened_is_asked_again(begin: Begin, log: WatchedLog) -> None:
    conversation = begin(echo)
    log.error = OSError()
    with pytest.raises(OSError):  # noqa: PT011
        await conversation.view.open()
    log.error = None
    await conversation.view.open()
    assert conversation.view.epoch


async def test_who_keeps_up_is_served_without_the_log(begin: Begin, log: WatchedLog) -> None:
    conversation = begin(echo)
    await conversation.view.open()
    for n in range(2 * TAIL + 10):
        await conversation.view.append(event(str(n)))
    recent = await conversation.view.read(TAIL + 1, 5)
    assert [entry.seq for entry in recent] == list(range(TAIL + 2, TAIL + 7))
    assert await conversation.view.read(2 * TAIL + 10, 5) == []
    assert log.reads == 0
    old = await conversation.view.read(TAIL, 5)
    assert [entry.seq for entry in old] == list(range(TAIL + 1, TAIL + 6))
    assert log.reads == 1
    assert old[1:] == recent[:4]
    assert old[1].json is recent[0].json  # encoded once


async def test_it_goes_on_where_the_log_stands(begin: Begin, log: WatchedLog) -> None:
    epoch, *_ = await log.open("c")
    for n in range(3):
        await log.append("c", epoch, event(str(n)))
    conversation = begin(echo)
    await conversation.view.open()
    assert [entry.seq for entry in await conversation.view.read(1, 10)] == [2, 3]
    await conversation.view.append(event())
    assert [entry.seq for entry in await conversation.view.read(1, 10)] == [2, 3, 4]
    assert [entry.seq for entry in await conversation.view.read(3, 10)] == [4]


async def test_what_others_write_into_the_log_is_not_skipped(begin: Begin, log: WatchedLog) -> None:
    conversation = begin(echo)
    await conversation.view.open()
    await conversation.view.append(event("1"))
    await log.append("c", conversation.view.epoch, event("2"))
    await conversation.view.append(event("3"))
    assert conversation.view.head == 3
    assert [json.loads(entry.json)["text"] for entry in await conversation.view.read(0, 10)] == ["1", "2", "3"]


async def test_a_failed_append_disturbs_nobody(begin: Begin, log: WatchedLog) -> None:
    conversation = begin(echo)
    await conversation.view.open()
    log.error = OSError("full")
    with pytest.raises(OSError, match="full"):
        await conversation.view.append(event())
    log.error = None
    await conversation.view.append(event())
    assert conversation.view.head == 1


async def test_appends_keep_their_order(begin: Begin, log: WatchedLog) -> None:
    conversation = begin(echo)
    await conversation.view.open()
    async with trio.open_nursery() as nursery:
        for n in range(20):
            nursery.start_soon(conversation.view.append, event(str(n)))
    assert [entry.seq for entry in await conversation.view.read(0, 100)] == list(range(1, 21))
