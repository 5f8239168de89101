"""What conversations keep of their logs in memory, together."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tricorn.chat import Chat, Run
from tricorn.chat.conversation.log_view import LogView
from tricorn.chat.conversation.tails import ENTRY_BYTES, Tails
from tricorn.chat.logs.base import Append, Entry
from tricorn.chat.logs.memory import MemoryLog
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.protocol import UserMessage
from tricorn.chat.quota import Quota
from tricorn.chat.settings import ChatSettings

TEXT = "x" * 1000


class CountingLog(MemoryLog):
    """Counts how often it is read."""

    reads = 0

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        self.reads += 1
        return await super().read(conversation, after, limit)


async def a_view(key: str, log: MemoryLog, tails: Tails) -> LogView:
    view = LogView(key, log, 10.0, ChatMetrics())
    view.share(tails)
    await view.open()
    return view


async def add(view: LogView) -> int:
    """Append, and return how much memory an entry takes."""
    event = UserMessage(conversation="c", seq=0, at=0.0, id="p", user="u", text=TEXT)
    entry, _ = await view.append(Append(event))
    return len(entry.json) + ENTRY_BYTES


async def test_the_one_that_was_read_least_recently_goes_first() -> None:
    log, tails = CountingLog(), Tails(budget=10**9)
    first, second, third = [await a_view(key, log, tails) for key in ("a/1", "a/2", "a/3")]
    for view in (first, second, third):
        await add(view)
    assert first.in_memory(0)  # now the second one was read least recently
    tails.budget = tails.size + 500
    await add(third)
    assert second.in_memory(0) is None
    assert first.in_memory(0)
    assert third.in_memory(0)
    assert log.reads == 0
    [entry] = await second.read(0, 10)
    assert entry.seq == 1
    assert log.reads == 1


async def test_they_stay_within_the_budget_and_all_entries_can_be_read() -> None:
    log, tails = CountingLog(), Tails(budget=20_000)
    views = [await a_view(f"a/{n}", log, tails) for n in range(10)]
    for _ in range(50):
        for view in views:
            await add(view)
            assert 0 < tails.size <= 20_000
    for view in views:
        assert [entry.seq for entry in await view.read(0, 100)] == list(range(1, 51))


async def test_a_tail_that_begins_again_is_kept() -> None:
    log, tails = CountingLog(), Tails(budget=2500)
    one, other = await a_view("a/1", log, tails), await a_view("a/2", log, tails)
    for view in (one, other, one, one):
        await add(view)
    assert one.in_memory(1) is None
    assert one.in_memory(2)
    assert other.in_memory(0)


async def test_an_entry_that_is_larger_than_the_budget_is_read_from_the_log() -> None:
    log, tails = CountingLog(), Tails(budget=500)
    view = await a_view("a/1", log, tails)
    await add(view)
    assert tails.size == 0
    assert [entry.seq for entry in await view.read(0, 10)] == [1]
    assert log.reads == 1


async def test_what_is_dropped_for_its_number_no_longer_counts() -> None:
    log, tails = CountingLog(), Tails()
    view = await a_view("a/1", log, tails)
    sizes = [await add(view) for _ in range(1000)]
    kept = view.in_memory(800)
    assert kept is not None
    assert tails.size < 257 * max(sizes)
    view.unshare()
    assert tails.size == 0


@pytest.mark.parametrize("conversations", [1, 20])
async def test_conversations_that_have_ended_count_no_longer(
    conversations: int, autojump_clock: trio.testing.MockClock
) -> None:
    async def echo(run: Run) -> None:
        await run.say(run.message)

    async with Chat(echo, ChatSettings(linger=1.0)) as chat:
        by = Quota("u", chat.settings)
        for n in range(conversations):
            await chat.conversation(f"u/{n}").post("p", "x", by)
        await trio.testing.wait_all_tasks_blocked()
        assert chat._tails.size > 400 * conversations
        await trio.sleep(10)
        assert not chat._conversations
        assert chat._tails.size == 0
