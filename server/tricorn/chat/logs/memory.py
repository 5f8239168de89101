"""A log in memory: it forgets everything when the process ends."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from secrets import token_hex
from time import time
from types import TracebackType
from typing import Self

from msgspec import Struct
from trio import current_time
from trio.lowlevel import checkpoint

from tricorn.chat.logs.base import KEEP_EVERYTHING, Entry, Hear, Lease, LeaseLost, LogState, PastLost, Retention, stamp
from tricorn.chat.protocol import AnyEvent, UserMessage
from tricorn.chat.settings import ChatSettings
from tricorn.settings import SettingError


class MemoryLog:
    """Keeps conversations for as long as it lives itself. If a call is cancelled, nothing was done.

    `beside` is the log of another instance that is to share its store with this one, in the same process.
    """

    shared = False  # with another process
    immediate = True

    def __init__(
        self, *, retention: Retention = KEEP_EVERYTHING, lease: float = 15.0, beside: MemoryLog | None = None
    ) -> None:
        self._retention = retention
        self._forgets = retention != KEEP_EVERYTHING
        self._lease = lease
        self._store: defaultdict[str, Past] = defaultdict(Past) if beside is None else beside._store
        self._instances: set[MemoryLog] = set() if beside is None else beside._instances
        self._watchers: dict[str, Hear] = {}
        self._alive_until = inf
        self._instances.add(self)

    async def __aenter__(self) -> Self:
        await checkpoint()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._alive_until = -inf
        self._instances.discard(self)
        await checkpoint()

    def vanish(self) -> None:
        """Stop renewing what it has, as an instance does that has died."""
        self._alive_until = current_time() + self._lease
        self._instances.discard(self)

    async def check(self) -> None:
        await checkpoint()

    async def open(self, conversation: str) -> LogState:
        await checkpoint()
        past = self._store[conversation]
        past.forget(self._retention)
        return past.state()

    async def append(
        self,
        conversation: str,
        epoch: str,
        event: AnyEvent,
        key: str | None = None,
        *,
        lease: Lease | None = None,
        answered: int | None = None,
    ) -> tuple[Entry, bool]:
        await checkpoint()
        return self.append_nowait(conversation, epoch, event, key, lease=lease, answered=answered)

    def append_nowait(
        self,
        conversation: str,
        epoch: str,
        event: AnyEvent,
        key: str | None = None,
        *,
        lease: Lease | None = None,
        answered: int | None = None,
    ) -> tuple[Entry, bool]:
        past = self._store[conversation]
        entry, repeated = past.append(self, epoch, event, key, lease, answered)
        if not repeated:
            if self._forgets:
                past.forget(self._retention)
            self._tell(conversation, past)
        return entry, repeated

    async def find(self, conversation: str, key: str) -> Entry | None:
        await checkpoint()
        return self._store[conversation].keys.get(key)

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        await checkpoint()
        past = self._store[conversation]
        start = max(0, after + 1 - past.state().first)
        return [kept.entry for kept in islice(past.entries, start, start + limit)]

    async def watch(self, conversation: str, hear: Hear) -> None:
        await checkpoint()
        self._watchers[conversation] = hear

    def unwatch(self, conversation: str) -> None:
        self._watchers.pop(conversation, None)

    async def claim(self, conversation: str) -> Lease | None:
        await checkpoint()
        return self._store[conversation].claim(self, _alive)

    async def release(self, conversation: str, lease: Lease, *, unanswered: bool = False) -> bool:
        await checkpoint()
        past = self._store[conversation]
        released = past.release(self, lease, unanswered)
        if released:
            self._tell(conversation, past)
        return released

    async def cancel(self, conversation: str, run: str) -> None:
        await checkpoint()
        past = self._store[conversation]
        past.cancelled = run
        self._tell(conversation, past)

    async def attend(self, conversation: str, attending: bool) -> None:
        await checkpoint()
        past = self._store[conversation]
        if attending:
            past.attended.add(self)
        else:
            past.attended.discard(self)
        self._tell(conversation, past)

    async def attended(self, conversation: str) -> bool:
        await checkpoint()
        return any(_alive(other) for other in self._store[conversation].attended - {self})

    async def unanswered(self, limit: int) -> list[str]:
        await checkpoint()
        found = (key for key, past in self._store.items() if past.is_unanswered and not past.is_held(_alive))
        return list(islice(found, limit))

    def _tell(self, conversation: str, past: Past) -> None:
        for other in self._instances:
            if other is not self and conversation in other._watchers:
                other._watchers[conversation](past.head, past.cancelled)


def connect(url: str, settings: ChatSettings) -> MemoryLog:
    """A log of its own. Raises SettingError where the URL says more than `memory:`."""
    if url != "memory:":
        raise SettingError("log: there is nothing behind memory:")
    retention = Retention(settings.retention_events, settings.retention_seconds)
    return MemoryLog(retention=retention, lease=settings.lease)


def _alive(instance: object) -> bool:
    return isinstance(instance, MemoryLog) and current_time() < instance._alive_until


class _Kept(Struct, frozen=True, gc=False):
    entry: Entry
    key: str | None
    since: float


@dataclass
class Past:
    """A conversation in the store: what every engine does in one transaction, as plain as it can be said. Sans-I/O."""

    epoch: str = field(default_factory=lambda: token_hex(8))
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
    def is_unanswered(self) -> bool:
        return self.asked > self.answered

    def is_held(self, alive: Callable[[object], bool]) -> bool:
        return self.holder is not None and alive(self.holder)

    def append(
        self, instance: object, epoch: str, event: AnyEvent, key: str | None, lease: Lease | None, answered: int | None
    ) -> tuple[Entry, bool]:
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
        if answered is not None:
            self.answered = answered
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
        """Drop what retention does not ask to keep and no post needs."""
        needed = self.answered if self.is_unanswered else self.head
        while self.entries and self.entries[0].entry.seq <= needed:
            kept = self.entries[0]
            if len(self.entries) <= retention.events and kept.since > time() - retention.seconds:
                break
            self.entries.popleft()
            if kept.key is not None:
                del self.keys[kept.key]
