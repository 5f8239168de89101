"""A conversation's log as one instance has it: followed, its tail in memory, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import cast, get_args

from trio import Lock, TooSlowError, WouldBlock, fail_after
from trio.lowlevel import checkpoint_if_cancelled

from tricorn.chat.conversation.state import ConversationState
from tricorn.chat.logs.base import Append, Entry, ImmediateLog, Lease, Log, LogState, PastLost, Unavailable
from tricorn.chat.protocol import AnyEvent
from tricorn.metrics import APPEND_SECONDS, APPENDED

# Entries kept in memory, up to twice as many: who is not further behind is served without asking the log.
TAIL = 128
# Entries that are asked for at a time when others wrote.
CHUNK = 256

_TYPES = {kind: str(kind.__struct_config__.tag) for kind in get_args(AnyEvent)}


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Give what the block asks of a log so many seconds. Raises Unavailable where that is not enough."""
    try:
        with fail_after(seconds):
            yield
    except TooSlowError:
        raise Unavailable(f"the log did not answer within {seconds:g} s") from None


class LogView:
    """The entries of a conversation, own and foreign, in one order without a hole. `seconds` is what a call may take.

    `changed` is called after entries were added, once for all that came at a time, and where a doubt came up.

    `heard` is the head as others told it, which may be old news.
    `epoch`, `first`, `head` and `progress` are known after `open`. Everything raises Unavailable where the log does not
    answer, and PastLost where it has lost entries.
    """

    def __init__(self, key: str, log: Log, seconds: float, changed: Callable[[], None]) -> None:
        self.key = key
        self.id = key.rpartition("/")[2]
        self.epoch = ""
        self.first = 1
        self.head = 0
        self.progress = ConversationState(LogState("", 1, 0, 0))
        self.doubted = False
        self._log = log
        self._immediate = cast("ImmediateLog", log) if log.immediate else None
        self._seconds = seconds
        self._changed = changed
        self.heard = 0
        self._lock = Lock()  # one at a time adds entries
        self._tail: list[Entry] = []

    @property
    def is_behind(self) -> bool:
        """There is something to catch up with."""
        return self.doubted or self.heard > self.head

    async def open(self) -> None:
        """Learn where the conversation stands, once. A checkpoint then; if cancelled or failed, it can be tried again.

        Where that is known already, it only checks for cancellation.
        """
        if self.epoch:
            await checkpoint_if_cancelled()
            return
        async with self._lock:
            if not self.epoch:
                await self._look()

    def hear(self, head: int) -> None:
        """Others tell that the log goes up to `head`; `catch_up` reads it."""
        if head < self.heard:  # it may have lost entries
            self.doubted = True
        self.heard = max(head, self.heard)
        self._changed()

    def doubt(self) -> None:
        """The log may have more, or less, than is known here; `catch_up` makes it certain."""
        self.doubted = True
        self._changed()

    async def catch_up(self) -> None:
        """Read what others wrote, if they did: a checkpoint then. If cancelled or failed, it can be tried again."""
        if self.epoch and not self.is_behind:
            await checkpoint_if_cancelled()
            return
        async with self._lock:
            if self.doubted or not self.epoch:
                await self._look()
            else:
                await self._read_to(self.heard)

    async def append(
        self, event: AnyEvent, key: str | None = None, *, lease: Lease | None = None, answered: int | None = None
    ) -> tuple[Entry, bool]:
        """Put an event into the log, as `Log.append` does, and add its entry, with all that others wrote before it.

        A checkpoint before that, where there is something to wait for, and none after it. If this is cancelled or
        raises, it may be in the log, or not.
        """
        with suppress(WouldBlock):
            appended = self.append_nowait(event, key, lease=lease, answered=answered)
            if self.is_behind:
                await self.catch_up()
            return appended
        async with self._lock:
            sure = False
            try:
                began = perf_counter()
                with patience(self._seconds):
                    append = Append(event, key, lease, answered)
                    entry, repeated = await self._log.append(self.key, self.epoch, append)
                if self._immediate is None:
                    APPEND_SECONDS.observe(perf_counter() - began)
                if not repeated:
                    APPENDED.add(_TYPES[event.__class__])
                if entry.seq > self.head + 1:
                    await self._read_to(entry.seq - 1)
                sure = True
            finally:
                if not sure:
                    self.doubt()
            if entry.seq > self.head:
                self._add([entry])
            return entry, repeated

    def append_nowait(
        self, event: AnyEvent, key: str | None = None, *, lease: Lease | None = None, answered: int | None = None
    ) -> tuple[Entry, bool]:
        """Do what `append` does; raises WouldBlock, and does nothing, where there is something to wait for.

        Where others wrote before the event, that and the event itself are then to be caught up with.
        """
        if self._immediate is None or self.is_behind or self._lock.locked():
            raise WouldBlock
        try:
            append = Append(event, key, lease, answered)
            appended = entry, repeated = self._immediate.append_nowait(self.key, self.epoch, append)
        except BaseException:
            self.doubt()
            raise
        if not repeated:
            APPENDED.add(_TYPES[event.__class__])
        if entry.seq == self.head + 1:
            self._add([entry])
        elif entry.seq > self.head:
            self.hear(entry.seq)
        return appended

    async def find(self, key: str) -> Entry | None:
        """The entry that was added with this key."""
        with patience(self._seconds):
            return await self._log.find(self.key, key)

    def has_in_memory(self, after: int) -> bool:
        """Whether reading on from there needs no log."""
        return after >= (self._tail[0].seq - 1 if self._tail else self.head)

    async def read(self, after: int, limit: int) -> list[Entry]:
        """Return at most `limit` entries that follow seq `after`. No checkpoint where they are still in memory.

        It is empty also where retention has taken them all.
        """
        if self._tail and after + 1 >= self._tail[0].seq:
            start = after + 1 - self._tail[0].seq
            return self._tail[start : start + limit]
        try:
            with patience(self._seconds):
                entries = await self._log.read(self.key, after, limit)
        except Unavailable:
            self.doubt()
            raise
        if entries:
            self.first = max(self.first, entries[0].seq if entries[0].seq > after + 1 else 1)
        elif after < self.head:
            self.first = self.head + 1
            self.doubt()
        return entries

    async def _state(self) -> LogState:
        with patience(self._seconds):
            state = await self._log.open(self.key)
        if self.epoch and state.epoch != self.epoch:
            raise PastLost
        self.first = state.first
        return state

    async def _look(self) -> None:
        """Make certain what there is."""
        self.heard, self.doubted = 0, False  # what comes from now on is news
        sure = False
        try:
            state = await self._state()
            if not self.epoch:
                self._go_on_from(state)
            self.heard = max(self.heard, state.head)
            await self._read_to(state.head)
            self.epoch = state.epoch
            sure = True
        finally:
            if not sure:
                self.doubted = True

    async def _read_to(self, head: int) -> None:
        """Add what is in the log up to `head`, which others wrote."""
        while self.head < head:
            with patience(self._seconds):
                entries = await self._log.read(self.key, self.head, min(CHUNK, head - self.head))
            if entries and entries[0].seq == self.head + 1:
                self._add(entries)
                continue
            state = await self._state()
            head = min(head, state.head)
            if state.first > self.head + 1:  # retention has taken what nothing depends on any more
                self._go_on_from(state)
            elif head > self.head:  # it says that there is more, and has it not
                raise PastLost

    def _go_on_from(self, state: LogState) -> None:
        self.progress = ConversationState(state, self.progress.turns + 1)
        self.head = self.progress.seq
        self._tail.clear()

    def _add(self, entries: list[Entry]) -> None:
        self._tail += entries
        if len(self._tail) > 2 * TAIL:
            del self._tail[:-TAIL]
        for entry in entries:
            self.progress.fold(entry)
        self.head = self.progress.seq
        self._changed()
