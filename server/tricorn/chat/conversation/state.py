"""What a conversation's log says about its posts and runs: which are not answered, and which goes on. Sans-I/O.

Every instance folds the same entries and so comes to the same view: what waits, what can be cancelled, and where
another instance has to go on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec import Struct
from msgspec.json import Decoder

from tricorn.chat.logs.base import Entry, LogState


class Asked(NamedTuple):
    """A post and its seq in the log."""

    seq: int
    id: str
    user: str
    text: str


class OpenCall(NamedTuple):
    """A tool at work, since `at` in seconds since the Unix epoch."""

    id: str
    tool: str
    at: float


@dataclass
class OpenRun:
    """A run that has no end yet, since `at` in seconds since the Unix epoch. It answers the post with seq `post`."""

    id: str
    post: int
    at: float
    calls: dict[str, OpenCall] = field(default_factory=dict)


class ConversationState:
    """What the entries up to and with `seq` come to.

    Attributes:
        posts: those that are not answered, in order. That of the run that goes on is the first.
        run: the one that goes on.
        answered: the seq of the last post that is answered.
        turns: how often one of these changed, counted on from what it is made with.
    """

    def __init__(self, state: LogState, turns: int = 0) -> None:
        self.seq = max(state.answered, state.first - 1)  # nothing before that matters
        self.answered = state.answered
        self.posts: deque[Asked] = deque()
        self.run: OpenRun | None = None
        self.turns = turns

    @property
    def waiting(self) -> int:
        """How many posts wait for their run to start."""
        return len(self.posts) - (self.run is not None)

    def fold(self, entry: Entry) -> None:
        """Take in the entry that comes next."""
        self.seq = entry.seq
        if entry.json.startswith(_SPOKEN):
            return
        event = _decode(entry.json)
        run = self.run if self.run is not None and self.run.id == event.run else None
        if event.type == "user_message":
            self.posts.append(Asked(entry.seq, event.id, event.user, event.text))
            self.turns += 1
        elif event.type == "agent_started" and event.post_seq > self.answered:
            self.run = OpenRun(event.run, event.post_seq, event.at)
            self.turns += 1
        elif event.type == "tool_executing" and run is not None:
            run.calls[event.call] = OpenCall(event.call, event.tool, event.at)
        elif event.type == "tool_completed" and run is not None:
            run.calls.pop(event.call, None)
        elif event.type == "agent_completed" and run is not None:
            self.run, self.answered = None, run.post
            self.turns += 1
            while self.posts and self.posts[0].seq <= self.answered:
                self.posts.popleft()


def started_key(post: int) -> str:
    """The key of the start of the run that answers the post with this seq: whoever starts it, it starts once."""
    return f"run:{post}"


def completed_key(id: str) -> str:
    """The key of the end of a run or of a call: whoever ends it, it ends once."""
    return f"{id}:completed"


class _Event(Struct):
    """What of any event matters here."""

    type: str
    at: float
    run: str = ""
    id: str = ""
    user: str = ""
    text: str = ""
    post_seq: int = 0
    call: str = ""
    tool: str = ""


_decode = Decoder(_Event).decode
_SPOKEN = (b'{"type":"agent_message"', b'{"type":"agent_thinking"')  # most of what there is, and it changes nothing
