"""One run as the host sees it: from its start to its end in the log, whatever the agent does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from itertools import count
from math import inf
from secrets import token_hex
from traceback import clear_frames
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from msgspec import Raw
from msgspec.json import Encoder
from trio import (
    Cancelled,
    CancelScope,
    Nursery,
    TooSlowError,
    WouldBlock,
    current_effective_deadline,
    current_time,
    fail_after,
    move_on_after,
)
from trio.lowlevel import Task, checkpoint, checkpoint_if_cancelled, current_task

from tricorn.chat.agent_error import for_people
from tricorn.chat.encoding import encode, shortened
from tricorn.chat.history import Past, Turn, read_history
from tricorn.chat.logs.base import Append, Lease, LeaseLost, PastLost
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
    Usage,
    UserMessage,
)
from tricorn.chat.settings import ChatSettings
from tricorn.chat.tools import TOOL_ENDED, TOOL_FAILED, TOOL_LEFT_OPEN, TOOL_NAME_MAX, shown
from tricorn.errors.chain import hides_an_error, is_any, traceback_of
from tricorn.errors.failures import PASSING, leaves
from tricorn.errors.report import report, report_error
from tricorn.errors.stuck import stuck
from tricorn.errors.text import note, title
from tricorn.transport.keep_alive import Reaper
from tricorn.waiter import Waiter

LAST_WORDS = 2.0  # seconds for what must not be missing in the log, when nobody can be made to wait for it
SAID_AT_ONCE = 64  # events, before other tasks get their turn, if the log does not wait
ESCAPED = 6  # bytes that one ASCII character has in JSON, at most

# An append that takes waiting, or that ends the run. The second try knows.
NOT_AT_ONCE = (WouldBlock, LeaseLost, PastLost)

_encode = Encoder().encode

Cause = Literal["cancelled", "abandoned", "interrupted"]
R = TypeVar("R")


class Appender(Past, Protocol):
    """Appends a run's events to the log, and reads what was before them."""

    async def append(self, append: Append) -> None: ...

    @property
    def append_nowait(self) -> Callable[[Append], object]:
        """Append at once. Raises WouldBlock, LeaseLost or PastLost if that is not possible: `append` then knows."""


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


class Runs:
    """Where the agents of a chat work: the nursery of their tasks, and what watches over their time."""

    def __init__(self, nursery: Nursery) -> None:
        self.nursery = nursery
        self.reaper = Reaper()


class Execution:
    """Performs an agent on a post, for at most `run_timeout` seconds, under a lease. The agent holds a `Run` of it.

    Attributes:
        patience: when it must have ended, in Trio's time.
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
        self._began = current_time()
        self._close_timeout = settings.close_timeout
        self.patience = self._began + settings.run_timeout
        self._scope = CancelScope(deadline=self.patience)
        self._cause: Cause | None = None
        self._task: Task | None = None  # the agent's
        self._working = False  # until that has ended
        self._changed = Waiter()  # where `perform` waits until it has ended, or is to end
        self._outcome: Outcome = "failed"
        self._error_id: str | None = None
        self._error: str | None = None  # for people
        self._usage: Usage | None = None
        self._abandoned = False
        self._room = settings.event_bytes - ENVELOPE
        self._plain = (self._room - 2) // ESCAPED  # characters of an ASCII text that has room, whatever they are
        self._answer: list[str] = []
        self._answer_characters = 0
        self._said = 0
        self._numbers = count(1)
        self._calls: dict[str, Call] = {}  # tools in progress
        self._owed: dict[str, Append] = {}  # by key: what must be in the log before the end, and may not be there yet

    async def perform(self, agent: Callable[[R], Awaitable[str | None]], run: R, runs: Runs) -> None:
        """Let an agent work on its run, from `agent_started` to `agent_completed`, whatever it does.

        The agent has a task of its own, and so a context of its own. What it raises is reported and ends there, but for
        KeyboardInterrupt. If its task goes on for `close_timeout` seconds after the run was ended, that is reported,
        and this goes on without it.

        If this is cancelled, the run ends as interrupted. What is owed to the log at the end has `LAST_WORDS` seconds.
        If that is not enough, or the log fails, the run has no end in the log.
        """
        name = getattr(agent, "__name__", type(agent).__name__)
        started = AgentStarted(**self._stamp(), agent=name, post=self.post.id, post_seq=self.post.seq)
        runs.nursery.start_soon(self._work, agent, run, started, name=f"{name}")
        self._working = True
        runs.reaper.watch(self)
        try:
            if not self._scope.cancel_called:
                await self._changed.wait()
        except Cancelled:
            if self._outcome == "success":  # the agent has swallowed the same cancellation
                self._outcome = "interrupted"
            raise
        finally:
            runs.reaper.forget(self)
            if self._working:
                await self._end()
            await self._seal(current_time() - self._began)
        await checkpoint_if_cancelled()  # it may have been cancelled while it was woken for another reason

    def cancel(self, cause: Cause = "cancelled") -> None:
        """End the run early. What ended it first stays the cause."""
        if not self._scope.cancel_called:
            self._cause = cause
            self._scope.cancel()
            self._changed.wake()

    def give_up(self) -> None:
        """The run has taken too long, and its scope has cancelled it."""
        self._changed.wake()

    def abandon(self) -> None:
        """End the run early, and leave it to another instance to say so."""
        self._abandoned = True
        self.cancel("interrupted")

    # What the agent does

    async def speak(self, kind: type[AgentThinking | AgentMessage], text: str) -> None:
        """Append a thought, or a piece of the answer. A checkpoint that always checks, and yields now and then."""
        if self.over or not (isinstance(text, str) and text.isascii() and len(text) <= self._plain):
            self._check_text(text, "the text")
        if not text:
            await checkpoint()
            return
        event = kind(conversation=self.post.conversation, run=self.id, seq=0, at=0.0, text=text)
        append = Append(event, None, self._lease)
        await self._checkpoint()
        self._check_not_over()  # it may have ended meanwhile
        if not self._append_at_once(append):
            await self._log.append(append)
        if kind is AgentMessage and self._answer_characters <= self._room:  # else the last event cannot repeat it
            self._answer.append(text)
            self._answer_characters += len(text)

    async def history(self, turns: int, characters: int) -> list[Turn]:
        """Return what was said before this run: see `read_history`."""
        self._check_not_over()
        return await read_history(self._log, started_key(self.post.seq), turns, characters)

    def used(self, input: int, output: int, cached: int) -> None:
        """Count tokens."""
        self._check_not_over()
        before = self._usage or Usage(0, 0)
        self._usage = Usage(before.input + input, before.output + output, before.cached + cached)

    async def start_call(self, tool: str, arguments: dict[str, Any]) -> Call:
        """Append the start of a tool. A checkpoint; if cancelled before anybody sees the tool, it has not started.

        If the arguments are too long for an event, people are shown their beginning, as one argument `cut`.
        """
        self._check_text(tool, "the name of a tool")
        if len(tool) > TOOL_NAME_MAX:
            raise ValueError(f"the name of a tool has {len(tool)} characters; the limit is {TOOL_NAME_MAX}")
        json: Any = self._json(arguments, f"an argument of the tool {tool!r}", b'{"cut":%b}')
        await checkpoint_if_cancelled()
        id = f"{self.id}.{next(self._numbers)}"
        self._calls[id] = call = Call(id, tool, current_time())
        await self._record(f"{id}:executing", ToolExecuting(**self._stamp(), call=id, tool=tool, arguments=json))
        return call

    async def end_call(self, call: Call, result: Any, error: BaseException | None) -> None:
        """Append the end of a tool, with what it found or with what it raised. Cannot be cancelled.

        If the result is too long for an event, people are shown its beginning, and that it is cut.
        If the log refuses and the tool has failed, the refusal becomes a note on what the tool raised.
        """
        if error is not None:
            _free_memory(error)
            await self._complete(call, None, shown(error, Cancelled, self._ending()), error)
            return
        json = None
        if result is not None:
            try:
                json = self._json(result, f"the result of the tool {call.tool!r}")
            except TypeError as refused:
                await self._complete(call, None, TOOL_FAILED, refused)
                raise
        await self._complete(call, json, None, None)

    # Inside

    async def _work(self, agent: Callable[[R], Awaitable[str | None]], run: R, started: AgentStarted) -> None:
        """Do the agent's part, in its own task. The scope sees no exception of the agent: it would split a group."""
        self._task = current_task()
        try:
            with self._scope:
                try:
                    await self._record(started_key(self.post.seq), started)
                    if text := await agent(run):
                        await self.speak(AgentMessage, text)
                    self._outcome = self._ending() or "success"
                except BaseException as error:  # noqa: ASYNC103 - the task ends here, and its cancellation with it
                    self._fail(error)
                    if interrupt := _interrupt(error):
                        raise interrupt from None  # noqa: ASYNC104
        except Exception as error:  # the agent has left a scope of its own open
            self._fail(error)
        finally:
            self._task = None
            self._working = False
            self._changed.wake()

    def _fail(self, error: BaseException) -> None:
        """Report what the agent has raised, unless it is only how its run was ended and hides no error."""
        ending = self._ended_by()
        # A Cancelled that nobody asked for is the agent's failure.
        expected = PASSING if ending else (KeyboardInterrupt,)
        failed = not all(is_any(leaf, expected) for leaf in leaves(error))
        self._outcome = ending or ("failed" if failed else "interrupted")
        if failed or hides_an_error(error):
            self._error_id = report_error(error, **self._about())
        if self._outcome == "failed":
            self._error = for_people(list(leaves(error)))

    async def _end(self) -> None:
        """Have the agent's task end; if it does not, report where it is. What it does then is not part of the run."""
        self.cancel("interrupted")
        with move_on_after(self._close_timeout, shield=True):
            while self._working:
                await self._changed.wait()
        if self._working:
            self._outcome = self._ending() or "interrupted"
            report(
                "ERROR",
                "a run's task does not end when it is cancelled; its conversation goes on without it",
                **self._about(),
                outcome=self._outcome,
                tasks=() if self._task is None else tuple(stuck(self._task)),
            )

    def _about(self) -> dict[str, Any]:
        return {"context": {"user": self.post.user}, "conversation": self.post.conversation, "run": self.id}

    def _ended_by(self) -> Outcome | None:
        """Why the run is being ended, also if that is what is around it. To be asked in the agent's task."""
        return self._ending() or ("interrupted" if current_effective_deadline() == -inf else None)

    def _ending(self) -> Outcome | None:
        """Why the run is being ended, if it knows: of the scopes around it, it does not."""
        return self._cause or ("timeout" if self._scope.cancel_called else None)

    def _stamp(self) -> dict[str, Any]:
        # The log sets `seq` and `at`.
        return {"conversation": self.post.conversation, "run": self.id, "seq": 0, "at": 0.0}

    def _check_not_over(self) -> None:
        if self.over:
            raise RuntimeError("the run is over")

    def _check_text(self, text: str, what: str) -> None:
        self._check_not_over()
        if not isinstance(text, str):
            raise TypeError(f"{what} must be a str, not {type(text).__name__}")
        self._check_size(_encode(text), what)  # raises UnicodeEncodeError for a lone surrogate, which JSON cannot have

    def _check_size(self, json: bytes, what: str) -> None:
        if len(json) > self._room:
            self._metrics.limit_hits.add("event_bytes")
            raise ValueError(f"{what} has {len(json)} bytes in JSON; an event has room for {self._room}")

    def _json(self, value: object, what: str, if_cut: bytes = b"%b") -> Raw:
        """Encode now, so that neither an event nor its place in the log can fail later.

        If it is too long for an event, its beginning takes its place, as `if_cut` has it.
        """
        try:
            json = encode(value)
        except Exception as error:
            raise TypeError(f"{what} has no JSON form: {error}") from error
        if len(json) > self._room:
            self._metrics.limit_hits.add("event_bytes")
            json = if_cut % shortened(json, self._room - len(if_cut))
        return Raw(json)

    def _checkpoint(self) -> Awaitable[None]:
        """Check for cancellation, and yield now and then: what is said in one go is read in one go."""
        self._said += 1
        if self._said % SAID_AT_ONCE:
            return checkpoint_if_cancelled()  # noqa: ASYNC105 (it is awaited: a frame less for every piece of an answer)
        return checkpoint()  # noqa: ASYNC105

    def _append_at_once(self, append: Append) -> bool:
        """Append if nothing has to be waited for, and return whether that is done. If not, call the log's `append`.

        That call must be outside of any `except` clause, or what it raises would not be the first error.
        """
        try:
            self._log.append_nowait(append)
        except NOT_AT_ONCE:
            return False
        return True

    async def _record(self, key: str, event: AnyEvent) -> None:
        """Append what must not be missing. If this is cancelled or raises, the end of the run makes up for it."""
        self._owed[key] = append = Append(event, key, self._lease)
        await self._checkpoint()
        self._check_not_over()
        if not self._append_at_once(append):
            await self._log.append(append)
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
        if all(map(self._append_at_once, self._owing())):
            return
        with fail_after(LAST_WORDS, shield=True):
            for owed in self._owing():
                await self._log.append(owed)

    def _owing(self) -> Iterator[Append]:
        """Yield all that is owed; each stops being owed when the next is asked for."""
        for key, owed in list(self._owed.items()):
            if not self._abandoned:
                yield owed
                self._owed.pop(key, None)

    async def _seal(self, seconds: float) -> None:
        """Append all that is owed, and the last event."""
        outcome = self._outcome
        self.over = True
        self._metrics.run_seconds.observe(seconds, outcome)
        if self._abandoned:
            return
        for call in list(self._calls.values()):
            self._owe_end(call, None, TOOL_ENDED.get(outcome, TOOL_LEFT_OPEN))
        answer = "".join(self._answer)
        text = answer if answer and len(_encode(answer)) <= self._room else None
        completed = AgentCompleted(
            **self._stamp(),
            outcome=outcome,
            seconds=seconds,
            text=text,
            error=self._error if outcome == "failed" else None,
            error_id=self._error_id,
            usage=self._usage,
        )
        key = completed_key(self.id)
        self._owed[key] = Append(completed, key, self._lease, self.post.seq)
        try:
            await self._settle()
        except Exception as error:  # what is missing keeps what would follow it from the log
            note(error, "The end of the run is not in the log.")
            report_error(error, conversation=self.post.conversation, run=self.id)


def _free_memory(error: BaseException) -> None:
    """Free what the frames behind a MemoryError hold: while it is in flight, others may need it."""
    for leaf in leaves(error):
        if is_any(leaf, (MemoryError,)):
            clear_frames(traceback_of(leaf))


def _interrupt(error: BaseException) -> BaseException | None:
    return next((leaf for leaf in leaves(error) if is_any(leaf, (KeyboardInterrupt,))), None)
