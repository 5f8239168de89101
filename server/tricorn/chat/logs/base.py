"""What the chat asks of a log: an ordered, durable record of every conversation, and who answers in it.

One `Log` is the door of one instance to a store that several may share. Of each conversation the store knows its
entries, numbered from 1; its *epoch*, which is another one after entries were lost; up to which post it was *answered*;
who holds its *lease*, the right to answer; and which instances *attend* it, because somebody follows it there.

A lease is an instance's for as long as that renews itself in the store, and lets others have it `lease` seconds after
the last time, at most. Each lease has a higher token than the one before: what is appended under a lease that another
instance has taken over is refused, so that nobody who comes to late can write into a run that was ended for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from time import time
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from msgspec import Struct
from msgspec.json import Encoder
from msgspec.structs import force_setattr

from tricorn.chat.protocol import AnyEvent, UserMessage

_encode = Encoder().encode


class Unavailable(Exception):
    """The log cannot do this now, but may later. The text is one line that says why, for operators."""


class LeaseLost(Exception):
    """Another instance answers in this conversation now."""


class PastLost(Exception):
    """The log has lost entries: the conversation's epoch is not the one that it had."""


class Entry(Struct, frozen=True, order=True, gc=False):
    """One event of a conversation as it stands in the log: encoded once, however many read it."""

    seq: int
    json: bytes


class Draft(NamedTuple):
    """An event that has its time but not its seq: what stands before that in the JSON, and what behind it."""

    before: bytes
    behind: bytes

    def entry(self, seq: int) -> Entry:
        return Entry(seq, b"%b%d%b" % (self.before, seq, self.behind))


def stamp(event: AnyEvent, seq: int) -> Entry:
    """Give an event its seq and the time, in seconds since the Unix epoch, and encode it.

    Raises TypeError, ValueError or RecursionError where something in the event is not JSON.
    """
    # What the two fields of an event wait for; a copy of it would cost more than all the rest.
    force_setattr(event, "seq", seq)
    force_setattr(event, "at", time())
    return Entry(seq, _encode(event))


def draft(event: AnyEvent) -> Draft:
    """Stamp an event as far as a log can that does not know its seq yet. Raises what `stamp` does."""
    before, seq, behind = stamp(event, 0).json.partition(_SEQ)
    return Draft(before + seq[:-1], behind)


_SEQ = b'"seq":0'  # its first occurrence: only the type and an id stand before it


class LogState(NamedTuple):
    """Where a conversation stands.

    `first` and `head` are the seqs of the first and last entry that are there: `head` is 0 for a new conversation, and
    `first` is `head + 1` where nothing is there. `answered` is the seq of the last post whose run has ended.
    """

    epoch: str
    first: int
    head: int
    answered: int


@dataclass
class Lease:
    """The right to answer in a conversation, of the instance that claimed it.

    `appended` counts what was appended under it. An engine that does not know whether an append arrived says it again
    with the same number, and the store knows it again.
    """

    token: int
    appended: int = 0


class Append(NamedTuple):
    """What one append adds, and under which conditions.

    Attributes:
        event: what is added; it gets its seq and its time.
        key: if the conversation has an entry with this key already, nothing is added.
        lease: under which a run's event is added; None for a post.
        answered: the seq of the post that is answered with this event, the last of its run.
    """

    event: AnyEvent
    key: str | None = None
    lease: Lease | None = None
    answered: int | None = None

    @property
    def is_post(self) -> bool:
        return isinstance(self.event, UserMessage)


class Retention(NamedTuple):
    """What a log may forget: all but the last `events` of a conversation, and what is older than `seconds`.

    It never forgets what a post that is not answered needs: nothing above `answered` while there is one. With an entry
    goes its key.
    """

    events: float = inf
    seconds: float = inf


KEEP_EVERYTHING = Retention()


Hear = Callable[[int, str], None]


class Log(Protocol):
    """The log as one instance sees it: an async context manager, open inside its block.

    As with a nursery, what the block raises may come out in an ExceptionGroup. Also when what is around the block is
    cancelled, the log works until the block is left: that is when runs say their last words.

    Every method is a checkpoint, but for `unwatch`.

    Each may be called by any number of tasks at a time; of one conversation, one task at a time appends under the
    lease. What is returned belongs to the caller.

    If one is cancelled, it may have done what was asked, or not. Raises `Unavailable` where the store does not answer
    or refuses; how long an engine may try before that is the business of the caller's cancel scopes.
    """

    shared: bool  # several instances can have the same store at a time
    immediate: bool  # it waits for nothing, and is an `ImmediateLog`

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """Let go of everything: leases, and what is attended."""

    async def check(self) -> None:
        """Find out whether the store can be written to. For readiness."""

    async def open(self, conversation: str) -> LogState:
        """Where a conversation stands. The epoch stays the same for as long as nothing was lost.

        Where retention has taken entries, `first` tells: that is no loss.
        """

    async def append(self, conversation: str, epoch: str, append: Append) -> tuple[Entry, bool]:
        """Add an event, give it the next seq and the time, and return once it is durable: (its entry, False).

        Nobody can read it before. If the key is not new in this conversation, add nothing and return (the first entry,
        True). If this is cancelled or raises, the event may be in the log or not; append it again with the same key to
        be certain.

        A `user_message` is a post: somebody has to answer it. Everything else belongs to a run and needs the lease.

        Raises:
            LeaseLost: the lease is no longer this instance's. Nothing was added.
            PastLost: the conversation has another epoch. Nothing was added.
            TypeError, ValueError, RecursionError: something in the event is not JSON.
        """

    async def find(self, conversation: str, key: str) -> Entry | None:
        """Return the entry that was added with this key; None where there is none."""

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        """Return the entries that follow seq `after`, in order, at most `limit`, at least one where there is any.

        They follow each other without a gap; the first is `after + 1`, or where retention has taken that, `first`.
        """

    async def watch(self, conversation: str, hear: Hear) -> None:
        """Have `hear(head, cancelled)` called after whatever other instances append, cancel, attend or release.

        `cancelled` is the id of the last run that anybody wanted cancelled. Nothing that is committed after this has
        returned is missed, though several changes may be told in one, late, or twice, also after a time without a
        connection to the store. What this instance does itself may be told or not. `hear` does not block and is called
        in a task of the log. There is one watcher for each conversation.
        """

    def unwatch(self, conversation: str) -> None:
        """Have it called no more. Not a checkpoint."""

    async def claim(self, conversation: str) -> Lease | None:
        """Take the lease, under a new token; None where it is the lease of another instance that is alive.

        Where it is this instance's already, the one before is lost.
        """

    async def release(self, conversation: str, lease: Lease, *, unanswered: bool = False) -> bool:
        """Give the lease back, so that others may claim it; False, and nothing done, where a post is not answered.

        With `unanswered` it is given back also then, for others to answer. Returns True where it is not this
        instance's any more.
        """

    async def cancel(self, conversation: str, run: str) -> None:
        """Tell the instance that holds the lease that a run is to be cancelled."""

    async def attend(self, conversation: str, attending: bool) -> None:
        """Say whether somebody follows the conversation at this instance."""

    async def attended(self, conversation: str) -> bool:
        """Whether it is attended at another instance that is alive."""

    async def unanswered(self, limit: int) -> list[str]:
        """At most `limit` conversations in which a post is not answered and no instance that is alive has the lease."""


class ImmediateLog(Log, Protocol):
    """A log that has nothing to wait for."""

    def append_nowait(self, conversation: str, epoch: str, append: Append) -> tuple[Entry, bool]:
        """Do what `append` does, which is a checkpoint and then this. Where it raises, nothing was added."""
