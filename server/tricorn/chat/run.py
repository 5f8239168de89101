"""What an agent holds while it answers a post."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any

from tricorn.chat.execution import Call, Execution
from tricorn.chat.protocol import AgentMessage, AgentThinking


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
        message: what is asked.
    """

    def __init__(self, execution: Execution) -> None:
        self.id = execution.id
        self.conversation = execution.post.conversation
        self.user = execution.post.user
        self.message = execution.post.text
        self._execution = execution

    # These two are no coroutine functions themselves: it saves a frame for every piece of an answer.

    def think(self, text: str) -> Coroutine[Any, Any, None]:
        """Say what the agent is doing. An empty text is no event."""
        return self._execution.speak(AgentThinking, text)

    def say(self, text: str) -> Coroutine[Any, Any, None]:
        """Say a piece of the answer, which is all pieces joined as they are. An empty text is no event."""
        return self._execution.speak(AgentMessage, text)

    def tool(self, name: str, /, **arguments: Any) -> Tool:
        """Show the use of a tool: `async with run.tool("forecast", city="Oslo") as tool: tool.result = ...`."""
        return Tool(self._execution, name, arguments)


class Tool:
    """A tool at work. Set `result` to what it found: anything that has a JSON form.

    Exceptions propagate, and if the log then refuses the end of the tool, that is a note on them. People are shown the
    text of a `ToolError`, and of any other only that the tool failed.

    Entering is a checkpoint. Leaving cannot be cancelled, so that no tool stays open: it waits at most `LAST_WORDS`
    seconds for the log, and not at all if the run is being ended.

    Raises:
        TypeError: an argument or the result has no JSON form.
        ValueError: the name, the arguments or the result are too long.
        RuntimeError: the run is over when the tool is entered.
    """

    def __init__(self, execution: Execution, name: str, arguments: dict[str, Any]) -> None:
        self.result: Any = None
        self._execution = execution
        self._name = name
        self._arguments = arguments
        self._call: Call

    async def __aenter__(self) -> Tool:
        self._call = await self._execution.start_call(self._name, self._arguments)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._execution.end_call(self._call, self.result, error)


Agent = Callable[[Run], Awaitable[str | None]]  # a text that it returns is said
