"""What the entries of a log add up to: which posts are not answered, and which run is in progress. Sans-I/O.

Every instance folds the same entries and so arrives at the same state: what waits, what can be cancelled, and where
another instance has to take over.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec import Struct
from msgspec.json import Decoder

from tricorn.chat.logs.base import Entry, LogState
from tricorn.chat.protocol import AgentAsked, AgentAsking, UserMessage


class OpenCall(NamedTuple):
    """A tool at work in a run, since `at` in seconds since the Unix epoch."""

    run: str
    id: str
    tool: str
    at: float


class OpenAsk(NamedTuple):
    """A question that waits for its answer: one of `choices`, or any text if there are none."""

    run: str
    id: str
    choices: tuple[str, ...]


class Asked(NamedTuple):
    """A question that is over, and the answer, if there was one."""

    id: str
    answer: str | None


@dataclass
class OpenRun:
    """A run that has no end yet, since `at` in seconds since the Unix epoch. It answers the post with seq `post`.

    Attributes:
        children: when those began that it, or its children, have begun, by id, in that order.
        calls: tools at work, by id, also of its children.
        asks: questions that wait, by id, also of its children.
        asked: the question that was the last to end.
    """

    id: str
    post: int
    at: float
    children: dict[str, float] = field(default_factory=dict)
    calls: dict[str, OpenCall] = field(default_factory=dict)
    asks: dict[str, OpenAsk] = field(default_factory=dict)
    asked: Asked | None = None

    def has(self, run: str) -> bool:
        """Return whether a run is this one, or one of its children that has no end yet."""
        return run == self.id or run in self.children


class ConversationState:
    """What the entries up to and including `seq` add up to.

    Attributes:
        posts: those that are not answered, in order. The first is that of the run in progress.
        run: the one in progress.
        answered: the seq of the last post that is answered.
    """

    def __init__(self, state: LogState) -> None:
        self.seq = max(state.answered, state.first - 1)  # nothing before that matters
        self.answered = state.answered
        self.posts: deque[UserMessage] = deque()
        self.run: OpenRun | None = None

    @property
    def waiting(self) -> int:
        """How many posts wait for their run to start."""
        return len(self.posts) - (self.run is not None)

    @property
    def due(self) -> bool:
        """Whether a post needs an answer, or a run of an instance that has died needs an end."""
        return bool(self.posts) or self.run is not None

    def fold(self, entry: Entry) -> bool:
        """Take in the next entry; return whether it changed `posts`, `run`, its `asked`, or `answered`."""
        self.seq = entry.seq
        if entry.json.startswith(_SPOKEN):
            return False
        event = _decode(entry.json)
        run = self.run if self.run is not None and self.run.has(event.run) else None
        if event.type == "user_message":
            self.posts.append(_decode_post(entry.json))
        elif event.type == "agent_started" and event.parent:
            if self.run is not None and self.run.has(event.parent):
                self.run.children[event.run] = event.at
            return False
        elif event.type == "agent_started" and event.post_seq > self.answered:
            self.run = OpenRun(event.run, event.post_seq, event.at)
        elif event.type == "tool_executing" and run is not None:
            run.calls[event.call] = OpenCall(event.run, event.call, event.tool, event.at)
            return False
        elif event.type == "tool_completed" and run is not None:
            run.calls.pop(event.call, None)
            return False
        elif event.type == "agent_asking" and run is not None:
            run.asks[event.ask] = OpenAsk(event.run, event.ask, tuple(_decode_asking(entry.json).choices or ()))
            return False
        elif event.type == "agent_asked" and run is not None:
            run.asks.pop(event.ask, None)
            run.asked = Asked(event.ask, _decode_asked(entry.json).answer)
        elif event.type == "agent_completed" and run is not None and event.run in run.children:
            del run.children[event.run]
            return False
        elif event.type == "agent_completed" and run is not None:
            self.run, self.answered = None, run.post
            while self.posts and self.posts[0].seq <= self.answered:
                self.posts.popleft()
        else:
            return False
        return True


class _Event(Struct):
    """What matters here of any event, also of one that this version does not know."""

    type: str
    at: float
    run: str = ""
    parent: str | None = None
    post_seq: int = 0
    call: str = ""
    tool: str = ""
    ask: str = ""


_decode = Decoder(_Event).decode
_decode_post = Decoder(UserMessage).decode
_decode_asking = Decoder(AgentAsking).decode
_decode_asked = Decoder(AgentAsked).decode
_SPOKEN = (b'{"type":"agent_message"', b'{"type":"agent_thinking"')  # most events, and they change nothing here
