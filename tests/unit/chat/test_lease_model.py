"""The protocol of lease and resume, tried out: every order in which two instances can act, with crashes in between.

What the store does is the store's own code (`StoredConversation`), and what an instance knows is its own fold
(`ConversationState`) of what it has read, which it may do late; the steps of an instance are those of `Responder`, cut
where another one may act in between. The run of a post may ask something, and a client answers at any time.
Every state that can be reached with two posts, two instances and two crashes, real ones or only seeming so, is visited;
in each the log must be one that a client may see.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field

import msgspec
import pytest

from tricorn.chat.conversation.state import ConversationState
from tricorn.chat.execution import completed_key, started_key
from tricorn.chat.logs.base import Append, Lease, LeaseLost, LogState
from tricorn.chat.logs.memory import StoredConversation
from tricorn.chat.protocol import (
    AgentAsked,
    AgentAsking,
    AgentCompleted,
    AgentMessage,
    AgentStarted,
    AskOutcome,
    RunEvent,
    UserMessage,
)

INSTANCES = ("a", "b")
POSTS = 2
ASKS = False  # the run of the first post asks something
CRASHES = 2
EPOCH = "e"
CLAIMS = 4  # two that are both thought dead could take the lease from each other for ever
STATES, STATES_OF_A_QUESTION = 193056, 26838

FOLDED: dict[object, ConversationState] = {}  # the same entries come to the same


@dataclass
class Instance:
    """What one instance has in memory. One that died comes back with nothing of it, under another name."""

    name: str
    lease: Lease | None = None
    answered: int = 0  # as it was when it began to read
    read: int = 0  # the seq of the last entry that it knows
    certain: bool = False  # it has read all that was written under earlier leases
    run: tuple[str, int] | None = None  # its own run, and the post that this answers
    steps: int = 0  # that the run has taken

    def key(self) -> object:
        token = self.lease and self.lease.token
        return (self.name, token, self.answered, self.read, self.certain, self.run, self.run and self.steps)


@dataclass
class World:
    past: StoredConversation = field(default_factory=lambda: StoredConversation(epoch=EPOCH))
    instances: list[Instance] = field(default_factory=lambda: [Instance(name) for name in INSTANCES])
    dead: set[str] = field(default_factory=set)  # whose leases have run out; who is slow may be among them
    posts: int = 0
    is_answered: bool = False  # the question, by a client, or the client has tried
    crashes: int = 0
    log: tuple[str, ...] = ()  # what tells its entries from those of other worlds

    def key(self) -> object:
        past = self.past
        return (
            self.log,
            past.answered,
            past.token,
            past.holder,
            tuple(instance.key() for instance in self.instances),
            frozenset(self.dead),
            self.posts,
            self.is_answered,
            self.crashes,
        )

    def copy(self) -> World:
        """One whose changes do not show here."""
        other = copy(self)
        other.past = copy(self.past)
        other.past.entries = self.past.entries.copy()
        other.past.keys = self.past.keys.copy()
        other.instances = [copy(instance) for instance in self.instances]
        other.dead = self.dead.copy()
        return other

    def progress(self, answered: int, read: int) -> ConversationState:
        """What the entries behind one seq and up to another come to."""
        known = (answered, self.log[:read])
        if known not in FOLDED:
            FOLDED[known] = progress = ConversationState(LogState(EPOCH, 1, 0, answered))
            for kept in self.past.entries:
                if progress.seq < kept.entry.seq <= read:
                    progress.fold(kept.entry)
        return FOLDED[known]

    def post(self) -> None:
        self.posts += 1
        event = UserMessage(conversation="c", seq=0, at=0.0, id=f"{self.posts}", user="u", text="x")
        self.past.append("client", EPOCH, Append(event, f"post:{self.posts}"))
        self.log += (f"post:{self.posts}",)

    def answer(self) -> None:
        """A client answers the first question that it has seen, under no lease."""
        self.is_answered = True
        ask = next(entry.split()[0].removesuffix(":asking") for entry in self.log if ":asking" in entry)
        event = asked(ask.removesuffix(".ask"), "answered")
        _, repeated = self.past.append("client", EPOCH, Append(event, completed_key(ask)))
        if not repeated:
            self.log += (f"{completed_key(ask)} client",)

    def append(self, instance: Instance, event: RunEvent, key: str, answered: int | None = None) -> None:
        """Append, and read all up to that, as `LogView` does."""
        entry, repeated = self.past.append(instance.name, EPOCH, Append(event, key, instance.lease, answered))
        if not repeated:
            self.log += (f"{key} {event.run}",)
        instance.read = max(instance.read, entry.seq)


def catch_up(world: World, instance: Instance) -> None:
    """What comes between a lease and the first that is done with it."""
    instance.read, instance.certain = world.past.head, True


def stamp(run: str) -> dict[str, object]:
    return {"conversation": "c", "seq": 0, "at": 0.0, "run": run}


def asked(run: str, outcome: AskOutcome) -> AgentAsked:
    return AgentAsked(**stamp(run), ask=f"{run}.ask", outcome=outcome)


def nexts(world: World) -> Iterator[World]:
    """All that can happen next, each in a world of its own."""
    if world.posts < POSTS:
        other = world.copy()
        other.post()
        yield other
    if not world.is_answered and any(":asking" in entry for entry in world.log):
        other = world.copy()
        other.answer()
        yield other
    for index in range(len(world.instances)):
        yield from acts(world, index)
        if world.crashes < CRASHES:
            name = world.instances[index].name
            slow = world.copy()  # it seems dead, and is not: all it does from now on comes too late
            slow.crashes += 1
            slow.dead.add(name)
            if name not in world.dead:
                yield slow
            gone = world.copy()
            gone.crashes += 1
            gone.dead.add(name)
            gone.instances[index] = Instance(f"{name}{gone.crashes}", answered=gone.past.answered)
            yield gone


def acts(world: World, index: int) -> Iterator[World]:
    """The next step of one instance."""
    other = world.copy()
    instance = other.instances[index]
    try:
        if instance.run is not None:
            run, post = instance.run
            ask, asks = f"{run}.ask", ASKS and post == other.past.entries[0].entry.seq
            instance.steps += 1
            if instance.steps == 1 and asks:
                other.append(instance, AgentAsking(**stamp(run), ask=ask, text="x", until=0.0), f"{ask}:asking")
            elif instance.steps == 2 and asks:  # if nobody has answered
                other.append(instance, asked(run, "timeout"), completed_key(ask))
            elif instance.steps == 1:
                other.append(instance, AgentMessage(**stamp(run), text="x"), f"{run}:1")
            else:
                instance.run = None
                completed = AgentCompleted(**stamp(run), outcome="success", seconds=0.0)
                other.append(instance, completed, completed_key(run), post)
            yield other
            return
        if instance.read < other.past.head:
            news = other.copy()
            news.instances[index].read = news.past.head
            yield news
        progress = other.progress(instance.answered, instance.read)
        if instance.lease is None:
            if (progress.posts or progress.run is not None) and other.past.token < CLAIMS:
                instance.lease = other.past.claim(instance.name, lambda holder: holder not in other.dead)
                if instance.lease is not None:
                    instance.certain = False
                    yield other
        elif not instance.certain:
            catch_up(other, instance)
            yield other
        elif progress.run is not None:
            going_on = progress.run
            if going_on.asks:
                other.append(instance, asked(going_on.id, "interrupted"), completed_key(next(iter(going_on.asks))))
                yield other
                return
            completed = AgentCompleted(**stamp(going_on.id), outcome="interrupted", seconds=0.0)
            other.append(instance, completed, completed_key(going_on.id), going_on.post)
            yield other
        elif progress.posts:
            post = progress.posts[0].seq
            run = f"r{post}.{instance.lease.token}"
            started = AgentStarted(**stamp(run), agent="x", post=progress.posts[0].id, post_seq=post)
            other.append(instance, started, started_key(post))
            instance.run, instance.steps = (run, post), 0
            yield other
        else:
            if other.past.release(instance.name, instance.lease, unanswered=False):
                instance.lease = None
            else:
                instance.certain = False  # there is a post that it has not heard of
            yield other
    except LeaseLost:
        instance.lease = instance.run = None
        yield other


def check(world: World) -> None:
    """No client may ever see a log in which this does not hold."""
    events = [json.loads(kept.entry.json) for kept in world.past.entries]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    posts = [event["seq"] for event in events if event["type"] == "user_message"]
    started = [event["post_seq"] for event in events if event["type"] == "agent_started"]
    assert started == posts[: len(started)], "posts are answered once, and in order"
    ended = Counter(event["run"] for event in events if event["type"] == "agent_completed")
    assert set(ended.values()) <= {1}
    going_on = None
    waiting: set[str] = set()
    for event in events:
        if event["type"] == "agent_started":
            assert going_on is None, "one run at a time"
            going_on = event["run"]
        elif "run" in event:
            assert event["run"] == going_on, "nothing is said behind the end of a run"
            if event["type"] == "agent_asking":
                waiting.add(event["ask"])
            elif event["type"] == "agent_asked":
                waiting.remove(event["ask"])  # it ends once
            if event["type"] == "agent_completed":
                going_on = None
                assert not waiting, "a question ends before its run"


def is_settled(world: World) -> bool:
    progress = world.progress(0, world.past.head)
    return world.posts == POSTS and not progress.posts and progress.run is None


def explore() -> int:
    """Visit every world; the number of them. From each, answering must still be possible."""
    FOLDED.clear()
    seen: dict[object, set[object]] = {}  # which worlds lead to this one
    settled: list[object] = []
    checked: set[tuple[str, ...]] = set()
    first = World()
    waiting = deque([first])
    seen[first.key()] = set()
    while waiting:
        world = waiting.popleft()
        if world.log not in checked:
            checked.add(world.log)
            check(world)
        if is_settled(world):
            settled.append(world.key())
            assert len({kept.key for kept in world.past.entries if (kept.key or "").startswith("run:")}) == POSTS
        elif world.past.token == CLAIMS:  # beyond it nothing is tried
            settled.append(world.key())
        for other in nexts(world):
            key = other.key()
            if key not in seen:
                seen[key] = set()
                waiting.append(other)
            seen[key].add(world.key())
    can_end = set(settled)
    back = deque(settled)
    while back:
        for before in seen[back.popleft()]:
            if before not in can_end:
                can_end.add(before)
                back.append(before)
    stuck = len(seen) - len(can_end)
    assert not stuck, f"from {stuck} of {len(seen)} states nobody can answer any more"
    return len(seen)


def test_every_order_of_two_instances_with_crashes() -> None:
    assert explore() == STATES


def test_every_order_of_two_instances_with_crashes_and_a_client_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one post: two make it four times as many states as without a question."""
    monkeypatch.setitem(globals(), "ASKS", True)
    monkeypatch.setitem(globals(), "POSTS", 1)
    assert explore() == STATES_OF_A_QUESTION


# It finds what is wrong


def test_it_finds_who_goes_on_from_what_it_knew_before_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(world: World, instance: Instance) -> None:
        instance.certain = True

    monkeypatch.setitem(globals(), "catch_up", late)
    with pytest.raises(AssertionError):
        explore()


def test_it_finds_a_store_that_does_not_look_at_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    append = StoredConversation.append

    def careless(self: StoredConversation, instance: object, epoch: str, what: Append) -> object:
        return append(self, instance, epoch, msgspec.structs.replace(what, lease=None))

    monkeypatch.setattr(StoredConversation, "append", careless)
    with pytest.raises(AssertionError):
        explore()


def test_it_finds_a_start_that_can_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a fold that knows of the run that goes on, posts are answered again."""
    fold = ConversationState.fold

    def forgetful(self: ConversationState, entry: object) -> None:
        fold(self, entry)  # type: ignore[arg-type]
        self.run = None

    monkeypatch.setattr(ConversationState, "fold", forgetful)
    with pytest.raises(AssertionError):
        explore()


def test_it_finds_a_store_that_forgets_how_far_it_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    append = StoredConversation.append

    def forgetful(self: StoredConversation, instance: object, epoch: str, what: Append) -> object:
        return append(
            self, instance, epoch, msgspec.structs.replace(what, answered=POSTS + 9 if what.answered else None)
        )

    monkeypatch.setattr(StoredConversation, "append", forgetful)
    monkeypatch.setitem(globals(), "INSTANCES", ("a",))  # which is enough
    with pytest.raises(AssertionError):
        explore()


def test_it_finds_a_question_that_can_end_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """If what the responder appends had another key than what a client does."""
    append = StoredConversation.append

    def careless(self: StoredConversation, instance: object, epoch: str, what: Append) -> object:
        if isinstance(what.event, AgentAsked) and what.lease is not None:
            what = msgspec.structs.replace(what, key=f"{what.key}:{instance}")
        return append(self, instance, epoch, what)

    monkeypatch.setitem(globals(), "ASKS", True)
    monkeypatch.setattr(StoredConversation, "append", careless)
    with pytest.raises((AssertionError, KeyError)):
        explore()


def test_it_finds_a_question_that_an_heir_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = ConversationState.fold

    def forgetful(self: ConversationState, entry: object) -> None:
        fold(self, entry)  # type: ignore[arg-type]
        if self.run is not None:
            self.run.asks.clear()

    monkeypatch.setitem(globals(), "ASKS", True)
    monkeypatch.setattr(ConversationState, "fold", forgetful)
    with pytest.raises(AssertionError, match="a question ends before its run"):
        explore()
