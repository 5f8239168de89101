"""Who hears of what other instances do."""

from __future__ import annotations

from tricorn.chat.logs.base import OnChange


class Watchers:
    """The watchers of one instance, one for each conversation.

    `known` has the highest seq that this instance has seen in each watched conversation: a store whose head is lower
    has lost entries.
    """

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self._on_change: dict[str, OnChange] = {}

    def watch(self, conversation: str, on_change: OnChange) -> None:
        self._on_change[conversation] = on_change
        self.known[conversation] = 0

    def unwatch(self, conversation: str) -> bool:
        """Return whether it was watched."""
        self.known.pop(conversation, None)
        return self._on_change.pop(conversation, None) is not None

    def saw(self, conversation: str, seq: int) -> None:
        """Take note that the log has an entry with this seq."""
        if seq > self.known.get(conversation, seq):
            self.known[conversation] = seq

    def tell(self, conversation: str, head: int, cancelled: str) -> None:
        on_change = self._on_change.get(conversation)
        if on_change is not None:
            on_change(head, cancelled)
