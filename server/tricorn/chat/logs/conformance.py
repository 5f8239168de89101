"""What every log promises, as tests: for our engines, and for one of your own.

Each of `CASES` is an async function that takes a `Stores`. Run it under Trio: it raises AssertionError if the log
breaks a promise. With pytest-trio::

    @pytest.mark.parametrize("case", conformance.CASES, ids=lambda case: case.__name__)
    async def test_conformance(case, my_stores):
        await case(my_stores)

Run `SHARED_CASES` too if several instances can share your log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from itertools import count
from json import loads
from typing import Any, Protocol

import trio

from tricorn.chat.logs.base import KEEP_EVERYTHING, Append, Entry, Lease, LeaseLost, Log, PastLost, Retention
from tricorn.chat.protocol import AgentAsked, AgentCompleted, AgentThinking, AskOutcome, ToolExecuting, UserMessage

LEASE = 1.0  # seconds that leases hold in these tests


class Stores(Protocol):
    """What the tests need from an engine: a store, new for each test, and instances that share it."""

    def connect(self, retention: Retention = KEEP_EVERYTHING) -> AbstractAsyncContextManager[Log]:
        """Return the log of another instance, whose leases hold for `LEASE` seconds."""

    async def vanish(self, log: Log) -> None:
        """End an instance as `kill -9` does: it releases and renews nothing. The test leaves its block later."""


def post(text: str = "hello", id: str = "p") -> UserMessage:
    return UserMessage(conversation="c", seq=0, at=0.0, id=id, user="ann", text=text)


def thought(text: str) -> AgentThinking:
    return AgentThinking(conversation="c", seq=0, at=0.0, run="r", text=text)


def completed(run: str = "r") -> AgentCompleted:
    return AgentCompleted(conversation="c", seq=0, at=0.0, run=run, outcome="success", seconds=0.5)


class _Told:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.head = 0
        self.cancelled = ""
        self.times = 0
        self._changed = trio.Event()

    def hear(self, head: int, cancelled: str) -> None:
        self.head, self.cancelled = head, cancelled
        self.times += 1
        self._changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed = trio.Event()
            with trio.fail_after(10):
                await self._changed.wait()


async def _claimed(log: Log, conversation: str = "c") -> Lease:
    lease = await log.claim(conversation)
    assert lease is not None
    return lease


async def _claim_when_free(log: Log, conversation: str = "c") -> Lease:
    with trio.fail_after(10 * LEASE):
        while True:
            lease = await log.claim(conversation)
            if lease is not None:
                return lease
            await trio.sleep(LEASE / 20)


async def _fill(log: Log, number: int, conversation: str = "c") -> list[Entry]:
    """Append posts that are answered at once, so that nothing is due afterwards."""
    epoch = (await log.open(conversation)).epoch
    lease = await _claimed(log, conversation)
    entries = []
    for n in range(number // 2):
        entry, _ = await log.append(conversation, epoch, Append(post(str(n), f"p{n}"), f"post:{n}"))
        entries.append(entry)
        last, _ = await log.append(conversation, epoch, Append(completed(f"r{n}"), lease=lease, answered=entry.seq))
        entries.append(last)
    assert await log.release(conversation, lease)
    return entries


# One instance


async def a_new_conversation_is_empty_and_keeps_its_epoch(stores: Stores) -> None:
    async with stores.connect() as log:
        await log.check()
        epoch, first, head, answered = await log.open("c")
        assert (first, head, answered) == (1, 0, 0)
        assert await log.open("c") == (epoch, 1, 0, 0)
        assert (await log.open("d")).epoch != epoch
        assert await log.read("c", 0, 10) == []
        assert await log.find("c", "k") is None


async def append_sets_seq_and_time_and_encodes(stores: Stores) -> None:
    async with stores.connect() as log:
        epoch = (await log.open("c")).epoch
        first, repeated = await log.append("c", epoch, Append(post("one")))
        second, _ = await log.append("c", epoch, Append(post('two ☃ "seq":0 \\ \0 \'')))
        assert (first.seq, repeated, second.seq) == (1, False, 2)
        event = loads(second.json)
        assert event.pop("at") > 1_700_000_000
        assert event == {
            "type": "user_message",
            "conversation": "c",
            "seq": 2,
            "id": "p",
            "user": "ann",
            "text": 'two ☃ "seq":0 \\ \0 \'',
        }
        assert (await log.open("c"))[1:] == (1, 2, 0)
        assert await log.read("c", 0, 10) == [first, second]


async def conversations_are_kept_apart(stores: Stores) -> None:
    keys = ["ann/c", "/c", "bob/c", "ann/C", "ann%2Fc", "a_n/c", "ann/c/", "ann/c:d", "ünn/c", "ann/*", "ann/{c}"]
    async with stores.connect() as log:
        for key in keys:
            epoch = (await log.open(key)).epoch
            entry, _ = await log.append(key, epoch, Append(post(key), "k"))
            assert entry.seq == 1
        for key in keys:
            (entry,) = await log.read(key, 0, 10)
            assert loads(entry.json)["text"] == key


async def a_repeated_key_returns_the_first_entry(stores: Stores) -> None:
    async with stores.connect() as log:
        epoch = (await log.open("c")).epoch
        first, _ = await log.append("c", epoch, Append(post("one"), "k"))
        await log.append("c", epoch, Append(post("two"), "l"))
        second, _ = await log.append("c", epoch, Append(post("three"), "m"))
        assert await log.append("c", epoch, Append(post("other"), "k")) == (first, True)
        assert await log.append("c", epoch, Append(post("other"), "m")) == (second, True)
        assert await log.find("c", "k") == first
        assert (await log.open("c")).head == 3
        other = (await log.open("d")).epoch
        assert not (await log.append("d", other, Append(post("one"), "k")))[1]


async def read_returns_following_entries_up_to_the_limit(stores: Stores) -> None:
    async with stores.connect() as log:
        entries = await _fill(log, 10)
        assert [entry.seq for entry in entries] == list(range(1, 11))
        assert await log.read("c", 0, 100) == entries
        assert await log.read("c", 2, 2) == entries[2:4]
        assert await log.read("c", 9, 2) == entries[9:]
        assert await log.read("c", 10, 10) == []
        assert await log.read("c", 99, 10) == []


async def returned_lists_belong_to_the_caller(stores: Stores) -> None:
    async with stores.connect() as log:
        await _fill(log, 2)
        (await log.read("c", 0, 10)).clear()
        assert len(await log.read("c", 0, 10)) == 2


async def appends_of_many_tasks_have_no_gaps(stores: Stores) -> None:
    entries: dict[str, list[Entry]] = {}

    async def write(key: str, epoch: str, n: int) -> None:
        entry, _ = await log.append(key, epoch, Append(post(f"{n}", f"p{n}"), f"{n}"))
        entries[key].append(entry)

    async with stores.connect() as log:
        async with trio.open_nursery() as nursery:
            for key in ("a", "b", "c"):
                entries[key] = []
                epoch = (await log.open(key)).epoch
                for n in range(50):
                    nursery.start_soon(write, key, epoch, n)
        for key, expected in entries.items():
            assert await log.read(key, 0, 100) == sorted(expected)
            assert [entry.seq for entry in sorted(expected)] == list(range(1, 51))


async def a_long_event_fits(stores: Stores) -> None:
    async with stores.connect() as log:
        epoch = (await log.open("c")).epoch
        entry, _ = await log.append("c", epoch, Append(post("x" * 200_000)))
        assert await log.read("c", 0, 1) == [entry]
        assert len(entry.json) > 200_000


async def an_event_that_is_not_json_is_refused_and_leaves_no_gap(stores: Stores) -> None:
    async with stores.connect() as log:
        epoch = (await log.open("c")).epoch
        lease = await _claimed(log)
        bad = ToolExecuting(conversation="c", seq=0, at=0.0, run="r", call="1", tool="t", arguments={"x": object()})
        await _refused(TypeError, log.append("c", epoch, Append(bad, "k", lease=lease)))
        await _refused(UnicodeEncodeError, log.append("c", epoch, Append(thought("\ud800"), lease=lease)))
        assert (await log.append("c", epoch, Append(post("one"), "k")))[0].seq == 1


async def a_cancelled_append_is_made_certain_by_its_key(stores: Stores) -> None:
    async with stores.connect() as log:
        epoch = (await log.open("c")).epoch
        with trio.CancelScope() as scope:
            scope.cancel()
            await log.append("c", epoch, Append(post("one"), "k"))
        assert scope.cancelled_caught
        for turns in range(8):  # cancelled later each time
            async with trio.open_nursery() as nursery:
                nursery.start_soon(log.append, "c", epoch, Append(post("one"), f"k{turns}"))
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        entries = [
            (await log.append("c", epoch, Append(post("one"), key)))[0] for key in ("k", *(f"k{n}" for n in range(8)))
        ]
        assert await log.read("c", 0, 100) == sorted(entries)
        assert {entry.seq for entry in entries} == set(range(1, 10))


async def it_works_until_its_block_is_left_even_if_cancelled(stores: Stores) -> None:
    entries = []
    with trio.CancelScope() as around:
        async with stores.connect() as log:
            epoch = (await log.open("c")).epoch
            around.cancel()
            with trio.fail_after(10, shield=True):
                entries.append((await log.append("c", epoch, Append(post("last words"))))[0])
    async with stores.connect() as log:
        assert await log.read("c", 0, 10) == entries
        assert len(entries) == 1


async def an_append_with_another_epoch_is_refused(stores: Stores) -> None:
    async with stores.connect() as log:
        await log.open("c")
        await _refused(PastLost, log.append("c", "another", Append(post())))
        assert (await log.open("c")).head == 0


async def entries_outlive_the_instance(stores: Stores) -> None:
    async with stores.connect() as keeper:
        shared = keeper.shared
        before = await keeper.open("c")
        entry, _ = await keeper.append("c", before.epoch, Append(post("one"), "k"))
        if shared:
            await _outlived(stores, before.epoch, entry)
    if not shared:
        await _outlived(stores, before.epoch, entry)


async def _outlived(stores: Stores, epoch: str, entry: Entry) -> None:
    async with stores.connect() as log:
        assert await log.open("c") == (epoch, 1, 1, 0)
        assert await log.read("c", 0, 10) == [entry]
        assert await log.append("c", epoch, Append(post("one"), "k")) == (entry, True)
        assert await log.unanswered(10) == ["c"]


async def a_post_is_unanswered_until_its_run_ends(stores: Stores) -> None:
    async with stores.connect() as log:
        epoch = (await log.open("c")).epoch
        first, _ = await log.append("c", epoch, Append(post("one", "p1")))
        second, _ = await log.append("c", epoch, Append(post("two", "p2")))
        assert await log.unanswered(10) == ["c"]
        lease = await _claimed(log)
        assert await log.unanswered(10) == []
        await log.append("c", epoch, Append(thought("…"), lease=lease))
        await log.append("c", epoch, Append(completed(), "k", lease=lease, answered=first.seq))
        assert (await log.open("c")).answered == first.seq
        assert not await log.release("c", lease)  # the second post is due
        await log.append("c", epoch, Append(completed("r2"), lease=lease, answered=second.seq))
        assert await log.release("c", lease)
        assert await log.release("c", lease)  # this instance no longer has it
        assert await log.unanswered(10) == []
        assert (await log.open("c")) == (epoch, 1, 5, second.seq)


async def an_append_under_a_released_lease_is_refused(stores: Stores) -> None:
    async with stores.connect() as log:
        epoch = (await log.open("c")).epoch
        await log.append("c", epoch, Append(post()))
        first = await _claimed(log)
        assert await log.release("c", first, unanswered=True)
        assert await log.unanswered(10) == ["c"]
        await _refused(LeaseLost, log.append("c", epoch, Append(thought("late"), lease=first)))
        second = await _claimed(log)
        third = await _claimed(log)  # an instance never waits for itself
        assert first.token < second.token < third.token
        await _refused(LeaseLost, log.append("c", epoch, Append(thought("late"), lease=second)))
        assert (await log.append("c", epoch, Append(thought("now"), lease=third)))[0].seq == 2


async def unanswered_is_bounded(stores: Stores) -> None:
    async with stores.connect() as log:
        for n in range(5):
            epoch = (await log.open(f"c{n}")).epoch
            await log.append(f"c{n}", epoch, Append(post()))
        assert len(await log.unanswered(3)) == 3
        assert sorted(await log.unanswered(10)) == [f"c{n}" for n in range(5)]


async def an_instance_does_not_see_its_own_attendance(stores: Stores) -> None:
    async with stores.connect() as log:
        await log.attend("c", True)
        assert not await log.attended("c")
        await log.attend("c", False)
        await log.attend("c", False)


async def a_watcher_is_not_called_after_unwatch(stores: Stores) -> None:
    told = _Told()
    async with stores.connect() as log:
        await log.watch("c", told.hear)
        log.unwatch("c")
        log.unwatch("c")
        heard = told.times
        epoch = (await log.open("c")).epoch
        await log.append("c", epoch, Append(post()))
        assert told.times == heard


async def retention_by_count_keeps_the_last(stores: Stores) -> None:
    async with stores.connect(Retention(events=10)) as log:
        entries = await _fill(log, 40)
        epoch, first, head, _ = await log.open("c")
        assert (head, first) == (40, 31)
        assert await log.read("c", 0, 100) == entries[30:]
        assert await log.read("c", 35, 100) == entries[35:]
        assert (await log.append("c", epoch, Append(post(), "post:0")))[1] is False  # forgotten with its entry
        assert await log.find("c", "post:19") == entries[38]


async def retention_keeps_what_an_unanswered_post_needs(stores: Stores) -> None:
    async with stores.connect(Retention(events=2)) as log:
        await _fill(log, 10)
        epoch = (await log.open("c")).epoch
        lease = await _claimed(log)
        asked, _ = await log.append("c", epoch, Append(post("again", "q")))
        for n in range(10):
            await log.append("c", epoch, Append(thought(str(n)), lease=lease))
        assert (await log.open("c")).first <= asked.seq
        await log.append("c", epoch, Append(completed("again"), lease=lease, answered=asked.seq))
        assert (await log.open("c"))[1:] == (asked.seq + 10, asked.seq + 11, asked.seq)


async def retention_by_age_keeps_seqs(stores: Stores) -> None:
    async with stores.connect() as log:
        await _fill(log, 10)
        before = await log.open("c")
    async with stores.connect(Retention(seconds=1e-6)) as log:
        with trio.fail_after(10):
            while (await log.open("c")).first != 11:
                await trio.sleep(0.01)
        assert await log.open("c") == before._replace(first=11)
        assert await log.read("c", 0, 10) == []


# Several instances


async def instances_read_each_others_appends(stores: Stores) -> None:
    async with stores.connect() as one, stores.connect() as other:
        epoch = (await one.open("c")).epoch
        assert (await other.open("c")).epoch == epoch
        entry, _ = await one.append("c", epoch, Append(post("one"), "k"))
        assert await other.read("c", 0, 10) == [entry]
        assert await other.append("c", epoch, Append(post("one"), "k")) == (entry, True)
        assert (await other.append("c", epoch, Append(post("two"))))[0].seq == 2
        assert (await one.open("c")).head == 2


async def watchers_are_told_of_every_change(stores: Stores) -> None:
    told = _Told()
    async with stores.connect() as one, stores.connect() as other:
        epoch = (await one.open("c")).epoch
        await other.open("c")
        await other.watch("c", told.hear)
        for seq in range(1, 20):
            await one.append("c", epoch, Append(post(str(seq))))
            if seq % 5 == 0:
                await told.until(lambda seq=seq: told.head >= seq)  # type: ignore[misc]
        await told.until(lambda: told.head == 19)
        await one.cancel("c", "run-7")
        await told.until(lambda: told.cancelled == "run-7")
        assert told.head == 19
        for attending in (True, False):
            heard = told.times
            await one.attend("c", attending)
            await told.until(lambda heard=heard: told.times > heard)  # type: ignore[misc]
        lease = await _claimed(one)
        heard = told.times
        await one.release("c", lease, unanswered=True)
        await told.until(lambda: told.times > heard)


async def only_one_instance_has_the_lease(stores: Stores) -> None:
    async with stores.connect() as one, stores.connect() as other:
        epoch = (await one.open("c")).epoch
        await other.append("c", epoch, Append(post()))
        lease = await _claimed(one)
        assert await other.claim("c") is None
        await trio.sleep(2 * LEASE)  # the instance renews it
        assert await other.claim("c") is None
        assert await other.unanswered(10) == []
        await one.append("c", epoch, Append(thought("still here"), lease=lease))
        assert await one.release("c", lease, unanswered=True)
        assert await other.unanswered(10) == ["c"]
        await _claimed(other)
        assert await one.claim("c") is None


async def an_append_under_a_lost_lease_is_refused(stores: Stores) -> None:
    async with stores.connect() as one, stores.connect() as other:
        epoch = (await one.open("c")).epoch
        await one.append("c", epoch, Append(post()))
        old = await _claimed(one)
        assert await one.release("c", old, unanswered=True)
        new = await _claimed(other)
        assert new.token > old.token
        await _refused(LeaseLost, one.append("c", epoch, Append(completed(), "k", lease=old, answered=1)))
        assert await one.release("c", old)
        assert await one.claim("c") is None  # releasing the old lease has not released the new one
        await other.append("c", epoch, Append(completed(), "k", lease=new, answered=1))
        assert (await one.open("c")).answered == 1


async def a_vanished_instance_loses_its_lease_in_time(stores: Stores) -> None:
    async with stores.connect() as one, stores.connect() as other:
        epoch = (await one.open("c")).epoch
        await one.append("c", epoch, Append(post()))
        await _claimed(one)
        await one.attend("c", True)
        assert await other.attended("c")
        await stores.vanish(one)
        lease = await _claim_when_free(other)
        await other.append("c", epoch, Append(completed(), lease=lease, answered=1))
        assert not await other.attended("c")


async def a_closed_instance_loses_its_lease_at_once(stores: Stores) -> None:
    async with stores.connect() as other:
        async with stores.connect() as one:
            epoch = (await one.open("c")).epoch
            await one.append("c", epoch, Append(post()))
            await _claimed(one)
            await one.attend("c", True)
        assert await other.unanswered(10) == ["c"]
        assert not await other.attended("c")
        await _claimed(other)


async def others_see_attendance(stores: Stores) -> None:
    async with stores.connect() as one, stores.connect() as other:
        await one.open("c")
        await one.attend("c", True)
        assert await other.attended("c")
        assert not await one.attended("c")
        await one.attend("c", False)
        assert not await other.attended("c")


async def many_instances_append_without_gaps(stores: Stores) -> None:
    numbers = count()

    async def write(log: Log, epoch: str) -> None:
        for _ in range(20):
            n = next(numbers)
            await log.append("c", epoch, Append(post(f"{n}", f"p{n}"), f"{n}"))

    async with stores.connect() as one, stores.connect() as two, stores.connect() as three:
        epoch = (await one.open("c")).epoch
        async with trio.open_nursery() as nursery:
            for log in (one, two, three):
                nursery.start_soon(write, log, epoch)
                nursery.start_soon(write, log, epoch)
        entries = await two.read("c", 0, 1000)
        assert [entry.seq for entry in entries] == list(range(1, 121))
        assert sorted(int(loads(entry.json)["text"]) for entry in entries) == list(range(120))


async def an_answer_of_another_instance_is_the_end_of_a_question(stores: Stores) -> None:
    """It is appended without the lease. Under the lease, the same key then adds nothing."""
    async with stores.connect() as one, stores.connect() as other:
        epoch = (await one.open("c")).epoch
        asked, _ = await one.append("c", epoch, Append(post(), "p"))
        lease = await _claimed(one)
        await one.append("c", epoch, Append(thought("who?"), "ask", lease))
        answer, repeated = await other.append("c", epoch, Append(_asked("answered"), "ask:completed"))
        assert (answer.seq, repeated) == (3, False)
        assert await other.append("c", epoch, Append(_asked("answered"), "ask:completed")) == (answer, True)
        assert await one.append("c", epoch, Append(_asked("timeout"), "ask:completed", lease)) == (answer, True)
        assert await one.find("c", "ask:completed") == answer
        assert (await one.open("c"))[1:] == (1, 3, 0)
        assert not await one.release("c", lease), "the post is still to be answered"
        end, _ = await one.append("c", epoch, Append(completed(), "r", lease, asked.seq))
        assert (await other.open("c"))[1:] == (1, 4, asked.seq)
        assert await other.read("c", 2, 10) == [answer, end]


def _asked(outcome: AskOutcome) -> AgentAsked:
    return AgentAsked(conversation="c", seq=0, at=0.0, run="r", ask="ask", outcome=outcome)


async def _refused(kind: type[Exception], call: Awaitable[Any]) -> None:
    try:
        await call
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


Case = Callable[[Stores], Awaitable[None]]

CASES: tuple[Case, ...] = (
    a_new_conversation_is_empty_and_keeps_its_epoch,
    append_sets_seq_and_time_and_encodes,
    conversations_are_kept_apart,
    a_repeated_key_returns_the_first_entry,
    read_returns_following_entries_up_to_the_limit,
    returned_lists_belong_to_the_caller,
    appends_of_many_tasks_have_no_gaps,
    a_long_event_fits,
    an_event_that_is_not_json_is_refused_and_leaves_no_gap,
    a_cancelled_append_is_made_certain_by_its_key,
    it_works_until_its_block_is_left_even_if_cancelled,
    an_append_with_another_epoch_is_refused,
    entries_outlive_the_instance,
    a_post_is_unanswered_until_its_run_ends,
    an_append_under_a_released_lease_is_refused,
    unanswered_is_bounded,
    an_instance_does_not_see_its_own_attendance,
    a_watcher_is_not_called_after_unwatch,
    retention_by_count_keeps_the_last,
    retention_keeps_what_an_unanswered_post_needs,
    retention_by_age_keeps_seqs,
)

SHARED_CASES: tuple[Case, ...] = (
    instances_read_each_others_appends,
    watchers_are_told_of_every_change,
    only_one_instance_has_the_lease,
    an_append_under_a_lost_lease_is_refused,
    a_vanished_instance_loses_its_lease_in_time,
    a_closed_instance_loses_its_lease_at_once,
    others_see_attendance,
    many_instances_append_without_gaps,
    an_answer_of_another_instance_is_the_end_of_a_question,
)
