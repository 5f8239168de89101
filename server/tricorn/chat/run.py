"""What an agent holds while it answers a post."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from trio import CancelScope, current_time

from tricorn.chat.execution import Call, Execution
from tricorn.chat.history import CHARACTERS, TURNS, Turn
from tricorn.chat.protocol import AgentMessage, AgentThinking

ASK_SECONDS = 600.0  # that people have to answer, if the agent does not say another time


class Run:
    """What an agent was asked, and the ways to show its work, until its time is up.

    `think` and `say` return once the event is in the log. If the log is in memory they do not wait, but every 64th
    event lets other tasks run. If one is cancelled, its event may be in the log or not. They raise RuntimeError after
    the end of the run, and ValueError if the event would be longer than `event_bytes`.

    The agent has a task and a context of its own. Once its run was cancelled or has timed out, it has `close_timeout`
    seconds to clean up; the run then ends without it, and its outcome is why it was ended, whatever the agent does.

    Attributes:
        id: of the run.
        conversation: its id.
        user: who asks.
        message: what is asked: the post, or the task of a child.
    """

    def __init__(self, execution: Execution) -> None:
        self.id = execution.id
        self.conversation = execution.post.conversation
        self.user = execution.post.user
        self.message = execution.message
        self._execution = execution

    async def history(self, *, turns: int = TURNS, characters: int = CHARACTERS) -> list[Turn]:
        """Return what was said in this conversation before this run, in order: the last turns, from the log.

        It is the same at every instance and after a restart. Runs that failed or were ended are turns too, with what
        they had said until then. Posts that wait for their answer are not.

        A checkpoint; it may be cancelled. Each call reads the log.

        Args:
            turns: at most so many.
            characters: of texts, answers, and tools' arguments and results in all, at most. If the last turn alone has
                more, it comes without its tools, and with the end of its answer. A token has about four characters.

        Raises:
            Unavailable: the log does not answer.
            RuntimeError: the run is over.
        """
        return await self._execution.history(turns, characters)

    async def ask(self, question: str, /, *, choices: Sequence[str] = (), seconds: float = ASK_SECONDS) -> str:
        """Ask people, and return their answer: `await run.ask("Send it?", choices=["yes", "no"])`.

        Anybody who may follow the conversation can answer, at any instance; the first answer counts. Question and
        answer are in the log. The deadlines of the run and of its tools stand still until then.

        If cancelled, the question ends. If nobody follows the conversation for `abandon_after` seconds, the run ends.

        Args:
            question: what people are asked.
            choices: the answers that are taken, exactly; if there are none, any text is.
            seconds: that people have to answer.

        Raises:
            NotAnswered: nobody answered in time. It is an AgentError: if the agent lets it pass, people are told.
            TypeError, ValueError: the question is not one, or too long.
            RuntimeError: the run is over.
        """
        return await self._execution.ask(question, choices, seconds)

    def move_on_after(self, seconds: float) -> AbstractContextManager[CancelScope]:
        """Do as `trio.move_on_after`, but do not count the time in which the run waits for an answer of people."""
        return self._execution.time.limit(CancelScope(deadline=current_time() + seconds))

    def used(self, *, input: int, output: int, cached: int = 0) -> None:
        """Count tokens that a model has read and written for this run, `cached` ones of `input` from a cache.

        Several calls add up. The sum is in `agent_completed`. Raises RuntimeError after the end of the run.
        """
        self._execution.used(input, output, cached)

    # These two are no coroutine functions themselves: it saves a frame for every piece of an answer.

    def think(self, text: str) -> Coroutine[Any, Any, None]:
        """Say what the agent is doing. An empty text is no event."""
        return self._execution.speak(AgentThinking, text)

    def say(self, text: str) -> Coroutine[Any, Any, None]:
        """Say a piece of the answer, which is all pieces joined as they are. An empty text is no event."""
        return self._execution.speak(AgentMessage, text)

    def tool(self, name: str, /, **arguments: Any) -> RunningTool:
        """Show the use of a tool: `async with run.tool("forecast", city="Oslo") as tool: tool.result = ...`."""
        return RunningTool(self._execution, name, arguments)

    def agent(self, name: str, task: str, /) -> RunningAgent:
        """Show a part of the work as that of another agent: `async with run.agent("researcher", task) as child: ...`.

        In the block, `child` is a run below this one, with an id of its own, whose `message` is the task. Give it to
        any agent: `await researcher(child)`. What it says is no part of this run's answer: it is `child.text`.
        """
        return RunningAgent(self._execution, name, task)

    @property
    def text(self) -> str:
        """What the run has said until now: the answer, once it is over. At most about `event_bytes` characters."""
        return self._execution.text


class RunningTool:
    """A tool at work. Set `result` to what it found: anything that has a JSON form (see `tricorn.chat.encoding`).

    If the arguments or the result are longer than `event_bytes` allows, people are shown their beginning.

    Exceptions propagate, and if the log then refuses the end of the tool, that is a note on them. People are shown the
    text of a `ToolError`, and of any other only that the tool failed.

    Entering is a checkpoint. Leaving cannot be cancelled, so that no tool stays open: it waits at most `LAST_WORDS`
    seconds for the log, and not at all if the run is being ended.

    Raises:
        TypeError: an argument or the result has no JSON form.
        ValueError: the name is too long.
        RuntimeError: the run is over when the tool is entered.
    """

    def __init__(self, execution: Execution, name: str, arguments: dict[str, Any]) -> None:
        self.result: Any = None
        self._execution = execution
        self._name = name
        self._arguments = arguments
        self._call: Call

    async def __aenter__(self) -> RunningTool:
        self._call = await self._execution.start_call(self._name, self._arguments)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._execution.end_call(self._call, self.result, error)


class RunningAgent:
    """A run below another one, for the length of a block: it starts and ends with that, and ends before its parent.

    At the end of the block all that is open in the child ends, and its `agent_completed` is in the log. If the block
    raises, the child has failed; people see the text of an `AgentError`. The exception propagates, and if the log then
    refuses the end of the child, that is a note on it. If it was cancelled, so is the child.

    Entering is a checkpoint. Leaving cannot be cancelled: it waits at most `LAST_WORDS` seconds for the log, and not at
    all if the run is being ended.

    Raises:
        TypeError, ValueError: the name or the task is none.
        RuntimeError: the run is over when the block is entered.
    """

    def __init__(self, execution: Execution, name: str, task: str) -> None:
        self._execution = execution
        self._name = name
        self._task = task
        self._child: Execution

    async def __aenter__(self) -> Run:
        self._child = await self._execution.start_child(self._name, self._task)
        return Run(self._child)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._execution.end_child(self._child, error)


Agent = Callable[[Run], Awaitable[str | None]]  # a text that it returns is said
