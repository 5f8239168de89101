"""What the chat needs from a log: an ordered, durable record of every conversation, and who answers in it.

A `Log` is one instance's access to a store that several instances may share. For each conversation the store keeps its
entries, numbered from 1; its *epoch*, which changes if entries are lost; the last post that was *answered*; the holder
of its *lease*, which is the right to answer; and the instances that *attend* it because clients follow it there.

A lease belongs to an instance for as long as the instance renews it in the store. At most `lease` seconds after the
last renewal others can have it. Each lease has a higher token than the one before, and an append under a lease that
another instance has taken over is refused: an instance that comes too late cannot write into a run that others ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from secrets import token_hex
from time import time
from types import TracebackType
from typing import NamedTuple, Protocol, Self, runtime_checkable

from msgspec import Struct
from msgspec.json import Encoder
from msgspec.structs import force_setattr

from tricorn.chat.protocol import AnyEvent, UserMessage

PROBLEMS = 100  # that an examination tells
RESTORED = "it was restored from a copy: its conversations have got another epoch, so that clients start over"

_encode = Encoder().encode


class Unavailable(Exception):
    """The log cannot do this now, but may be able to later. The text is one line that tells operators why."""


def too_slow(seconds: float) -> Unavailable:
    """Return what is raised if the log has not answered within so many seconds."""
    return Unavailable(f"the log did not answer within {seconds:g} s")


class LeaseLost(Exception):
    """This instance no longer has the right to answer in this conversation."""


class PastLost(Exception):
    """The log has lost entries: the conversation's epoch has changed."""


class Entry(Struct, frozen=True, order=True, gc=False):
    """An event of a conversation in the log, encoded once for all readers."""

    seq: int
    json: bytes


class Draft(NamedTuple):
    """An event that has its time but not its seq: the JSON before the seq, and after it."""

    before: bytes
    after: bytes

    def entry(self, seq: int) -> Entry:
        return Entry(seq, b"%b%d%b" % (self.before, seq, self.after))


def stamp(event: AnyEvent, seq: int) -> Entry:
    """Give an event its seq and the time, in seconds since the Unix epoch, and encode it.

    Raises TypeError, ValueError or RecursionError if something in the event is not JSON.
    """
    # The struct is frozen, but a copy would cost more than everything else here.
    force_setattr(event, "seq", seq)
    force_setattr(event, "at", time())
    return Entry(seq, _encode(event))


def draft(event: AnyEvent) -> Draft:
    """Give an event the time, and encode it for a store that assigns the seq. Raises what `stamp` does."""
    before, seq, after = stamp(event, 0).json.partition(_SEQ)
    return Draft(before + seq[:-1], after)


_SEQ = b'"seq":0'  # the first occurrence is the field: only the type and an id precede it


class LogState(NamedTuple):
    """How far a conversation has come.

    `first` and `head` are the seqs of the first and last entry that the log still has. For a new conversation `head` is
    0; if the log has no entries, `first` is `head + 1`. `answered` is the seq of the last post whose run has ended.
    """

    epoch: str
    first: int
    head: int
    answered: int


@dataclass
class Lease:
    """The right of one instance to answer in a conversation. `appended` counts the appends under it."""

    token: int
    appended: int = 0


class Append(Struct, frozen=True, gc=False):
    """What one append adds, and under which conditions.

    Attributes:
        event: what is added; it gets its seq and its time.
        key: if the conversation has an entry with this key already, nothing is added.
        lease: under which a run's event is added; None for what a client says: a post, or the answer to a question.
        answered: the seq of the post that is answered with this event, the last of its run.
    """

    event: AnyEvent
    key: str | None = None
    lease: Lease | None = None
    answered: int | None = None

    @property
    def is_post(self) -> bool:
        return isinstance(self.event, UserMessage)

    def identify(self) -> tuple[str | None, int | None, int | None]:
        """Return the key, the lease's token and a number, by which a store recognizes this append if it gets it twice.

        An engine that does not know whether an append arrived sends it again with the same three.
        """
        if self.lease is None:
            return f"once:{token_hex(8)}" if self.key is None else self.key, None, None
        self.lease.appended += 1
        return self.key, self.lease.token, self.lease.appended


class Retention(NamedTuple):
    """What a log may forget: all but the last `events` of a conversation, and entries older than `seconds`.

    While a post is unanswered, the log keeps all entries after `answered`. An entry's key is forgotten with it.
    """

    events: float = inf
    seconds: float = inf


KEEP_EVERYTHING = Retention()


OnChange = Callable[[int, str], None]  # takes the head, and the id of the last run that was to be cancelled


class Log(Protocol):
    """The log as one instance sees it: an async context manager, open inside its block.

    As with a nursery, what the block raises may come out in an ExceptionGroup. The log works until the block is left,
    even if a scope around the block is cancelled: that is when runs say their last words.

    Every method except `unwatch` is a checkpoint. If it is cancelled, it may have taken effect or not. It raises
    `Unavailable` if the store refuses, or if its driver raises what no driver should; that is reported, and is the
    cause. If the store does not answer, the engine keeps trying: use a cancel scope to limit that. Only `append` may
    be `punctual`, since a scope for each event would cost more than the rest of it.

    Any number of tasks may call methods at a time, but in one conversation only one task at a time may append under the
    lease. What is returned belongs to the caller.
    """

    shared: bool  # several instances can have the same store at a time
    immediate: bool  # it never waits, and is an `ImmediateLog`
    punctual: bool  # `append` raises Unavailable by itself if the store does not answer within `log_timeout`

    @property
    def problem(self) -> str:
        """Why the store does not answer, as far as that is known: one line for operators."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """Let go of everything: leases, and attended conversations."""

    async def check(self) -> None:
        """Check that the store can be written to. For readiness."""

    async def open(self, conversation: str) -> LogState:
        """Return how far a conversation has come. The epoch stays the same until entries are lost.

        Entries that retention has removed are not lost: `first` says where the rest begins.
        """

    async def append(self, conversation: str, epoch: str, append: Append) -> tuple[Entry, bool]:
        """Add an event, give it the next seq and the time, and return once it is durable: (its entry, False).

        Nobody can read it before. If the key is not new in this conversation, add nothing and return (the first entry,
        True). If this is cancelled or raises, the event may be in the log or not; append it again with the same key to
        be certain.

        A `user_message` is a post: somebody has to answer it. It has no lease, nor has the answer to a question of a
        run. Everything else belongs to a run and needs the lease.

        Raises:
            LeaseLost: the lease is no longer this instance's. Nothing was added.
            PastLost: the conversation has another epoch. Nothing was added.
            TypeError, ValueError, RecursionError: something in the event is not JSON.
        """

    async def find(self, conversation: str, key: str) -> Entry | None:
        """Return the entry that was added with this key, or None."""

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        """Return the entries that follow seq `after`, in order and without a gap: at most `limit`, at least one if any.

        They begin with `after + 1`, or with `first` if retention has removed that.
        """

    async def watch(self, conversation: str, on_change: OnChange) -> None:
        """Have `on_change(head, cancelled)` called after other instances append, cancel, attend or release.

        `cancelled` is the id of the last run that anybody wanted to cancel. Every change that is committed after this
        has returned is reported, even if the connection to the store was lost meanwhile; several changes may be
        reported in one call, late, or twice. This instance's own changes may be reported or not. `on_change` must not
        block; a task of the log calls it. There is one watcher for each conversation.
        """

    def unwatch(self, conversation: str) -> None:
        """Stop watching. Not a checkpoint."""

    async def claim(self, conversation: str) -> Lease | None:
        """Take the lease under a new token. Return None if another instance that is alive has it.

        If this instance has the lease already, the new one replaces it.
        """

    async def release(self, conversation: str, lease: Lease, *, unanswered: bool = False) -> bool:
        """Give the lease back so that others may claim it, and return True.

        If a post is unanswered, keep the lease and return False, unless `unanswered` says to leave that post to others.
        If this instance no longer has the lease, return True.
        """

    async def cancel(self, conversation: str, run: str) -> None:
        """Ask the instance that holds the lease to cancel a run."""

    async def attend(self, conversation: str, attending: bool) -> None:
        """Say whether clients follow the conversation at this instance."""

    async def attended(self, conversation: str) -> bool:
        """Return whether another instance that is alive attends the conversation."""

    async def unanswered(self, limit: int) -> list[str]:
        """Return conversations with an unanswered post whose lease no living instance has, at most `limit`."""


class Examined(NamedTuple):
    """What a store has, and what is wrong with it: one line for each problem, of which not all may be there."""

    conversations: int
    entries: int
    problems: list[str]


def incomplete(key: str, first: int, head: int, count: int, least: int | None, most: int | None) -> str:
    """Describe a conversation that has not the entries that it should have."""
    found = f"{count} from {least} to {most}" if count else "none"
    return f"conversation {key!r} should have the entries {first} to {head}, and has {found}"


@runtime_checkable
class Maintained(Protocol):
    """A log whose store outlives the process, for operators. It must not be open; each method opens and closes it.

    Both raise Unavailable if the store cannot be used.
    """

    async def examine(self) -> Examined:
        """Look whether each conversation has all the entries that it should have."""

    async def renew_epochs(self) -> None:
        """Give each conversation another epoch, since entries are lost: whoever knew them starts over."""


class ImmediateLog(Log, Protocol):
    """A log that never has to wait."""

    def append_nowait(self, conversation: str, epoch: str, append: Append) -> tuple[Entry, bool]:
        """Do what `append` does, but without its checkpoint. If it raises, nothing was added."""
