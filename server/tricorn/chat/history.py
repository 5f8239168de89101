"""What was said in a conversation before a run, read from its log: what an agent remembers.

The log is read backwards from the start of the run, a few entries at a time, until there is enough. So the history is
the same at every instance and after a restart, and a long conversation costs no more than a short one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from msgspec import Struct
from msgspec.json import Decoder, Encoder
from trio.lowlevel import checkpoint

from tricorn.chat.logs.base import Entry, Unavailable
from tricorn.chat.protocol import AgentAsked, AgentAsking, Outcome, UserMessage

TURNS, CHARACTERS = 50, 40_000  # of a history, if nobody says another number
CHUNK = 128  # entries that are read at a time
ENTRIES = 32_768  # that are read at most, however little they come to


class ToolCall(Struct, frozen=True):
    """The use of a tool. `error` says why it failed, as people were shown it; None if it did not."""

    tool: str
    arguments: dict[str, Any]
    result: Any = None
    error: str | None = None


class Asked(Struct, frozen=True):
    """A question that a run asked people. `answer` is None if nobody answered in time, or it was ended before."""

    text: str
    answer: str | None = None


class Turn(Struct, frozen=True):
    """A post that was answered, and what its run came to.

    Attributes:
        user: who posted.
        text: what they wrote.
        at: when, in seconds since the Unix epoch.
        answer: what the agent said. If the run did not succeed, what it had said until then.
        outcome: how the run ended.
        tools: those that it used, in the order in which they started.
        error: what people were told about why it failed.
        asks: questions that it asked people, in that order.
    """

    user: str
    text: str
    at: float
    answer: str
    outcome: Outcome
    tools: tuple[ToolCall, ...] = ()
    error: str | None = None
    asks: tuple[Asked, ...] = ()


class Past(Protocol):
    """A conversation's log, for reading. Raises Unavailable if it does not answer."""

    async def find(self, key: str) -> Entry | None: ...

    async def read(self, after: int, limit: int) -> Sequence[Entry]: ...


async def read_history(past: Past, key: str, turns: int, characters: int) -> list[Turn]:
    """Return the turns before the run whose `agent_started` has this key: the last ones, in order.

    These are at most `turns`, with at most `characters` characters of texts, answers, tools' arguments and results. The
    last one is always there, cut if need be. A turn whose post the log has forgotten is none. A checkpoint.

    Raises Unavailable if the log does not answer, or has no such run any more.
    """
    await checkpoint()
    start = await past.find(key)
    if start is None:
        raise Unavailable("the log has lost the start of this run")
    found: deque[Turn] = deque()
    run: _Run | None = None
    before, oldest = start.seq, start.seq - ENTRIES
    while before > 1 and len(found) < turns and characters > 0:
        chunk = await _read_before(past, before, oldest)
        if not chunk:
            break
        before = chunk[0].seq
        for entry in reversed(chunk):
            if run is None:
                run = _Run.ended_by(entry, characters)
                continue
            post_seq = run.take(entry)
            if run.characters > characters and found:
                return list(found)
            if post_seq is None:
                continue
            post = await _read_post(past, post_seq, chunk)
            if post is None:
                return list(found)
            spent = run.characters + len(post.text)
            if spent > characters and found:
                return list(found)
            found.appendleft(run.turn(post, characters))
            run, characters = None, characters - spent
            if len(found) == turns or characters <= 0:
                break
    return list(found)


async def _read_before(past: Past, before: int, oldest: int) -> list[Entry]:
    """Return the entries just before one, in order: fewer than `CHUNK` if the log begins there, or at `oldest`."""
    after = max(before - 1 - CHUNK, oldest - 1, 0)
    chunk: list[Entry] = []
    while after < before - 1:
        entries = await past.read(after, before - 1 - after)
        if not entries or entries[0].seq >= before:  # the log has forgotten them
            break
        chunk += entries
        after = entries[-1].seq
    return chunk


async def _read_post(past: Past, seq: int, chunk: Sequence[Entry]) -> UserMessage | None:
    """Return the post with this seq, which may be in the chunk; None if the log has forgotten it."""
    at = seq - chunk[0].seq
    entries = chunk[at : at + 1] if at >= 0 else await past.read(seq - 1, 1)
    return _decode_post(entries[0].json) if entries and entries[0].seq == seq else None


class _Event(Struct):
    """What matters here of any event, also of one that this version does not know."""

    type: str
    run: str = ""
    post_seq: int = 0
    call: str = ""
    tool: str = ""
    arguments: dict[str, Any] = {}
    result: Any = None
    error: str | None = None
    text: str | None = None
    outcome: Outcome = "success"


class _Run:
    """A run that is read from its end to its start. More than `room` characters of an answer are not kept.

    Attributes:
        characters: what its answer, its tools and its questions come to, so far.
    """

    def __init__(self, end: _Event, room: int) -> None:
        self.characters = 0
        self._end = end
        self._room = room
        self._pieces: deque[str] = deque()  # of the answer
        self._ended: dict[str, _Event] = {}  # tools whose start has not come yet
        self._tools: deque[ToolCall] = deque()
        self._answers: dict[str, str | None] = {}  # to questions that have not come yet
        self._asks: deque[Asked] = deque()
        if end.text:
            self._add(end.text)

    @classmethod
    def ended_by(cls, entry: Entry, room: int) -> _Run | None:
        """Return the run that ends with an entry, if that is the end of one."""
        return cls(_decode(entry.json), room) if entry.json.startswith(_ENDS) else None

    def take(self, entry: Entry) -> int | None:
        """Take in the entry before. Return the seq of the run's post if it is the run's start."""
        if entry.json.startswith(_THOUGHT) or (self._end.text and entry.json.startswith(_SPOKEN)):
            return None
        if entry.json.startswith(_ASKS):
            self._take_ask(_decode_ask(entry.json))
            return None
        event = _decode(entry.json)
        if event.run != self._end.run:
            return None
        if event.type == "agent_started":
            return event.post_seq
        if event.type == "agent_message" and event.text:
            self._add(event.text)
        elif event.type == "tool_completed":
            self._ended[event.call] = event
        elif event.type == "tool_executing":
            ended = self._ended.pop(event.call, event)
            self._tools.appendleft(ToolCall(event.tool, event.arguments, ended.result, ended.error))
            self.characters += len(event.tool) + len(_encode([event.arguments, ended.result, ended.error]))
        return None

    def turn(self, post: UserMessage, characters: int) -> Turn:
        """Return the turn that this run and its post are. If that is too long, leave out tools and
        questions, then cut the answer."""
        text, answer, tools, asks = post.text, "".join(self._pieces), tuple(self._tools), tuple(self._asks)
        if len(text) + self.characters > characters:
            text, tools, asks = text[:characters], (), ()
            room = characters - len(text)
            answer = answer[max(0, len(answer) - room) :]
        end = self._end
        return Turn(post.user, text, post.at, answer, end.outcome, tools, end.error, asks)

    def _take_ask(self, event: AgentAsking | AgentAsked) -> None:
        if event.run != self._end.run:
            return
        if isinstance(event, AgentAsked):
            self._answers[event.ask] = event.answer
            return
        answer = self._answers.pop(event.ask, None)
        self._asks.appendleft(Asked(event.text, answer))
        self.characters += len(event.text) + len(answer or "")

    def _add(self, text: str) -> None:
        if self.characters <= self._room:
            self._pieces.appendleft(text)
        self.characters += len(text)


_encode = Encoder().encode
_decode = Decoder(_Event).decode
_decode_post = Decoder(UserMessage).decode
_decode_ask = Decoder(AgentAsking | AgentAsked).decode
_ENDS = b'{"type":"agent_completed"'
_THOUGHT = b'{"type":"agent_thinking"'
_ASKS = (b'{"type":"agent_asking"', b'{"type":"agent_asked"')
_SPOKEN = b'{"type":"agent_message"'
