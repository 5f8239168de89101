"""Memory for the ends of conversations, shared by all of an instance: readers who lag by little ask no log."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

TAIL_BYTES = 32 * 1024 * 1024  # of entries that all conversations of an instance keep in memory
ENTRY_BYTES = 120  # that an entry takes in memory besides its JSON


class Tailed(Protocol):
    """A conversation that keeps the end of its log in memory. Hashable."""

    def drop_tail(self) -> int:
        """Forget it, and return how many bytes it took."""


class Tails:
    """What conversations keep in memory, the one that was read least recently first.

    A tail that begins counts as read: who follows is about to.

    Attributes:
        size: bytes that all of them take.
        budget: bytes that they may take.
    """

    def __init__(self, budget: int = TAIL_BYTES) -> None:
        self.size = 0
        self.budget = budget
        self._order: OrderedDict[Tailed, None] = OrderedDict()

    def read(self, conversation: Tailed) -> None:
        """Somebody has read this one now, or its tail begins."""
        self._order[conversation] = None
        self._order.move_to_end(conversation)

    def shrink(self) -> None:
        """Forget those that were read least recently, until the rest is within the budget."""
        while self.size > self.budget and self._order:
            conversation, _ = self._order.popitem(last=False)
            self.size -= conversation.drop_tail()

    def discard(self, conversation: Tailed, size: int) -> None:
        """Count this one, which takes so many bytes, no longer: it ends."""
        self._order.pop(conversation, None)
        self.size -= size
