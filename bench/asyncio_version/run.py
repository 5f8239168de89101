"""One run: an agent answers one post. What it does goes into the conversation's log, from its start to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from secrets import token_hex
from time import monotonic, time
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

from msgspec import Raw
from msgspec.json import Encoder

from tricorn.chat.protocol import (
    AgentCompleted,
    AgentMessage,
    AgentStarted,
    AgentThinking,
    ConversationEvent,
    Outcome,
    ToolCompleted,
    ToolExecuting,
)
from tricorn.chat.tools import TOOL_ENDED, TOOL_FAILED, TOOL_LEFT_OPEN, TOOL_NAME_MAX, shown
from tricorn.errors.report import report_error

SAID_AT_ONCE = 64  # events; then others have a turn, and a cancellation is heard

_encode = Encoder().encode

Cause = Literal["cancelled", "abandoned", "interrupted", "timeout"]


class Asked(NamedTuple):
    """A post and its seq in the log."""

    seq: int
    id: str
    user: str
    text: str


class Log(Protocol):
    """Where a run's events go."""

    id: str  # of the conversation

    @property
    def head(self) -> int:
        """The seq of the last event."""

    def append(self, event: ConversationEvent) -> None:
        """Append the event `head + 1`. Raises TypeError or ValueError where it is no JSON, or too long."""


class Run:
    """What an agent gets: what it was asked, and the ways to show its work.

    The log is in memory, so nothing here waits, but every 64th event lets other tasks run. Raises RuntimeError after
    the end of the run, TypeError if something has no JSON form, and ValueError if the event would be too long.
    """

    def __init__(self, log: Log, asked: Asked) -> None:
        self.id = token_hex(8)
        self.conversation = log.id
        self.user = asked.user
        self.message = asked.text
        self.asked = asked
        self.cause: Cause | None = None  # why it does not end by itself
        self._log = log
        self._over = False
        self._answer: list[str] = []
        self._calls = count(1)
        self._tools: dict[Tool, None] = {}  # in progress

    async def think(self, text: str) -> None:
        """Say what the agent is about. An empty text is no event."""
        self._check(text)
        if text:
            self._log.append(AgentThinking(**self._stamp(), text=text))
            if self._log.head % SAID_AT_ONCE == 0:
                await asyncio.sleep(0)

    async def say(self, text: str) -> None:
        """Say a piece of the answer, which is all pieces joined as they are. An empty text is no event."""
        self._check(text)
        if text:
            log = self._log
            log.append(AgentMessage(conversation=log.id, run=self.id, seq=log.head + 1, at=time(), text=text))
            self._answer.append(text)
            if log.head % SAID_AT_ONCE == 0:
                await asyncio.sleep(0)

    def tool(self, name: str, /, **arguments: Any) -> Tool:
        """Show the use of a tool: `async with run.tool("forecast", city="Oslo") as tool: tool.result = ...`."""
        return Tool(self, name, arguments)

    def _check(self, text: object) -> None:
        if not isinstance(text, str):
            raise TypeError(f"the text must be a str, not {type(text).__name__}")
        self._check_not_over()

    def _check_not_over(self) -> None:
        if self._over:
            raise RuntimeError("the run is over")

    def _stamp(self) -> dict[str, Any]:
        return {"conversation": self.conversation, "run": self.id, "seq": self._log.head + 1, "at": time()}


class Tool:
    """A tool at work. Set `result` to what it found: anything that has a JSON form.

    An exception goes on when the tool is left; people are shown the text of a `ToolError`, and of any other only that
    there was one.
    """

    def __init__(self, run: Run, name: str, arguments: dict[str, Any]) -> None:
        self.result: Any = None
        self._run = run
        self._name = name
        self._arguments = arguments

    async def __aenter__(self) -> Tool:
        run = self._run
        if not isinstance(self._name, str) or len(self._name) > TOOL_NAME_MAX:
            raise ValueError(f"the name of a tool must be a str of at most {TOOL_NAME_MAX} characters")
        self._call = f"{run.id}.{next(run._calls)}"
        self._began = monotonic()
        run._check_not_over()
        executing = ToolExecuting(**run._stamp(), call=self._call, tool=self._name, arguments=self._arguments)
        run._log.append(executing)
        run._tools[self] = None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._complete(error=shown(error, asyncio.CancelledError, self._run.cause))
            return
        try:
            result = None if self.result is None else Raw(_encode(self.result))
            self._complete(result=result)
        except Exception:
            self._complete(error=TOOL_FAILED)
            raise

    def _complete(self, **outcome: Any) -> None:
        run = self._run
        if self in run._tools:  # or else the end of the run has spoken for it
            seconds = monotonic() - self._began
            about: dict[str, Any] = {"call": self._call, "tool": self._name, "seconds": seconds}
            run._log.append(ToolCompleted(**run._stamp(), **about, **outcome))
            del run._tools[self]


Agent = Callable[[Run], Awaitable[None]]


async def perform(run: Run, agent: Agent) -> None:
    """Let an agent work, from `agent_started` to `agent_completed`, whatever it does.

    What it raises is reported and ends here. If this is cancelled the run ends so too, for `run.cause`.
    """
    began = monotonic()
    outcome: Outcome = "success"
    error_id = None
    name = getattr(agent, "__name__", type(agent).__name__)
    run._log.append(AgentStarted(**run._stamp(), agent=name, post=run.asked.id, post_seq=run.asked.seq))
    try:
        if run.cause is not None:
            await asyncio.sleep(0)  # it was cancelled before it began, and hears of that only where it waits
        await agent(run)
        outcome = run.cause or "success"
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            outcome = run.cause or "interrupted"
            raise
        outcome = "failed"  # the agent was cancelled by something of its own
        error_id = report_error(error, context={"user": run.user}, conversation=run.conversation, run=run.id)
    except Exception as error:
        outcome = run.cause or "failed"
        error_id = report_error(error, context={"user": run.user}, conversation=run.conversation, run=run.id)
    except BaseException:
        outcome = "interrupted"
        raise
    finally:
        _seal(run, outcome, monotonic() - began, error_id)


def _seal(run: Run, outcome: Outcome, seconds: float, error_id: str | None) -> None:
    """Say all that is owed, and the last word."""
    for tool in list(run._tools):
        tool._complete(error=TOOL_ENDED.get(outcome, TOOL_LEFT_OPEN))
    last: dict[str, Any] = {"outcome": outcome, "seconds": seconds, "error_id": error_id}
    try:
        run._log.append(AgentCompleted(**run._stamp(), text="".join(run._answer) or None, **last))
    except ValueError:  # the whole answer does not fit into one event
        run._log.append(AgentCompleted(**run._stamp(), **last))
    run._over = True
