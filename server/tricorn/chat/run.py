"""One run: an agent answers one post. What it does goes into the conversation's log, from its start to its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from itertools import count
from math import inf
from secrets import token_hex
from types import TracebackType
from typing import Any, Literal, Protocol

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

from tricorn.chat.conversation.state import Asked, completed_key, started_key
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
)
from tricorn.errors.report import report_error
from tricorn.metrics import LIMIT_HITS, RUN_SECONDS

# Seconds that what must not be missing in the log may take, where nobody can be let wait for it.
LAST_WORDS = 2.0

TOOL_NAME_MAX = 128  # characters
TOOL_ERROR_MAX = 500  # characters of a ToolError's text that people are shown

SAID_AT_ONCE = 64  # events, before others get their turn, where the log does not wait
ESCAPED = 6  # bytes that one ASCII character has in JSON, at most

TOOL_FAILED = "the tool failed"
TOOL_LEFT_OPEN = "not finished"
TOOL_ENDED = {"cancelled": "cancelled", "timeout": "timed out", "interrupted": "interrupted"}

# These are not an agent's to fail with.
_NOT_FAILURES = (KeyboardInterrupt, SystemExit)

_encode = Encoder().encode


class ToolError(Exception):
    """Raise this inside a tool to have its text shown to people as the tool's error."""


class Appender(Protocol):
    """What puts events into the log. With a key an event is there once, however often that is asked for.

    `answered` is the seq of the post that has been answered with this.
    """

    async def append(self, event: AnyEvent, key: str | None = None, answered: int | None = None) -> None: ...

    def append_nowait(self, event: AnyEvent, key: str | None = None, answered: int | None = None) -> None:
        """Do it at once; raises WouldBlock where that cannot be."""


class Run:
    """What an agent gets: what it was asked, and the ways to show its work, for at most `seconds`.

    Every method but `cancel`, `abandon` and `tool` can be cancelled, and returns once the event is in the log; where
    that is in memory and nothing is to be waited for, others have their turn every 64 events. If one is cancelled, the
    event may be there or not. After the end of the run they raise RuntimeError, and ValueError where the
    event would be longer than `event_bytes`.
    """

    def __init__(
        self,
        conversation: str,
        asked: Asked,
        seconds: float,
        log: Appender,
        event_bytes: int,
    ) -> None:
        self.id = token_hex(8)
        self.conversation = conversation
        self.user = asked.user
        self.message = asked.text
        self.asked = asked
        self._log = log
        self._scope = CancelScope(relative_deadline=seconds)
        self._cause: Literal["cancelled", "interrupted"] | None = None
        self._sealed = False
        self._abandoned = False
        self._room = event_bytes - ENVELOPE
        self._answer: list[str] = []
        self._answer_characters = 0
        self._said = 0
        self._calls = count(1)
        self._tools: dict[Tool, None] = {}  # in progress
        # By key: what must be in the log before the end, and may not be there yet.
        self._owed: dict[str, AnyEvent] = {}

    async def think(self, text: str) -> None:
        """Say what the agent is about. An empty text is no event."""
        if self._is_said(text):
            await self._append(AgentThinking(conversation=self.conversation, run=self.id, seq=0, at=0.0, text=text))
        else:
            await checkpoint()

    async def say(self, text: str) -> None:
        """Say a piece of the answer, which is all pieces joined as they are. An empty text is no event."""
        if not self._is_said(text):
            await checkpoint()
            return
        await self._append(AgentMessage(conversation=self.conversation, run=self.id, seq=0, at=0.0, text=text))
        if self._answer_characters <= self._room:  # more of it, and the last event cannot repeat it anyway
            self._answer.append(text)
            self._answer_characters += len(text)

    def tool(self, name: str, /, **arguments: Any) -> Tool:
        """Show the use of a tool: `async with run.tool("forecast", city="Oslo") as tool: tool.result = ...`."""
        return Tool(self, name, arguments)

    def cancel(self, cause: Literal["cancelled", "interrupted"] = "cancelled") -> None:
        """End the run early. What ended it first stays the cause."""
        if not self._scope.cancel_called:
            self._cause = cause
            self._scope.cancel()

    @property
    def over(self) -> bool:
        """It takes no more events from the agent; its last may still be on their way."""
        return self._sealed

    def abandon(self) -> None:
        """End the run early, and leave it to another instance to say so."""
        self._abandoned = True
        self.cancel("interrupted")

    def _ending(self) -> Outcome | None:
        """Why the run does not end by itself, where it knows: of the scopes around it, it does not."""
        return self._cause or ("timeout" if self._scope.cancel_called else None)

    def _stamp(self) -> dict[str, Any]:
        return {"conversation": self.conversation, "run": self.id, "seq": 0, "at": 0.0}  # the log sets the last two

    def _check_open(self) -> None:
        if self._sealed:
            raise RuntimeError("the run is over")

    def _check_text(self, text: str, what: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"{what} must be a str, not {type(text).__name__}")
        if text.isascii() and ESCAPED * len(text) + 2 <= self._room:
            return  # as nearly always: nothing else would be found out by encoding it
        self._check_size(_encode(text), what)  # raises UnicodeEncodeError for a lone surrogate, which is not JSON's

    def _check_size(self, json: bytes, what: str) -> None:
        if len(json) > self._room:
            LIMIT_HITS.add("event_bytes")
            raise ValueError(f"{what} has {len(json)} bytes in JSON; an event has room for {self._room}")

    def _json(self, value: object, what: str) -> Raw:
        """Encode now, so that neither an event nor its place in the log can fail later."""
        try:
            json = _encode(value)
        except Exception as error:
            raise TypeError(f"{what} has no JSON form: {error}") from error
        self._check_size(json, what)
        return Raw(json)

    def _is_said(self, text: str) -> bool:
        self._check_open()
        self._check_text(text, "the text")
        return text != ""

    async def _append(self, event: AnyEvent, key: str | None = None) -> None:
        """Append an event.

        Where that does not wait, others have their turn only now and then: what is said in one go is read in one go.
        """
        self._said += 1
        if self._said % SAID_AT_ONCE:
            await checkpoint_if_cancelled()
        else:
            await checkpoint()
        try:
            self._log.append_nowait(event, key)
        except WouldBlock:
            await self._log.append(event, key)

    async def _record(self, key: str, event: AnyEvent) -> None:
        """Append what must not be missing. If this is cancelled or raises, the end of the run makes up for it."""
        self._owed[key] = event
        await self._append(event, key)
        self._owed.pop(key, None)

    async def _settle(self) -> None:
        """Append all that is owed, at once where the log lets it. Raises TooSlowError after `LAST_WORDS` seconds.

        Cannot be cancelled, and is a checkpoint only where it waits.
        """
        try:
            for owed in self._owing():
                self._log.append_nowait(*owed)
        except WouldBlock:
            with fail_after(LAST_WORDS, shield=True):
                for owed in self._owing():
                    await self._log.append(*owed)

    def _owing(self) -> Iterator[tuple[AnyEvent, str, int | None]]:
        """All that is owed; each no more when the next is asked for."""
        for key, event in list(self._owed.items()):
            if not self._abandoned:
                yield event, key, self.asked.seq if isinstance(event, AgentCompleted) else None
                self._owed.pop(key, None)


class Tool:
    """A tool at work. Set `result` to what it found: anything that has a JSON form.

    An exception goes on when the tool is left; people are shown the text of a `ToolError`, and of any other only that
    there was one. Raises TypeError where an argument or the result has no JSON form, ValueError where the name, the
    arguments or the result are too long, and RuntimeError where it is entered after the end of the run. Entering is a
    checkpoint. Leaving cannot be cancelled, so that no tool stays open: it waits at most `LAST_WORDS` seconds for the
    log, and not at all where the run is being ended.
    """

    def __init__(self, run: Run, name: str, arguments: dict[str, Any]) -> None:
        self.result: Any = None
        self._run = run
        self._name = name
        self._arguments = arguments

    async def __aenter__(self) -> Tool:
        run = self._run
        run._check_open()
        run._check_text(self._name, "the name of a tool")
        if len(self._name) > TOOL_NAME_MAX:
            raise ValueError(f"the name of a tool has {len(self._name)} characters; the limit is {TOOL_NAME_MAX}")
        arguments: Any = run._json(self._arguments, f"an argument of the tool {self._name!r}")
        await checkpoint_if_cancelled()  # from here on people see the tool
        self._call = f"{run.id}.{next(run._calls)}"
        self._began = current_time()
        run._tools[self] = None
        executing = ToolExecuting(**run._stamp(), call=self._call, tool=self._name, arguments=arguments)
        await run._record(f"{self._call}:executing", executing)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            await self._complete(error=shown(error, Cancelled, self._run._ending()))
            return
        run = self._run
        try:
            result = None if self.result is None else run._json(self.result, f"the result of the tool {self._name!r}")
        except (TypeError, ValueError):
            await self._complete(error=TOOL_FAILED)
            raise
        await self._complete(result=result)

    async def _complete(self, result: Raw | None = None, error: str | None = None) -> None:
        run = self._run
        if self not in run._tools:
            return  # the end of the run has spoken for it
        key, completed = self._completed(result, error)
        del run._tools[self]
        run._owed[key] = completed
        if not run._ending():  # a timeout that the agent itself has put around the tool does not end the run
            with suppress(TooSlowError):
                await run._settle()

    def _completed(self, result: Raw | None = None, error: str | None = None) -> tuple[str, ToolCompleted]:
        seconds = current_time() - self._began
        stamp = self._run._stamp()
        completed = ToolCompleted(
            **stamp, call=self._call, tool=self._name, seconds=seconds, result=result, error=error
        )
        return completed_key(self._call), completed


def shown(error: BaseException, cancelled: type[BaseException], ending: Outcome | None) -> str:
    """What people may see of the exception that ended a tool: `cancelled` is not one, then the end of the run is."""
    errors = [leaf for leaf in _leaves(error) if not isinstance(leaf, cancelled)]
    if not errors:
        return TOOL_ENDED[ending or "cancelled"]
    if not all(isinstance(leaf, ToolError) for leaf in errors):
        return TOOL_FAILED
    text = "; ".join(map(str, errors))
    if len(text) > TOOL_ERROR_MAX:
        text = text[:TOOL_ERROR_MAX] + "…"
    return text.encode(errors="replace").decode() or TOOL_FAILED


Agent = Callable[[Run], Awaitable[None]]


async def perform(run: Run, agent: Agent) -> None:
    """Let an agent work, from `agent_started` to `agent_completed`, whatever it does.

    What it raises is reported and ends here. If this is cancelled the run ends as interrupted, and what is then still
    owed to the log has `LAST_WORDS` seconds. Where that is not enough, or the log fails, there is no end in it.
    """
    began = current_time()
    outcome: Outcome = "success"
    error_id = None
    name = getattr(agent, "__name__", type(agent).__name__)
    try:
        with run._scope:
            post = run.asked
            started = AgentStarted(**run._stamp(), agent=name, post=post.id, post_seq=post.seq)
            await run._record(started_key(post.seq), started)
            await agent(run)
        if run._scope.cancelled_caught:
            outcome = run._ending() or outcome
    except BaseException as error:  # noqa: ASYNC103 - what is not the run's own is raised again below
        interrupted = current_effective_deadline() == -inf
        ending = run._ending() or ("interrupted" if interrupted else None)
        # A Cancelled that nobody asked for is the agent's: let go on, it would end everything around it in silence.
        passing, failure = _split(error, (*_NOT_FAILURES, Cancelled) if ending else _NOT_FAILURES)
        outcome = ending or ("failed" if failure else "interrupted")
        if failure is not None:
            error_id = report_error(failure, context={"user": run.user}, conversation=run.conversation, run=run.id)
        if passing is not None:
            raise passing from None  # noqa: ASYNC104
    finally:
        await _seal(run, outcome, current_time() - began, error_id)


async def _seal(run: Run, outcome: Outcome, seconds: float, error_id: str | None) -> None:
    """Say all that is owed, and the last word."""
    run._sealed = True
    RUN_SECONDS.observe(seconds, outcome)
    if run._abandoned:
        return
    for tool in run._tools:
        key, completed = tool._completed(error=TOOL_ENDED.get(outcome, TOOL_LEFT_OPEN))
        run._owed[key] = completed
    run._tools.clear()
    answer = "".join(run._answer)
    if len(_encode(answer)) > run._room:
        answer = ""
    run._owed[completed_key(run.id)] = AgentCompleted(
        **run._stamp(), outcome=outcome, seconds=seconds, text=answer or None, error_id=error_id
    )
    try:
        await run._settle()
    except Exception as error:  # what is missing keeps what would follow it from the log
        report_error(error, conversation=run.conversation, run=run.id)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _split(
    error: BaseException, kinds: tuple[type[BaseException], ...]
) -> tuple[BaseException | None, BaseException | None]:
    """What of an exception is of these kinds, and the rest."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(kinds)
    return (error, None) if isinstance(error, kinds) else (None, error)
