"""One run as the host sees it: from its start to its end in the log, whatever the agent does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from math import inf, isfinite
from secrets import token_hex
from time import time
from traceback import clear_frames
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from msgspec import Raw
from msgspec.json import Decoder, Encoder
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
    move_on_at,
)
from trio.lowlevel import Task, checkpoint, checkpoint_if_cancelled, current_task

from tricorn.chat.agent_error import for_people
from tricorn.chat.encoding import encode, shortened
from tricorn.chat.history import Past, Turn, read_history
from tricorn.chat.logs.base import Append, Lease, LeaseLost, PastLost
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.protocol import (
    ENVELOPE,
    AgentAsked,
    AgentAsking,
    AgentCompleted,
    AgentMessage,
    AgentStarted,
    AgentThinking,
    AnyEvent,
    AskOutcome,
    Outcome,
    ToolCompleted,
    ToolExecuting,
    Usage,
    UserMessage,
)
from tricorn.chat.settings import ChatSettings
from tricorn.chat.tools import TOOL_ENDED, TOOL_FAILED, TOOL_LEFT_OPEN, TOOL_NAME_MAX, NotAnswered, shown
from tricorn.chat.working_time import WorkingTime
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
_decode_asked = Decoder(AgentAsked).decode

# How questions end that are open at the end of a run, by its outcome, if not as cancelled.
ASK_ENDED: dict[Outcome | None, AskOutcome] = {"timeout": "timeout", "interrupted": "interrupted"}

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


class Ask:
    """A question of a run that waits: it is over with an answer, or without."""

    def __init__(self, id: str, run: Execution) -> None:
        self.id = id
        self.run = run
        self.answer: str | None = None
        self.is_over = False
        self.changed = Waiter()


class Runs:
    """Where the agents of a chat work: the nursery of their tasks, and what watches over their time."""

    def __init__(self, nursery: Nursery) -> None:
        self.nursery = nursery
        self.reaper = Reaper()


class Execution:
    """Performs an agent on a post, for at most `run_timeout` seconds, under a lease. The agent holds a `Run` of it.

    One with a parent is a child: a part of what the parent's agent does, shown as that of another agent. It is not
    performed: `start_child` and `end_child` of the parent are its beginning and its end.

    Attributes:
        message: what is asked: the text of the post, or the task of a child.
        agent: the name of a child's agent.
        patience: when it must have ended, in Trio's time; the time in which it waits for a person does not count.
        time: in which it works.
        over: it takes no more events from the agent, although its last ones may still be on their way.
    """

    __slots__ = (  # with more than 30 attributes, looking one up in a dictionary slows every `say`
        "_abandoned",
        "_answer",
        "_answer_characters",
        "_asks",
        "_began",
        "_calls",
        "_cause",
        "_changed",
        "_children",
        "_close_timeout",
        "_error",
        "_error_id",
        "_has_asked",
        "_lease",
        "_log",
        "_metrics",
        "_numbers",
        "_outcome",
        "_owed",
        "_parent",
        "_plain",
        "_reaper",
        "_room",
        "_root",
        "_said",
        "_scope",
        "_settings",
        "_task",
        "_usage",
        "_working",
        "agent",
        "id",
        "message",
        "over",
        "post",
        "time",
    )

    def __init__(
        self,
        post: UserMessage,
        lease: Lease | None,
        log: Appender,
        settings: ChatSettings,
        metrics: ChatMetrics,
        *,
        parent: Execution | None = None,
        agent: str = "",
        message: str | None = None,
    ) -> None:
        self.id = token_hex(8)
        self.post = post
        self.message = post.text if message is None else message
        self.agent = agent
        self.over = False
        self._parent = parent
        self._root: Execution = self if parent is None else parent._root  # noqa: SLF001
        self._settings = settings
        self._lease = lease
        self._log = log
        self._metrics = metrics
        self._began = current_time()
        self._close_timeout = settings.close_timeout
        self._scope = CancelScope(deadline=self._began + settings.run_timeout)  # a child has none of its own
        if parent is None:
            self.time = WorkingTime()
            self.time.watch(self._scope)
        else:
            self.time = parent.time
        self._reaper: Reaper  # as soon as it performs
        self._has_asked = False
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
        self._children: dict[str, Execution] = {}
        self._asks: dict[str, Ask] = {}  # questions that wait, also of children
        self._owed: dict[str, Append] = {}  # by key: what must be in the log before the end, and may not be there yet
        if parent is not None:
            self._asks, self._owed = parent._asks, parent._owed  # noqa: SLF001

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
        self._reaper = runs.reaper
        self._reaper.watch(self)
        try:
            while self._working and not self._scope.cancel_called:
                if self._has_asked:
                    with move_on_at(self.patience):
                        await self._changed.wait()
                else:
                    await self._changed.wait()
        except Cancelled:
            if self._outcome == "success":  # the agent has swallowed the same cancellation
                self._outcome = "interrupted"
            raise
        finally:
            self._reaper.forget(self)
            if self._working:
                await self._end()
            await self._seal(current_time() - self._began)
        await checkpoint_if_cancelled()  # it may have been cancelled while it was woken for another reason

    @property
    def patience(self) -> float:
        return self._scope.deadline

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

    async def ask(self, text: str, choices: Sequence[str], seconds: float) -> str:
        """Ask people, and return the first answer in the log. A checkpoint.

        If cancelled, the question ends without an answer. Raises NotAnswered if the time is up.
        """
        self._check_question(text, choices, seconds)
        await checkpoint_if_cancelled()
        id = f"{self.id}.{next(self._numbers)}"
        asking = AgentAsking(**self._stamp(), ask=id, text=text, until=time() + seconds, choices=list(choices) or None)
        ask = self._asks[id] = Ask(id, self)
        try:
            with self._waiting_for_people():
                await self._record(f"{id}:asking", asking)
                with move_on_after(seconds):
                    while not ask.is_over:
                        await ask.changed.wait()
        except BaseException as error:
            await self._end_ask(ask, ASK_ENDED.get(self._ending(), "cancelled"), error)
            raise
        if not ask.is_over:
            await self._end_ask(ask, "timeout", None)
            if entry := await self._log.find(completed_key(id)):  # an answer may have come first
                ask.answer = _decode_asked(entry.json).answer
        if ask.answer is None:
            raise NotAnswered(f"nobody answered within {seconds:g} s: {text}")
        return ask.answer

    def hear(self, id: str, answer: str | None) -> None:
        """A question is over, says the log. May be told again."""
        ask = self._asks.pop(id, None)
        if ask is not None:
            ask.answer, ask.is_over = answer, True
            ask.changed.wake()

    async def start_child(self, agent: str, task: str) -> Execution:
        """Append the start of a child. A checkpoint; if cancelled before anybody sees it, it has not started."""
        self._check_text(agent, "the name of an agent")
        if not 0 < len(agent) <= TOOL_NAME_MAX:
            raise ValueError(f"the name of an agent has {len(agent)} characters; it must have 1 to {TOOL_NAME_MAX}")
        if not isinstance(task, str):
            raise TypeError(f"a task must be a str, not {type(task).__name__}")
        await checkpoint_if_cancelled()
        child = Execution(
            self.post,
            self._lease,
            self._log,
            self._settings,
            self._metrics,
            parent=self,
            agent=agent,
            message=task,
        )
        self._children[child.id] = child
        started = AgentStarted(**child._stamp(), agent=agent, post="", post_seq=0, parent=self.id)
        await self._record(f"{child.id}:started", started)
        return child

    async def end_child(self, child: Execution, error: BaseException | None) -> None:
        """Append the end of a child, and of all that is open in it. Cannot be cancelled.

        What its block raised makes it fail, unless that is only a cancellation.
        """
        if child.over:  # the end of the run has spoken for it
            return
        outcome: Outcome = "success"
        if error is not None:
            _free_memory(error)
            failed = not all(is_any(leaf, (Cancelled,)) for leaf in leaves(error))
            outcome = self._ending() or ("failed" if failed else "cancelled")
        child.close(outcome, for_people(list(leaves(error))) if error is not None and outcome == "failed" else None)
        del self._children[child.id]
        await self._settle_in_time(f"the agent {child.agent!r}", error)

    @property
    def text(self) -> str:
        """What was said until now."""
        return "".join(self._answer)

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
        if self._parent is not None:
            return self._root._ending()  # noqa: SLF001
        return self._cause or ("timeout" if self._scope.cancel_called else None)

    def _stamp(self) -> dict[str, Any]:
        # The log sets `seq` and `at`.
        return {"conversation": self.post.conversation, "run": self.id, "seq": 0, "at": 0.0}

    @contextmanager
    def _waiting_for_people(self) -> Iterator[None]:
        """Have the time stand still for the length of a block."""
        root = self._root
        # All in the reaper's line have the same time, so from now on `perform` looks after it.
        root._reaper.forget(root)  # noqa: SLF001
        root._has_asked = True  # noqa: SLF001
        root._changed.wake()  # noqa: SLF001
        try:
            with self.time.standing_still():
                yield
        finally:
            root._changed.wake()  # noqa: SLF001

    def _check_question(self, text: str, choices: Sequence[str], seconds: float) -> None:
        self._check_text(text, "a question")
        if not (seconds > 0 and isfinite(seconds)):
            raise ValueError(f"the seconds for an answer must be a finite number above 0, not {seconds!r}")
        if isinstance(choices, str) or not all(isinstance(each, str) and each.strip() for each in choices):
            raise TypeError("choices must be a sequence of texts that are not empty")
        self._check_size(_encode([text, *choices]), "a question")

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
            await self._settle_in_time(f"the tool {call.tool!r}", in_flight)

    async def _end_ask(self, ask: Ask, outcome: AskOutcome, in_flight: BaseException | None) -> None:
        """Append the end of a question, if it is not over. While an exception is in flight, this raises none over it.

        If the log has an answer meanwhile, that stays the end.
        """
        if ask.id in self._asks:
            self._owe_asked(ask, outcome)
            await self._settle_in_time("a question", in_flight)

    async def _settle_in_time(self, what: str, in_flight: BaseException | None) -> None:
        """Append all that is owed, unless the run is being ended: then that does it."""
        if not self._ending():  # a timeout that the agent itself has put around the block does not end the run
            try:
                with suppress(TooSlowError):
                    await self._settle()
            except Exception as refusal:  # the end of the run tries again, and reports it
                if in_flight is None:
                    raise
                note(in_flight, f"The end of {what} is not in the log: {title(refusal)}")

    def _owe_asked(self, ask: Ask, outcome: AskOutcome) -> None:
        del self._asks[ask.id]
        key = completed_key(ask.id)
        self._owed[key] = Append(AgentAsked(**self._stamp(), ask=ask.id, outcome=outcome), key, self._lease)

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
            if not self._root._abandoned:  # noqa: SLF001
                yield owed
                self._owed.pop(key, None)

    async def _seal(self, seconds: float) -> None:
        """Append all that is owed, and the last event."""
        outcome = self._outcome
        self._metrics.run_seconds.observe(seconds, outcome)
        self.close(outcome, self._error, self._error_id)
        try:
            await self._settle()
        except Exception as error:  # what is missing keeps what would follow it from the log
            note(error, "The end of the run is not in the log.")
            report_error(error, conversation=self.post.conversation, run=self.id)

    def close(self, outcome: Outcome, error: str | None, error_id: str | None = None) -> None:
        """Take no more events, and owe the end of all that is open, the innermost first, and the last event."""
        self.over = True
        for child in reversed(self._children.values()):
            child.close("cancelled" if outcome in ("success", "failed") else outcome, None)
        for call in list(self._calls.values()):
            self._owe_end(call, None, TOOL_ENDED.get(outcome, TOOL_LEFT_OPEN))
        for ask in [each for each in self._asks.values() if each.run is self]:
            self._owe_asked(ask, ASK_ENDED.get(outcome, "cancelled"))
        answer = "".join(self._answer)
        text = answer if answer and len(_encode(answer)) <= self._room else None
        completed = AgentCompleted(
            **self._stamp(),
            outcome=outcome,
            seconds=current_time() - self._began,
            text=text,
            error=error if outcome == "failed" else None,
            error_id=error_id,
            usage=self._usage,
        )
        key = completed_key(self.id)
        self._owed[key] = Append(completed, key, self._lease, self.post.seq if self._parent is None else None)


def _free_memory(error: BaseException) -> None:
    """Free what the frames behind a MemoryError hold: while it is in flight, others may need it."""
    for leaf in leaves(error):
        if is_any(leaf, (MemoryError,)):
            clear_frames(traceback_of(leaf))


def _interrupt(error: BaseException) -> BaseException | None:
    return next((leaf for leaf in leaves(error) if is_any(leaf, (KeyboardInterrupt,))), None)
