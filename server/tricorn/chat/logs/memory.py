"""A log in memory: it forgets everything when the process ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from math import inf
from secrets import token_hex
from time import time
from types import TracebackType
from typing import Self

from msgspec import Struct
from trio import current_time
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint

from tricorn.chat.logs.base import (
    KEEP_EVERYTHING,
    Append,
    Entry,
    Lease,
    LeaseLost,
    LogState,
    OnChange,
    PastLost,
    Retention,
    stamp,
)
from tricorn.chat.protocol import UserMessage
from tricorn.chat.settings import ChatSettings
from tricorn.settings import SettingError


class MemoryLog:
    """Keeps conversations for as long as the process lives. If a call is cancelled, it had no effect.

    `beside` is the log of another instance in this process that shares its store with this one.
    """

    shared = False  # with another process
    immediate = True
    punctual = False  # it never waits
    problem = "this process"

    def __init__(
        self, *, retention: Retention = KEEP_EVERYTHING, lease: float = 15.0, beside: MemoryLog | None = None
    ) -> None:
        self.store: MemoryStore = MemoryStore() if beside is None else beside.store
        self._retention = retention
        self._forgets = retention != KEEP_EVERYTHING
        self._lease = lease
        self._watchers: dict[str, OnChange] = {}
        self.store.alive_until[self] = inf
        self.store.watchers[self] = self._watchers

    async def __aenter__(self) -> Self:
        await checkpoint()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(-inf)
        await cancel_shielded_checkpoint()  # a Cancelled would hide what the block raises

    def vanish(self) -> None:
        """Stop renewing leases, as an instance does that has died."""
        self._end(current_time() + self._lease)

    async def check(self) -> None:
        await checkpoint()

    async def open(self, conversation: str) -> LogState:
        await checkpoint()
        stored = self.store.find(conversation)
        stored.forget(self._retention)
        return stored.state()

    async def append(self, conversation: str, epoch: str, append: Append) -> tuple[Entry, bool]:
        await checkpoint()
        return self.append_nowait(conversation, epoch, append)

    def append_nowait(self, conversation: str, epoch: str, append: Append) -> tuple[Entry, bool]:
        stored = self.store.conversations.get(conversation) or self.store.keep(conversation)
        entry, repeated = stored.append(self, epoch, append)
        if not repeated:
            if self._forgets:
                stored.forget(self._retention)
            if len(self.store.watchers) > 1:
                self._tell_others(conversation, stored)
        return entry, repeated

    async def find(self, conversation: str, key: str) -> Entry | None:
        await checkpoint()
        return self.store.find(conversation).keys.get(key)

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        await checkpoint()
        stored = self.store.find(conversation)
        start = max(0, after + 1 - stored.state().first)
        return [kept.entry for kept in islice(stored.entries, start, start + limit)]

    async def watch(self, conversation: str, on_change: OnChange) -> None:
        await checkpoint()
        self._watchers[conversation] = on_change

    def unwatch(self, conversation: str) -> None:
        self._watchers.pop(conversation, None)

    async def claim(self, conversation: str) -> Lease | None:
        await checkpoint()
        return self.store.keep(conversation).claim(self, self.store.is_alive)

    async def release(self, conversation: str, lease: Lease, *, unanswered: bool = False) -> bool:
        await checkpoint()
        stored = self.store.find(conversation)
        released = stored.release(self, lease, unanswered)
        if released:
            self._tell_others(conversation, stored)
        return released

    async def cancel(self, conversation: str, run: str) -> None:
        await checkpoint()
        stored = self.store.keep(conversation)
        stored.cancelled = run
        self._tell_others(conversation, stored)

    async def attend(self, conversation: str, attending: bool) -> None:
        await checkpoint()
        stored = self.store.find(conversation)
        if attending:
            stored = self.store.keep(conversation)
            stored.attended.add(self)
        else:
            stored.attended.discard(self)
            if stored.is_new and not stored.attended:
                self.store.conversations.pop(conversation, None)
        self._tell_others(conversation, stored)

    async def attended(self, conversation: str) -> bool:
        await checkpoint()
        return any(map(self.store.is_alive, self.store.find(conversation).attended - {self}))

    async def unanswered(self, limit: int) -> list[str]:
        await checkpoint()
        alive = self.store.is_alive
        every = self.store.conversations.items()
        return list(islice((key for key, stored in every if stored.is_unanswered and not stored.is_held(alive)), limit))

    def _tell_others(self, conversation: str, stored: StoredConversation) -> None:
        for instance, watchers in self.store.watchers.items():
            if instance is not self and conversation in watchers:
                watchers[conversation](stored.head, stored.cancelled)

    def _end(self, alive_until: float) -> None:
        self.store.alive_until[self] = alive_until
        self.store.watchers.pop(self, None)


def connect(url: str, settings: ChatSettings) -> MemoryLog:
    """Make a log with a store of its own. Raises SettingError if the URL is not `memory:`."""
    if url != "memory:":
        raise SettingError("log: nothing may follow memory:")
    retention = Retention(settings.retention_events, settings.retention_seconds)
    return MemoryLog(retention=retention, lease=settings.lease)


class MemoryStore:
    """What the instances in a process share."""

    def __init__(self) -> None:
        self.conversations: dict[str, StoredConversation] = {}
        self._id = token_hex(16)
        self.watchers: dict[object, dict[str, OnChange]] = {}  # of each instance that is open
        self.alive_until: dict[object, float] = {}  # as `current_time`; for each instance

    def find(self, key: str) -> StoredConversation:
        """Return a conversation, also one that is not kept: that costs nothing before something happens in it."""
        found = self.conversations.get(key)
        if found is None:
            found = StoredConversation(blake2b(key.encode(), key=self._id.encode(), digest_size=8).hexdigest())
        return found

    def keep(self, key: str) -> StoredConversation:
        """Return a conversation, and keep what happens in it."""
        return self.conversations.setdefault(key, self.find(key))

    def lose(self, key: str) -> None:
        """Lose a conversation, as a store does that is gone: what comes next is another past."""
        del self.conversations[key]
        self._id = token_hex(16)

    def is_alive(self, instance: object) -> bool:
        return current_time() < self.alive_until[instance]


class _Kept(Struct, frozen=True, gc=False):
    entry: Entry
    key: str | None
    since: float


@dataclass
class StoredConversation:
    """A conversation in the store. Its methods are what every engine does in one transaction. Sans-I/O."""

    epoch: str
    entries: deque[_Kept] = field(default_factory=deque)
    keys: dict[str, Entry] = field(default_factory=dict)
    head: int = 0
    asked: int = 0  # the seq of the last post
    answered: int = 0
    token: int = 0  # of the last lease
    holder: object = None  # the instance that has it
    cancelled: str = ""
    attended: set[object] = field(default_factory=set)

    def state(self) -> LogState:
        return LogState(self.epoch, self.head - len(self.entries) + 1, self.head, self.answered)

    @property
    def is_new(self) -> bool:
        """Whether nothing has happened in it yet."""
        return self.head == self.token == 0 and not self.cancelled

    @property
    def is_unanswered(self) -> bool:
        return self.asked > self.answered

    def is_held(self, alive: Callable[[object], bool]) -> bool:
        return self.holder is not None and alive(self.holder)

    def append(self, instance: object, epoch: str, append: Append) -> tuple[Entry, bool]:
        event, key, lease = append.event, append.key, append.lease
        if epoch != self.epoch:
            raise PastLost
        if lease is not None and (self.holder is not instance or self.token != lease.token):
            raise LeaseLost
        if key is not None and key in self.keys:
            return self.keys[key], True
        entry = stamp(event, self.head + 1)
        self.head = entry.seq
        self.entries.append(_Kept(entry, key, event.at))
        if key is not None:
            self.keys[key] = entry
        if isinstance(event, UserMessage):
            self.asked = entry.seq
        if append.answered is not None:
            self.answered = append.answered
        return entry, False

    def claim(self, instance: object, alive: Callable[[object], bool]) -> Lease | None:
        if self.holder is not instance and self.is_held(alive):
            return None
        self.holder = instance
        self.token += 1
        return Lease(self.token)

    def release(self, instance: object, lease: Lease, unanswered: bool) -> bool:
        if self.holder is not instance or self.token != lease.token:
            return True
        if self.is_unanswered and not unanswered:
            return False
        self.holder = None
        return True

    def forget(self, retention: Retention) -> None:
        """Drop entries that retention need not keep and no post needs."""
        needed = self.answered if self.is_unanswered else self.head
        while self.entries and self.entries[0].entry.seq <= needed:
            kept = self.entries[0]
            if len(self.entries) <= retention.events and kept.since > time() - retention.seconds:
                break
            self.entries.popleft()
            if kept.key is not None:
                del self.keys[kept.key]
