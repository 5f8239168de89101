"""A conversation's log as one instance follows it: without gaps, its tail in memory, and what it adds up to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

from trio import Lock, TooSlowError, WouldBlock, fail_after
from trio.lowlevel import checkpoint_if_cancelled

from tricorn.chat.conversation.state import ConversationState
from tricorn.chat.conversation.tails import ENTRY_BYTES, Tails
from tricorn.chat.logs.base import Append, Entry, ImmediateLog, Log, LogState, PastLost, Unavailable, too_slow
from tricorn.chat.metrics import EVENT_TYPES, ChatMetrics
from tricorn.waiter import Waiter

TAIL = 128  # entries kept in memory, up to twice as many: readers who lag by less are served without asking the log
CHUNK = 256  # entries that others wrote are read so many at a time

P = ParamSpec("P")
T = TypeVar("T")


class Reader(Protocol):
    """Somebody who has read everything and waits for more. Hashable."""

    def wake(self) -> None:
        """There is more, or never will be. Does not block."""


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Give the log this long for what the block asks of it. Raises Unavailable if that is not enough."""
    try:
        with fail_after(seconds):
            yield
    except TooSlowError:
        raise too_slow(seconds) from None


class LogView:
    """The entries of a conversation, this instance's and others', in order and without gaps.

    `first`, `head` and `state` are known after `open`. Every method that asks the log gives it `seconds`, and raises
    Unavailable if it does not answer, PastLost if it has lost entries.

    Attributes:
        key: what the log knows the conversation as: `user/id`.
        id: its user's name for it.
        epoch: the log's; empty before `open`.
        state: what the entries add up to.
        heard: the head that others told last, which may be old news.
        lost: the log has lost entries, so that no reader can go on.
        behind: there is, or may be, something to catch up with.
        news: woken when `behind` becomes true.
        on_turn: called after `state.posts`, `run`, its `asked`, or `answered` has changed, and before any reader is
            woken. Must not block.
    """

    def __init__(self, key: str, log: Log, seconds: float, metrics: ChatMetrics) -> None:
        self.key = key
        self.id = key.rpartition("/")[2]
        self.epoch = ""
        self.first = 1
        self.state = ConversationState(LogState("", 1, 0, 0))
        self.heard = 0
        self.lost = False
        self.behind = True
        self.news = Waiter()
        self.on_turn: Callable[[], None] = lambda: None
        self._doubted = False  # the log may have more, or less, than is known here
        self._log = log
        self._immediate = cast("ImmediateLog", log) if log.immediate else None
        self._append = log.append if log.punctual else self._append_in_time
        self._seconds = seconds
        self._metrics = metrics
        self._appended = metrics.appended.values
        self._lock = Lock()  # one task at a time adds entries
        self._tail: list[Entry] = []
        self._tail_size = 0  # in bytes
        self._tails: Tails | None = None  # that count it
        self._resting: set[Reader] = set()

    @property
    def head(self) -> int:
        """The seq of the last entry that is known here."""
        return self.state.seq

    async def ask(self, question: Callable[Concatenate[str, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Ask the log something about this conversation: one of its methods, and what that takes."""
        with patience(self._seconds):
            return await question(self.key, *args, **kwargs)

    # Following

    async def open(self) -> None:
        """Learn where the conversation stands, once. If cancelled or failed, it can be tried again.

        A checkpoint. If that is known already, it only checks for cancellation.
        """
        if self.epoch:
            await checkpoint_if_cancelled()
        else:
            await self.catch_up()

    def hear(self, head: int) -> None:
        """Take notice of what others say, that the log goes up to `head`; `catch_up` reads it."""
        if head < self.heard:  # it may have lost entries
            self._doubted = True
        self.heard = max(head, self.heard)
        if self._doubted or self.heard > self.head:
            self.behind = True
            self.news.wake()

    def doubt(self) -> None:
        """Have `catch_up` ask the log where it stands: it may have more, or less, than is known here."""
        self._doubted = True
        self.hear(self.heard)

    async def catch_up(self) -> None:
        """Read what others wrote, if anything. If cancelled or failed, it can be tried again.

        A checkpoint. If there is nothing to catch up with, it only checks for cancellation.
        """
        if not self.behind:
            await checkpoint_if_cancelled()
            return
        async with self._lock:
            if self._doubted or not self.epoch:
                await self._look()
            else:
                await self._read_to(self.heard)
            self.behind = self._doubted or self.heard > self.head

    def lose(self) -> None:
        """Tell the readers that the log has lost entries."""
        self.lost = True
        self._wake_readers()

    # Writing

    async def append(self, append: Append) -> tuple[Entry, bool]:
        """Append to the log as `Log.append` does, and add the entry, after all that others wrote before it.

        A checkpoint before that if there is something to wait for, and none after it. If this is cancelled or raises,
        the event may be in the log or not.
        """
        with suppress(WouldBlock):
            appended = self.append_nowait(append)
            if self.behind:
                await self.catch_up()
            return appended
        async with self._lock:
            try:
                began = perf_counter()
                entry, repeated = await self._append(self.key, self.epoch, append)
                if self._immediate is None:
                    self._metrics.append_seconds.observe(perf_counter() - began)
                if not repeated:
                    self._appended[EVENT_TYPES[append.event.__class__]] += 1
                if entry.seq > self.head + 1:
                    await self._read_to(entry.seq - 1)
            except TooSlowError:  # a driver's own, which says nothing
                self.doubt()
                raise too_slow(self._seconds) from None
            except BaseException:
                self.doubt()
                raise
            if entry.seq > self.head:
                self._add(entry)
            return entry, repeated

    def append_nowait(self, append: Append) -> tuple[Entry, bool]:
        """Do what `append` does; raises WouldBlock, and does nothing, if there is something to wait for.

        If others wrote before the event, the view is behind afterwards: it lacks that and the event.
        """
        if self._immediate is None or self.behind or self._lock.locked():
            raise WouldBlock
        try:
            appended = entry, repeated = self._immediate.append_nowait(self.key, self.epoch, append)
        except BaseException:
            self.doubt()
            raise
        if not repeated:
            self._appended[EVENT_TYPES[append.event.__class__]] += 1
        if entry.seq == self.state.seq + 1:
            self._add(entry)
        elif entry.seq > self.state.seq:
            self.hear(entry.seq)
        return appended

    # Reading

    def in_memory(self, after: int) -> list[Entry] | None:
        """Return the entries that follow seq `after`; None if there are some, or may be, that are not in memory."""
        tail = self._tail
        if self.lost or not tail or after + 1 < tail[0].seq:
            return None
        if self._tails is not None:
            self._tails.read(self)
        return tail[after + 1 - tail[0].seq :]

    async def read(self, after: int, limit: int) -> list[Entry]:
        """Return at most `limit` entries that follow seq `after`. No checkpoint if they are still in memory.

        The list is empty also if retention has taken them all.
        """
        entries = self.in_memory(after)
        if entries is not None:
            return entries[:limit]
        try:
            entries = await self.ask(self._log.read, after, limit)
        except Unavailable:
            self.doubt()
            raise
        if entries:
            self.first = max(self.first, entries[0].seq if entries[0].seq > after + 1 else 1)
        elif after < self.head:
            self.first = self.head + 1
            self.doubt()
        return entries

    def rest(self, reader: Reader) -> None:
        """Wake a reader, who has read everything, at the next entry or when the log is lost; once."""
        self._resting.add(reader)

    def leave(self, reader: Reader) -> None:
        """Do not wake a reader."""
        self._resting.discard(reader)

    # Memory

    def share(self, tails: Tails) -> None:
        """Have the entries in memory count as part of `tails`, until `unshare`."""
        self._tails = tails
        self._grow(self._tail_size)

    def unshare(self) -> None:
        """Have them count no longer: they end with this, and with those who still read it."""
        if self._tails is not None:
            self._tails.discard(self, self._tail_size)
            self._tails = None

    def drop_tail(self) -> int:
        """Forget the entries in memory, and return how many bytes they took. For `Tails`."""
        size, self._tail_size = self._tail_size, 0
        self._tail = []
        return size

    # Inside

    async def _append_in_time(self, key: str, epoch: str, append: Append) -> tuple[Entry, bool]:
        with patience(self._seconds):
            return await self._log.append(key, epoch, append)

    async def _state(self) -> LogState:
        state = await self.ask(self._log.open)
        if self.epoch and state.epoch != self.epoch:
            raise PastLost
        self.first = state.first
        return state

    async def _look(self) -> None:
        """Ask the log where it stands, and read up to there."""
        self.heard, self._doubted = 0, False  # what is told from now on is news
        try:
            state = await self._state()
            if not self.epoch:
                self._go_on_from(state)
            self.heard = max(self.heard, state.head)
            await self._read_to(state.head)
            self.epoch = state.epoch
        except BaseException:
            self.doubt()
            raise

    async def _read_to(self, head: int) -> None:
        """Add what is in the log up to `head`, which others wrote."""
        while self.head < head:
            entries = await self.ask(self._log.read, self.head, min(CHUNK, head - self.head))
            if entries and entries[0].seq == self.head + 1:
                for entry in entries:
                    self._add(entry)
                continue
            state = await self._state()
            head = min(head, state.head)
            if state.first > self.head + 1:  # retention has taken what nothing depends on any more
                self._go_on_from(state)
            elif head > self.head:  # it says that there is more, but does not have it
                raise PastLost

    def _go_on_from(self, state: LogState) -> None:
        self.state = ConversationState(state)
        self._grow(-self.drop_tail())
        self.on_turn()

    def _add(self, entry: Entry) -> None:
        tail = self._tail
        tail.append(entry)
        grown = len(entry.json) + ENTRY_BYTES
        if len(tail) > 2 * TAIL:
            grown -= sum(len(old.json) + ENTRY_BYTES for old in tail[:-TAIL])
            del tail[:-TAIL]
        self._tail_size += grown
        self._grow(grown)
        if self.state.fold(entry):
            self.on_turn()
        if self._resting:
            self._wake_readers()

    def _grow(self, by: int) -> None:
        """The entries in memory take so many bytes more."""
        tails = self._tails
        if tails is not None:
            if by == self._tail_size:  # it begins
                tails.read(self)
            tails.size += by
            if tails.size > tails.budget:
                tails.shrink()

    def _wake_readers(self) -> None:
        resting, self._resting = self._resting, set()
        for reader in resting:
            reader.wake()
