"""Wire protocol v1 of the chat: what the two sides say, as msgspec structs. Sans-I/O; `docs/protocol.md` is the prose.

`type` tells objects apart. Unknown fields are ignored, so either side may learn new ones. Two subprotocols carry the
same objects: `tricorn.v1`, one JSON object per message, and `tricorn.v1.batch`, one or more per message, one a line.
"""

from __future__ import annotations

from re import match
from typing import Annotated, Any, Literal, TypeGuard, dataclass_transform

import msgspec

SUBPROTOCOL = "tricorn.v1"
BATCH_SUBPROTOCOL = "tricorn.v1.batch"
SUBPROTOCOLS = (SUBPROTOCOL, BATCH_SUBPROTOCOL)  # of these, what a client offers first is agreed on

# Bytes of an event that are neither a text nor a tool's arguments or result: ids, names, times.
ENVELOPE = 2048

ErrorCode = Literal[
    "malformed",
    "unknown_type",
    "too_long",
    "too_many",
    "too_fast",
    "not_found",
    "closing",
    "unavailable",
    "internal",
]
Outcome = Literal["success", "failed", "cancelled", "abandoned", "timeout", "interrupted"]
AskOutcome = Literal["answered", "timeout", "cancelled", "interrupted"]

# Printable without separators or control characters: an id can stand in a log line, a key or a URL as it is.
_ID = r"\A[A-Za-z0-9._:~-]{1,128}\Z"
Id = Annotated[str, msgspec.Meta(pattern=_ID)]
Seq = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]  # a JSON number that JavaScript holds exactly


def is_id(value: object) -> TypeGuard[str]:
    """Return whether a value is an id."""
    return isinstance(value, str) and match(_ID, value) is not None


@dataclass_transform(frozen_default=True)  # subclasses are frozen too, which type checkers cannot know
class WireObject(msgspec.Struct, tag_field="type", frozen=True, omit_defaults=True):
    """Anything either side sends."""


# What a client says


class Authenticate(WireObject, tag="authenticate"):
    """Who is there, or still there: a new token for the same user. Answered with `welcome`."""

    token: str


class Open(WireObject, tag="open"):
    """Attach to a conversation and hear every event after `after`, the old ones first. Answered with `opened`.

    `epoch` is the one that `after` was counted in; where it is not the log's own, the replay starts from the beginning.
    Without it `after` is taken at its word.
    """

    conversation: Id
    after: Seq = 0
    epoch: str | None = None


class Post(WireObject, tag="post"):
    """Say something in a conversation. Answered with `posted`; a repeated `id` gets the first answer again."""

    id: Id
    conversation: Id
    text: str


class Cancel(WireObject, tag="cancel"):
    """End a run early. The run's `agent_completed` is the answer."""

    conversation: Id
    run: Id


class Answer(WireObject, tag="answer"):
    """Answer a question of an agent. The question's `agent_asked` is the answer, also if somebody else was faster."""

    conversation: Id
    ask: Id
    text: str


class Leave(WireObject, tag="leave"):
    """Detach from a conversation. No answer."""

    conversation: Id


class Ping(WireObject, tag="ping"):
    """Answered with `pong`."""


ClientRequest = Authenticate | Open | Post | Cancel | Answer | Leave | Ping


# What the server answers


class Limits(msgspec.Struct, frozen=True):
    """What the server takes: past `message_bytes` it closes with 1009, past the others it answers with `error`.

    `event_bytes` is what a client must be able to take: no event is longer.
    """

    message_bytes: int
    event_bytes: int
    text_characters: int
    open_conversations: int
    user_runs: int
    posts_per_minute: int


class Welcome(WireObject, tag="welcome"):
    """First on every connection, once it is known who is there.

    `heartbeat` is in seconds: silence for twice as long means a lost connection.
    """

    connection: str
    user: str
    heartbeat: float
    limits: Limits
    expires_at: float | None = None


class Opened(WireObject, tag="opened"):
    """The conversation's `epoch`, and the first and last sequence number in its log.

    Events after the client's cursor follow; where it is behind `first`, those from `first` on.
    """

    conversation: str
    epoch: str
    head: int
    first: int = 1


class Posted(WireObject, tag="posted"):
    """The post is in the log as event `seq`. Sent only after that is so."""

    id: str
    conversation: str
    seq: int


class Error(WireObject, tag="error"):
    """A request was refused: `code` for programs, `message` for people.

    `ref` is the post, question or conversation that it is about. With `retry_after`, the same request may succeed after
    so many seconds.
    """

    code: ErrorCode
    message: str
    ref: str | None = None
    error_id: str | None = None
    retry_after: float | None = None


class Heartbeat(WireObject, tag="heartbeat"):
    """Sent when nothing else was for `welcome.heartbeat` seconds: a browser cannot see pings."""


class Pong(WireObject, tag="pong"):
    """The answer to `ping`."""


class Closing(WireObject, tag="closing"):
    """The server is about to close this connection, unless a token that expires is renewed.

    Come back after `retry_after` seconds.
    """

    reason: str
    retry_after: float


# The events of a conversation


class ConversationEvent(WireObject, kw_only=True):
    """One entry of a conversation's log: `seq` counts from 1 without gaps, `at` is in seconds since the Unix epoch."""

    conversation: str
    seq: int
    at: float


class RunEvent(ConversationEvent, kw_only=True):
    """An event that belongs to a run."""

    run: str


class UserMessage(ConversationEvent, tag="user_message", kw_only=True):
    """What a person wrote; `id` is the id of the post, new for each of the `user`'s."""

    id: str
    user: str
    text: str


class AgentStarted(RunEvent, tag="agent_started", kw_only=True):
    """First of a run; `post` is the id of the post that it answers, `post_seq` its place in the log.

    A run that another one has begun has its `parent`, and answers no post: `post` is empty and `post_seq` is 0, so that
    who does not know of parents does not take it for the answer.
    """

    agent: str
    post: str
    post_seq: int
    parent: str | None = None


class AgentThinking(RunEvent, tag="agent_thinking", kw_only=True):
    """What the agent is about."""

    text: str


class ToolExecuting(RunEvent, tag="tool_executing", kw_only=True):
    """A tool starts. Followed by one `tool_completed` of the same `call` before the run ends."""

    call: str
    tool: str
    arguments: dict[str, Any]


class ToolCompleted(RunEvent, tag="tool_completed", kw_only=True):
    """A tool is done: with a `result`, or with an `error` that says why not."""

    call: str
    tool: str
    seconds: float
    result: Any = None
    error: str | None = None


class AgentAsking(RunEvent, tag="agent_asking", kw_only=True):
    """The agent asks whoever follows, and waits `until` then, in seconds since the Unix epoch.

    Followed by one `agent_asked` of the same `ask` before the run ends. If there are `choices`, the answer is one.
    """

    ask: str
    text: str
    until: float
    choices: list[str] | None = None


class AgentAsked(RunEvent, tag="agent_asked", kw_only=True):
    """A question is over: with the first `answer`, which `user` gave, or without one."""

    ask: str
    outcome: AskOutcome
    answer: str | None = None
    user: str | None = None


class AgentMessage(RunEvent, tag="agent_message", kw_only=True):
    """A piece of the answer, as it streams."""

    text: str


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens that a run took: `input` in all, `cached` of them from a cache, and `output`."""

    input: int
    output: int
    cached: int = 0


class AgentCompleted(RunEvent, tag="agent_completed", kw_only=True):
    """Last of a run, exactly once, and after those of its children.

    `error_id` names the report of a failure, and `error` says why, for people.

    `text` is the whole answer, left out where that would make the event too long.
    """

    outcome: Outcome
    seconds: float
    text: str | None = None
    error: str | None = None
    error_id: str | None = None
    usage: Usage | None = None


Reply = Welcome | Opened | Posted | Error | Heartbeat | Pong | Closing
AnyEvent = (
    UserMessage
    | AgentStarted
    | AgentThinking
    | ToolExecuting
    | ToolCompleted
    | AgentAsking
    | AgentAsked
    | AgentMessage
    | AgentCompleted
)
