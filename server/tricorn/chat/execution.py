"""One run as the host sees it: from its start to its end in the log, whatever the agent does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from itertools import count
from math import inf
from secrets import token_hex
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from msgspec import Raw
from msgspec.json import Encoder
from trio import (
    Cancelled,
    CancelScope,
    TooSlowError,
    WouldBlock,
    current_effective_deadline,
    current_time,
    fail_after,
)
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from tricorn.chat.logs.base import Append, Lease
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.protocol import (
    ENVELOPE,
    AgentCompleted,
    AgentMessage,
    AgentStarted,
    AgentThinking,
    AnyEvent,
    Outcome,
    ToolCompleted,
    ToolExecuting,
    UserMessage,
)
from tricorn.chat.settings import ChatSettings
from tricorn.chat.tools import TOOL_ENDED, TOOL_FAILED, TOOL_LEFT_OPEN, TOOL_NAME_MAX, shown
from tricorn.errors.report import report_error
from tricorn.errors.text import note, title

LAST_WORDS = 2.0  # seconds for what must not be missing in the log, when nobody can be made to wait for it
SAID_AT_ONCE = 64  # events, before other tasks get their turn, if the log does not wait
ESCAPED = 6  # bytes that one ASCII character has in JSON, at most

_NOT_FAILURES = (KeyboardInterrupt, SystemExit)  # these are not an agent's to fail with
_encode = Encoder().encode

Cause = Literal["cancelled", "interrupted"]
R = TypeVar("R")


class Appender(Protocol):
    """Appends a run's events to the log."""

    async def append(self, append: Append) -> None: ...

    def append_nowait(self, append: Append) -> None:
        """Append at once; raises WouldBlock if that is not possible."""


class Call(NamedTuple):
    """A tool at work, since `began` in Trio's time."""

    id: str
    tool: str
    began: float


def started_key(post: int) -> str:
    """The key of the start of the run that answers the post with this seq: whoever starts it, it starts once."""
    return f"run:{post}"


def completed_key(id: str) -> str:
    """The key of the end of a run or of a call: whoever ends it, it ends once."""
    return f"{id}:completed"


class Execution:
    """Performs an agent on a post, for at most `run_timeout` seconds, under a lease. The agent holds a `Run` of it.

    Attributes:
        over: it takes no more events from the agent, although its last ones may still be on their way.
    """

    def __init__(
        self, post: UserMessage, lease: Lease | None, log: Appender, settings: ChatSettings, metrics: ChatMetrics
    ) -> None:
        self.id = token_hex(8)
        self.post = post
        self.over = False
        self._lease = lease
        self._log = log
        self._metrics = metrics
        self._scope = CancelScope(relative_deadline=settings.run_timeout)
        self._cause: Cause | None = None
        self._abandoned = False
        self._room = settings.event_bytes - ENVELOPE
        self._answer: list[str] = []
        self._answer_characters = 0
        self._said = 0
        self._numbers = count(1)
        self._calls: dict[str, Call] = {}  # tools in progress
        self._owed: dict[str, Append] = {}  # by key: what must be in the log before the end, and may not be there yet

    async def perform(self, agent: Callable[[R], Awaitable[None]], run: R) -> None:
        """Let an agent work on its run, from `agent_started` to `agent_completed`, whatever it does.

        What it raises is reported and ends here. If this is cancelled the run ends as interrupted, and what is then
        still owed to the log has `LAST_WORDS` seconds. If that is not enough, or the log fails, it has no end in it.
        """
        began = current_time()
        outcome: Outcome = "success"
        error_id = None
        name = getattr(agent, "__name__", type(agent).__name__)
        started = AgentStarted(**self._stamp(), agent=name, post=self.post.id, post_seq=self.post.seq)
        try:
            with self._scope:
                await self._record(started_key(self.post.seq), started)
                await agent(run)
            if self._scope.cancelled_caught:
                outcome = self._ending() or outcome
        except BaseException as error:  # noqa: ASYNC103 - what is not the run's own is raised again below
            interrupted = current_effective_deadline() == -inf
            ending = self._ending() or ("interrupted" if interrupted else None)
            # A Cancelled that nobody asked for is the agent's: let go on, it would end everything around it in silence.
            passing, failure = _split(error, (*_NOT_FAILURES, Cancelled) if ending else _NOT_FAILURES)
            outcome = ending or ("failed" if failure else "interrupted")
            if failure is not None:
                error_id = report_error(
                    failure,
                    context={"user": self.post.user},
                    conversation=self.post.conversation,
                    run=self.id,
                )
            if passing is not None:
                raise passing from None  # noqa: ASYNC104
        finally:
            await self._seal(outcome, current_time() - began, error_id)

    def cancel(self, cause: Cause = "cancelled") -> None:
        """End the run early. What ended it first stays the cause."""
        if not self._scope.cancel_called:
            self._cause = cause
            self._scope.cancel()

    def abandon(self) -> None:
        """End the run early, and leave it to another instance to say so."""
        self._abandoned = True
        self.cancel("interrupted")

    # What the agent does

    async def think(self, text: str) -> None:
        """Append a thought. A checkpoint that always checks for cancellation, and yields now and then."""
        self._check_text(text, "the text")
        if text:
            event = AgentThinking(conversation=self.post.conversation, run=self.id, seq=0, at=0.0, text=text)
            await self._append(Append(event, None, self._lease))
        else:
            await checkpoint()

    async def say(self, text: str) -> None:
        """Append a piece of the answer. A checkpoint that always checks for cancellation, and yields now and then."""
        self._check_text(text, "the text")
        if not text:
            await checkpoint()
            return
        event = AgentMessage(conversation=self.post.conversation, run=self.id, seq=0, at=0.0, text=text)
        await self._append(Append(event, None, self._lease))
        if self._answer_characters <= self._room:  # the last event cannot repeat any more of it
            self._answer.append(text)
            self._answer_characters += len(text)

    async def start_call(self, tool: str, arguments: dict[str, Any]) -> Call:
        """Append the start of a tool. A checkpoint; if cancelled before anybody sees the tool, it has not started."""
        self._check_text(tool, "the name of a tool")
        if len(tool) > TOOL_NAME_MAX:
            raise ValueError(f"the name of a tool has {len(tool)} characters; the limit is {TOOL_NAME_MAX}")
        json: Any = self._json(arguments, f"an argument of the tool {tool!r}")
        await checkpoint_if_cancelled()
        id = f"{self.id}.{next(self._numbers)}"
        self._calls[id] = call = Call(id, tool, current_time())
        await self._record(f"{id}:executing", ToolExecuting(**self._stamp(), call=id, tool=tool, arguments=json))
        return call

    async def end_call(self, call: Call, result: Any, error: BaseException | None) -> None:
        """Append the end of a tool, with what it found or with what it raised. Cannot be cancelled.

        If the log refuses and the tool has failed, the refusal becomes a note on what the tool raised.
        """
        if error is not None:
            await self._complete(call, None, shown(error, Cancelled, self._ending()), error)
            return
        json = None
        if result is not None:
            try:
                json = self._json(result, f"the result of the tool {call.tool!r}")
            except (TypeError, ValueError) as refused:
                await self._complete(call, None, TOOL_FAILED, refused)
                raise
        await self._complete(call, json, None, None)

    # Inside

    def _ending(self) -> Outcome | None:
        """Why the run is being ended, if it knows: of the scopes around it, it does not."""
        return self._cause or ("timeout" if self._scope.cancel_called else None)

    def _stamp(self) -> dict[str, Any]:
        # The log sets `seq` and `at`.
        return {"conversation": self.post.conversation, "run": self.id, "seq": 0, "at": 0.0}

    def _check_text(self, text: str, what: str) -> None:
        if self.over:
            raise RuntimeError("the run is over")
        if not isinstance(text, str):
            raise TypeError(f"{what} must be a str, not {type(text).__name__}")
        if text.isascii() and ESCAPED * len(text) + 2 <= self._room:
            return  # as nearly always: encoding it would find nothing wrong
        self._check_size(_encode(text), what)  # raises UnicodeEncodeError for a lone surrogate, which JSON cannot have

    def _check_size(self, json: bytes, what: str) -> None:
        if len(json) > self._room:
            self._metrics.limit_hits.add("event_bytes")
            raise ValueError(f"{what} has {len(json)} bytes in JSON; an event has room for {self._room}")

    def _json(self, value: object, what: str) -> Raw:
        """Encode now, so that neither an event nor its place in the log can fail later."""
        try:
            json = _encode(value)
        except Exception as error:
            raise TypeError(f"{what} has no JSON form: {error}") from error
        self._check_size(json, what)
        return Raw(json)

    async def _append(self, append: Append) -> None:
        """Append an event.

        If that does not wait, other tasks have their turn only now and then: what is said in one go is read in one go.
        """
        self._said += 1
        if self._said % SAID_AT_ONCE:
            await checkpoint_if_cancelled()
        else:
            await checkpoint()
        try:
            self._log.append_nowait(append)
            return
        except WouldBlock:
            pass
        await self._log.append(append)

    async def _record(self, key: str, event: AnyEvent) -> None:
        """Append what must not be missing. If this is cancelled or raises, the end of the run makes up for it."""
        self._owed[key] = append = Append(event, key, self._lease)
        await self._append(append)
        self._owed.pop(key, None)

    async def _complete(
        self, call: Call, result: Raw | None, error: str | None, in_flight: BaseException | None
    ) -> None:
        """Append the end of a tool. While an exception is in flight, this raises nothing over it."""
        if call.id in self._calls:  # else the end of the run has spoken for it
            self._owe_end(call, result, error)
            if not self._ending():  # a timeout that the agent itself has put around the tool does not end the run
                try:
                    with suppress(TooSlowError):
                        await self._settle()
                except Exception as refusal:  # the end of the run tries again, and reports it
                    if in_flight is None:
                        raise
                    note(in_flight, f"The end of the tool {call.tool!r} is not in the log: {title(refusal)}")

    def _owe_end(self, call: Call, result: Raw | None, error: str | None) -> None:
        del self._calls[call.id]
        key, about = completed_key(call.id), {**self._stamp(), "call": call.id, "tool": call.tool}
        completed = ToolCompleted(**about, seconds=current_time() - call.began, result=result, error=error)
        self._owed[key] = Append(completed, key, self._lease)

    async def _settle(self) -> None:
        """Append all that is owed, at once if the log lets it. Raises TooSlowError after `LAST_WORDS` seconds.

        Cannot be cancelled, and is a checkpoint only if it waits.
        """
        try:
            for owed in self._owing():
                self._log.append_nowait(owed)
            return
        except WouldBlock:
            pass
        with fail_after(LAST_WORDS, shield=True):
            for owed in self._owing():
                await self._log.append(owed)

    def _owing(self) -> Iterator[Append]:
        """Yield all that is owed; each stops being owed when the next is asked for."""
        for key, owed in list(self._owed.items()):
            if not self._abandoned:
                yield owed
                self._owed.pop(key, None)

    async def _seal(self, outcome: Outcome, seconds: float, error_id: str | None) -> None:
        """Append all that is owed, and the last event."""
        self.over = True
        self._metrics.run_seconds.observe(seconds, outcome)
        if self._abandoned:
            return
        for call in list(self._calls.values()):
            self._owe_end(call, None, TOOL_ENDED.get(outcome, TOOL_LEFT_OPEN))
        answer = "".join(self._answer)
        text = answer if answer and len(_encode(answer)) <= self._room else None
        completed = AgentCompleted(**self._stamp(), outcome=outcome, seconds=seconds, text=text, error_id=error_id)
        key = completed_key(self.id)
        self._owed[key] = Append(completed, key, self._lease, self.post.seq)
        try:
            await self._settle()
        except Exception as error:  # what is missing keeps what would follow it from the log
            report_error(error, conversation=self.post.conversation, run=self.id)


def _split(
    error: BaseException, kinds: tuple[type[BaseException], ...]
) -> tuple[BaseException | None, BaseException | None]:
    """Split an exception into what is of these kinds, and the rest."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(kinds)
    return (error, None) if isinstance(error, kinds) else (None, error)
