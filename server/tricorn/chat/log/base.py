"""What the chat asks of a log: an ordered, durable record of every conversation."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from msgspec.json import Encoder
from msgspec.structs import replace

from tricorn.chat.protocol import AnyEvent

_encode = Encoder().encode


class Entry(NamedTuple):
    """One event of a conversation as it stands in the log: encoded once, however many read it."""

    seq: int
    json: bytes


def entry(event: AnyEvent, seq: int, at: float) -> Entry:
    """Stamp an event with its place in the log and its time, in seconds since the Unix epoch, and encode it.

    Raises TypeError, ValueError or RecursionError where something in the event is not JSON.
    """
    return Entry(seq, _encode(replace(event, seq=seq, at=at)))


class Log(Protocol):
    """Where events are kept. Every method is a checkpoint, and may be called by any number of tasks at a time.

    What is returned belongs to the caller. Any exception says that the log could not do what was asked.
    """

    async def open(self, conversation: str) -> tuple[str, int]:
        """Return the conversation's epoch and the seq of its last entry, 0 where it has none.

        The epoch stays the same for as long as every entry ever returned is still there.
        """

    async def append(self, conversation: str, event: AnyEvent, key: str | None = None) -> tuple[Entry, bool]:
        """Add an event, give it the next seq and the time, and return once it is durable: (its entry, False).

        Where `key` was given before in this conversation, nothing is added: (the first entry, True). If this is
        cancelled or raises, the event may be in the log or not; asking again with the same key makes it certain.
        """

    async def find(self, conversation: str, key: str) -> Entry | None:
        """Return the entry that was added with this key; None where there is none."""

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        """Return the entries that follow seq `after`, in order, at most `limit`, at least one where there is any."""
