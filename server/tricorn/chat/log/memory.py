"""A log in memory: it forgets everything when the process ends."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from secrets import token_hex
from time import time

from trio.lowlevel import checkpoint

from tricorn.chat.log.base import Entry, entry
from tricorn.chat.protocol import AnyEvent


@dataclass
class _Past:
    epoch: str = field(default_factory=lambda: token_hex(8))
    entries: list[Entry] = field(default_factory=list)
    keys: dict[str, Entry] = field(default_factory=dict)


class MemoryLog:
    """Keeps every conversation for as long as it lives itself. If a call is cancelled, nothing was done."""

    def __init__(self) -> None:
        self._conversations: defaultdict[str, _Past] = defaultdict(_Past)

    async def open(self, conversation: str) -> tuple[str, int]:
        await checkpoint()
        past = self._conversations[conversation]
        return past.epoch, len(past.entries)

    async def append(self, conversation: str, event: AnyEvent, key: str | None = None) -> tuple[Entry, bool]:
        await checkpoint()
        past = self._conversations[conversation]
        if key is not None and key in past.keys:
            return past.keys[key], True
        added = entry(event, len(past.entries) + 1, time())
        past.entries.append(added)
        if key is not None:
            past.keys[key] = added
        return added, False

    async def find(self, conversation: str, key: str) -> Entry | None:
        await checkpoint()
        return self._conversations[conversation].keys.get(key)

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        await checkpoint()
        return self._conversations[conversation].entries[after : after + limit]
