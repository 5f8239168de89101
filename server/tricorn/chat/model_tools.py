"""Tools that a model can call: what they have in common, wherever the work is done."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from msgspec import DecodeError, Raw
from msgspec.json import Decoder
from trio import Cancelled

from tricorn.chat.encoding import cut, encode
from tricorn.chat.run import Run
from tricorn.chat.tools import TOOL_FAILED, NotAnswered, ToolError, shown
from tricorn.errors.chain import hides_an_error, is_any
from tricorn.errors.failures import PASSING, forget_contexts, leaves, passing
from tricorn.errors.report import report_error

SECONDS = 60.0  # that a call may take
APPROVAL = ("yes", "no")
CHARACTERS = 20_000  # of a result, or of an error, that a model is given
MALFORMED_MAX = 500  # characters of arguments that are no JSON object, which people are shown

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what the APIs of models take

_decode_object = Decoder(dict[str, Any]).decode


class Tool(ABC):
    """A tool that a model can call. `@tool` makes one of a function, and `mcp` has those of an MCP server.

    Attributes:
        name: unique among the tools of an agent (see `by_name`).
        description: what the model is told about it.
        parameters: JSON schema of its arguments, an object.
        seconds: that one call may take.
        characters: of a result that the model is given.
        approve: what people are asked before each call, which they must answer with "yes"; None if they are not asked.
    """

    def __init__(
        self,
        name: str,
        description: str,
        parameters: dict[str, Any],
        *,
        seconds: float = SECONDS,
        characters: int = CHARACTERS,
        approve: str | None = None,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise TypeError(f"the name of a tool is 1 to 64 of A-Z, a-z, 0-9, _ and -, not {name!r}")
        if not seconds > 0:
            raise TypeError(f"seconds must be more than 0, not {seconds!r}")
        if not characters > 0:
            raise TypeError(f"characters must be more than 0, not {characters!r}")
        self.name = name
        self.description = description
        self.parameters = parameters
        self.seconds = seconds
        self.characters = characters
        self.approve = approve

    async def call(self, run: Run, arguments: bytes | str) -> str:
        """Perform a call that a model has asked for, show it in the run, and return the text for the model.

        That is the result as JSON, or as it is if it is a str; or, if the tool failed, a text that begins with
        "Error: ". A failure never ends the run: the model and people see the text of a `ToolError`, which arguments
        are wrong, that the tool timed out, or that people did not approve the call. Anything else is reported, and they
        see the error id. Results and errors that are too long are cut, with a notice.

        Several calls can go on at once, each in a task of the agent's.

        If cancelled, the tool is cancelled.

        Args:
            run: the run that it is part of.
            arguments: a JSON object, as the model wrote it. An empty text is an empty object.

        Raises:
            RuntimeError: the run is over.
        """
        json = (arguments.encode(errors="replace") if isinstance(arguments, str) else arguments).strip() or b"{}"
        given, problem = _read(json)
        try:
            async with run.tool(self.name, **given) as call:
                if problem is not None:
                    raise _Failed(problem)
                if self.approve is not None:
                    await _approval(run, self.approve)
                result, encoded = await self._perform_in_time(run, json)
                call.result = None if result is None else Raw(encoded)
        except _Failed as failed:
            text = f"Error: {failed}"
        else:
            text = result if isinstance(result, str) else encoded.decode()
        return cut(text, self.characters)

    @abstractmethod
    async def perform(self, run: Run, arguments: bytes) -> object:
        """Do the work, given a JSON object. Raise `ToolError` for what the model and people are to see."""

    async def _perform_in_time(self, run: Run, arguments: bytes) -> tuple[object, bytes]:
        """Return the result, also as JSON. Raises `_Failed`, and what ends the run."""
        ending: BaseException | None = None
        hidden: BaseException | None = None
        try:
            with run.move_on_after(self.seconds):
                try:
                    result = await self.perform(run, arguments)
                    return result, encode(result)
                except BaseException as error:  # noqa: ASYNC103 - what ends the run is raised again
                    ending = passing(error)
                    if ending is error:
                        hidden = error if hides_an_error(error) else None
                        raise
                    failure = self._failure(error, run)
                if ending is not None:
                    forget_contexts(ending)  # they have been reported
                    raise ending
                raise _Failed(failure)
            # Cancelled by its deadline, which says nothing of an error below.
            if hidden is not None:
                self._report(hidden, run)
            raise _Failed(f"timed out after {self.seconds:g} s")
        finally:
            ending = hidden = None  # their tracebacks have this frame: the garbage collector need not free it

    def _failure(self, error: BaseException, run: Run) -> str:
        """Return what may be seen of a failure. What is nobody's to see is reported."""
        if all(is_any(leaf, (ToolError, NotAnswered, *PASSING)) for leaf in leaves(error)):
            return shown(error, Cancelled, None, self.characters)
        return f"{TOOL_FAILED} (error id {self._report(error, run)})"

    def _report(self, error: BaseException, run: Run) -> str:
        about = {"conversation": run.conversation, "run": run.id, "tool": self.name}
        return report_error(error, context={"user": run.user}, **about)


def by_name(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Return the tools of an agent by their names. Raises ValueError if two have the same."""
    found: dict[str, Tool] = {}
    for each in tools:
        if each.name in found:
            raise ValueError(f"two tools have the name {each.name!r}; give one of them another")
        found[each.name] = each
    return found


class _Failed(ToolError):
    """A call has failed, and this is what may be seen of it."""


async def _approval(run: Run, question: str) -> None:
    """Ask people whether to go on. Raises `_Failed` if they do not say yes."""
    try:
        answer = await run.ask(question, choices=APPROVAL)
    except NotAnswered:
        raise _Failed("nobody approved this call in time") from None
    if answer != APPROVAL[0]:
        raise _Failed("the user has refused this call")


def _read(arguments: bytes) -> tuple[dict[str, Any], str | None]:
    """Return the arguments to show, and what is wrong if they are no JSON object."""
    try:
        return _decode_object(arguments), None
    except (DecodeError, RecursionError) as error:
        problem = f"the arguments must be a JSON object: {error}"
    return {"malformed": cut(arguments.decode(errors="replace"), MALFORMED_MAX)}, problem
