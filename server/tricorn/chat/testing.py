"""Test an agent without a server: ask it something, and look at the events of its run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import trio
from msgspec.json import Decoder
from trio.lowlevel import checkpoint

from tricorn.chat.execution import Execution, Runs, completed_key
from tricorn.chat.history import Turn
from tricorn.chat.logs.base import Append, Entry
from tricorn.chat.logs.memory import MemoryLog
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.protocol import (
    AgentAsked,
    AgentAsking,
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
from tricorn.chat.run import Agent, Run
from tricorn.chat.settings import ChatSettings

AgentEvent = (
    AgentStarted
    | AgentThinking
    | ToolExecuting
    | ToolCompleted
    | AgentAsking
    | AgentAsked
    | AgentMessage
    | AgentCompleted
)

DEFAULTS = ChatSettings()
CONVERSATION = "test"


@dataclass(frozen=True)
class Result:
    """What an agent made of one text."""

    events: list[AgentEvent]
    """The events of the run as clients get them, from `AgentStarted` to `AgentCompleted`: see `tricorn.chat.protocol`.

    Without a history, their first `seq` is 2: the post has 1.
    """

    answer: str
    """All that the agent said, joined, without what its children said."""

    outcome: Outcome
    """How the run ended, as the last event says."""

    error: BaseException | None
    """What the agent raised, as it raised it, unless that was only its cancellation.

    The outcome is then `failed`, or what ended the run before: an agent can also fail while it is being cancelled.
    """


async def ask(
    agent: Agent,
    text: str,
    *,
    user: str = "local",
    history: Sequence[Turn] = (),
    answers: Sequence[str] | Callable[[str], str | None] = (),
    settings: ChatSettings = DEFAULTS,
    cancel_after: float = inf,
) -> Result:
    """Run an agent on a text, in a new conversation with a log in memory, and return what it did.

    The run is that of a chat: with its limits, its reports on stderr, and its end, whatever the agent does. Nothing is
    shared with another `ask`. Under a `MockClock` the agent sleeps in no time.

    If cancelled, the agent is cancelled too, and there is no result: use `cancel_after` to look at a run that was
    cancelled.

    Args:
        agent: what you would serve.
        text: what a user posts.
        user: who posts it: `run.user`.
        history: what was said before: what `run.history()` finds.
        answers: what the user says to the agent's questions, in order, or a function that is given a question and
            returns the answer. If there is none, or it is None, nobody answers.
        settings: of these `run_timeout` and `event_bytes` concern a run.
        cancel_after: seconds after which the user cancels the run.

    Raises:
        ExceptionGroup: a KeyboardInterrupt that came out of the agent. Everything else ends the run only.
    """
    attempt = _Attempt(agent)
    async with MemoryLog(lease=settings.lease) as log:
        epoch = (await log.open(CONVERSATION)).epoch
        lease = await log.claim(CONVERSATION)
        for number, turn in enumerate(history):
            for event in _events(turn, number):
                log.append_nowait(CONVERSATION, epoch, Append(event))
        post = UserMessage(conversation=CONVERSATION, seq=0, at=0.0, id="post", user=user, text=text)
        await log.append(CONVERSATION, epoch, Append(post))
        appender = _Appender(log, epoch, answers if callable(answers) else _each(answers))
        appender.execution = execution = Execution(post, lease, appender, settings, ChatMetrics())
        async with trio.open_nursery() as nursery:
            runs = Runs(nursery)
            nursery.start_soon(_cancel, execution, cancel_after)
            nursery.start_soon(runs.reaper.run)
            await execution.perform(attempt, Run(execution), runs)
            nursery.cancel_scope.cancel()
        entries = await log.read(CONVERSATION, post.seq, (await log.open(CONVERSATION)).head)
    events = [_decode(entry.json) for entry in entries]
    answer = "".join(each.text for each in events if isinstance(each, AgentMessage) and each.run == execution.id)
    end = events[-1]
    assert isinstance(end, AgentCompleted), "every run has an end"  # noqa: S101
    return Result(events, answer, end.outcome, attempt.raised if end.error_id else None)


def _events(turn: Turn, number: int) -> Iterator[AnyEvent]:
    """Yield the events of a turn, as its run left them in a log. Each must be appended before the next."""
    about: dict[str, Any] = {"conversation": CONVERSATION, "seq": 0, "at": 0.0}
    post = UserMessage(**about, id=f"post-{number}", user=turn.user, text=turn.text)
    yield post
    about["run"] = f"run-{number}"
    yield AgentStarted(**about, agent="agent", post=post.id, post_seq=post.seq)
    for index, tool in enumerate(turn.tools):
        call = {**about, "call": f"{number}.{index}", "tool": tool.tool}
        yield ToolExecuting(**call, arguments=tool.arguments)
        yield ToolCompleted(**call, seconds=0.0, result=tool.result, error=tool.error)
    for index, asked in enumerate(turn.asks):
        ask = {**about, "ask": f"{number}.ask.{index}"}
        yield AgentAsking(**ask, text=asked.text, until=0.0)
        yield AgentAsked(**ask, outcome="timeout" if asked.answer is None else "answered", answer=asked.answer)
    if turn.answer:
        yield AgentMessage(**about, text=turn.answer)
    yield AgentCompleted(**about, outcome=turn.outcome, seconds=0.0, text=turn.answer or None, error=turn.error)


def _each(answers: Sequence[str]) -> Callable[[str], str | None]:
    rest = iter(answers)
    return lambda question: next(rest, None)


async def _cancel(execution: Execution, seconds: float) -> None:
    await trio.sleep(seconds)
    execution.cancel()


class _Attempt:
    """The agent, and what it raised."""

    def __init__(self, agent: Agent) -> None:
        self.__name__ = getattr(agent, "__name__", type(agent).__name__)
        self.raised: BaseException | None = None
        self._agent = agent

    async def __call__(self, run: Run) -> str | None:
        try:
            return await self._agent(run)
        except BaseException as error:
            self.raised = error
            raise


class _Appender:
    """Appends to the one conversation, and answers what its run asks."""

    execution: Execution

    def __init__(self, log: MemoryLog, epoch: str, answer: Callable[[str], str | None]) -> None:
        self._answer = answer
        self._log = log
        self._epoch = epoch

    async def append(self, append: Append) -> None:
        await checkpoint()
        self.append_nowait(append)

    def append_nowait(self, append: Append) -> None:
        self._log.append_nowait(CONVERSATION, self._epoch, append)
        asking = append.event
        if isinstance(asking, AgentAsking) and (answer := self._answer(asking.text)) is not None:
            if asking.choices and answer not in asking.choices:
                raise ValueError(f"the answer must be one of {asking.choices}, not {answer!r}")
            about: dict[str, Any] = {"conversation": CONVERSATION, "run": asking.run, "seq": 0, "at": 0.0}
            user = self.execution.post.user
            asked = AgentAsked(**about, ask=asking.ask, outcome="answered", answer=answer, user=user)
            self._log.append_nowait(CONVERSATION, self._epoch, Append(asked, completed_key(asking.ask)))
            self.execution.hear(asking.ask, answer)

    async def find(self, key: str) -> Entry | None:
        return await self._log.find(CONVERSATION, key)

    async def read(self, after: int, limit: int) -> list[Entry]:
        return await self._log.read(CONVERSATION, after, limit)


_decode = Decoder(AgentEvent).decode
