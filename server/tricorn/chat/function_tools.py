"""Functions as tools of a model: `@tool`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial, update_wrapper
from inspect import (
    Parameter,
    Signature,
    getdoc,
    isasyncgenfunction,
    iscoroutinefunction,
    isgeneratorfunction,
    signature,
    unwrap,
)
from os.path import basename
from textwrap import dedent
from typing import Annotated, Any, Generic, ParamSpec, TypeVar, Union, get_type_hints, overload

from msgspec import UNSET, DecodeError, Meta, Struct, UnsetType, defstruct
from msgspec.json import Decoder, decode, schema_components
from trio import to_thread

from tricorn.chat.encoding import encode
from tricorn.chat.model_tools import CHARACTERS, SECONDS, Tool
from tricorn.chat.run import Run
from tricorn.chat.threads import ThreadLimit
from tricorn.chat.tools import ToolError
from tricorn.errors.chain import is_any
from tricorn.errors.failures import PASSING, leaves
from tricorn.errors.report import report_error

THREADS = 32  # functions at work at a time, also those that are abandoned and have not ended; others wait

_ARGS = re.compile(r"^Args:[ \t]*\n((?:[ \t]+\S.*(?:\n|\Z)|[ \t]*\n)*)", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\w+)(?: *\([^)]*\))?:[ \t]*(.*(?:\n+[ \t]+.*)*)", re.MULTILINE)

_limit = ThreadLimit("threads of tools", THREADS)

P = ParamSpec("P")
R = TypeVar("R")


class FunctionTool(Tool, Generic[P, R]):
    """A function that a model can call, made by `@tool`. It can still be called as the function that it is.

    Attributes:
        function: the function itself.
    """

    def __init__(
        self, function: Callable[P, R], name: str | None, seconds: float, characters: int, approve: str | None
    ) -> None:
        self.function = function
        known_as = name or getattr(function, "__name__", None) or type(function).__name__
        try:
            hints = _parameters(function)
            self._run_parameters = [each for each, (hint, _) in hints.items() if hint is Run]
            description, explained = _documentation(function)
            fields = [_field(each, *hints[each], explained.get(each)) for each in hints if hints[each][0] is not Run]
            arguments = defstruct("Arguments", fields, kw_only=True, forbid_unknown_fields=True)
            self._decode = Decoder(arguments).decode
            limits: dict[str, Any] = {"seconds": seconds, "characters": characters}
            super().__init__(known_as, description, _schema(arguments), **limits, approve=approve)
        except (TypeError, NameError) as error:
            problem = " ".join(str(error).split())
            raise TypeError(f"tool {known_as!r}{_place(function)}: {problem}") from None
        self._is_async = iscoroutinefunction(function)
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    async def perform(self, run: Run, arguments: bytes) -> object:
        """Call the function: an async one in this task, any other in a thread, which is abandoned if cancelled."""
        try:
            given = self._decode(arguments)
        except DecodeError as error:
            raise ToolError(f"wrong arguments: {error}") from None
        values = {each: getattr(given, each) for each in given.__struct_fields__}
        values = {each: value for each, value in values.items() if value is not UNSET}
        values |= dict.fromkeys(self._run_parameters, run)
        function: Callable[..., Any] = self.function
        if self._is_async:
            return await function(**values)
        return await _in_thread(partial(function, **values), run, self.name)


@overload
def tool(function: Callable[P, R], /) -> FunctionTool[P, R]: ...
@overload
def tool(
    *, name: str | None = None, seconds: float = SECONDS, characters: int = CHARACTERS, approve: str | None = None
) -> Callable[[Callable[P, R]], FunctionTool[P, R]]: ...
def tool(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    seconds: float = SECONDS,
    characters: int = CHARACTERS,
    approve: str | None = None,
) -> FunctionTool[P, R] | Callable[[Callable[P, R]], FunctionTool[P, R]]:
    """Make a tool of a function: `@tool`, or with options, `@tool(seconds=10)`.

    The model is told the name, the docstring, and of each parameter the type, the default, and what the docstring says
    about it in a section `Args:`. What it sends is checked against the types, strictly. Types are those that msgspec
    can decode, with its `Meta` for further constraints. A parameter with the type `Run` gets the run, of which the
    model does not know.

    A function that is not async runs in a thread. If the run ends or the time is up, the thread is abandoned: the run
    goes on without it, and it ends when the function returns, or calls `trio.from_thread.check_cancelled`.

    Args:
        name: what the model calls it, if not by the name of the function.
        seconds: that a call may take; then it is cancelled, and the model is told.
        characters: of the result that the model is given; more are cut, with a notice.
        approve: what people are asked before each call, as "Send the mail?". If they do not answer "yes", the function
            does not run, and the model is told.

    Raises:
        TypeError: the function cannot be a tool; the text says why.
    """
    if function is None:
        return lambda each: FunctionTool(each, name, seconds, characters, approve)
    return FunctionTool(function, name, seconds, characters, approve)


def _parameters(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Return type and default of each parameter by its name. Raises TypeError for what a model cannot pass."""
    if isgeneratorfunction(function) or isasyncgenfunction(function):
        raise TypeError("it is a generator; return the whole result")
    inner = function.func if isinstance(function, partial) else unwrap(function)
    hints = get_type_hints(inner, include_extras=True)
    found: dict[str, tuple[Any, Any]] = {}
    for name, parameter in signature(function).parameters.items():
        if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            raise TypeError(f"it takes {parameter}; a model needs each parameter by name")
        if parameter.kind is Parameter.POSITIONAL_ONLY:
            raise TypeError(f"the parameter {name!r} is positional-only; a model passes arguments by name")
        if name not in hints:
            raise TypeError(f"the parameter {name!r} has no annotation; write its type, as in {name}: str")
        found[name] = hints[name], parameter.default
    return found


def _field(name: str, hint: Any, default: Any, explanation: str | None) -> Any:
    """Return a parameter as the field of a struct.

    What the model leaves out is UNSET, so that Python puts the default in, whatever that is.
    """
    told: dict[str, Any] = {} if explanation is None else {"description": explanation}
    if default is Signature.empty:
        return name, Annotated[hint, Meta(**told)]
    try:
        told["extra_json_schema"] = {"default": decode(encode(default))}
    except Exception:  # nothing that JSON can say
        told["extra_json_schema"] = {}
    return name, Annotated[Union[hint, UnsetType], Meta(**told)], UNSET  # noqa: UP007 (the hint may be a text)


def _schema(arguments: type[Struct]) -> dict[str, Any]:
    """Return the schema of the arguments; other types that it uses are in its `$defs`."""
    _, schemas = schema_components((arguments,), ref_template="#/$defs/{name}")
    schema = schemas.pop("Arguments")
    del schema["title"]
    return {**schema, "$defs": schemas} if schemas else schema


def _documentation(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return the docstring without its section `Args:`, and what that says about each parameter."""
    text = getdoc(unwrap(function)) or ""
    section = _ARGS.search(text)
    if section is None:
        return text, {}
    explained = {name: " ".join(words.split()) for name, words in _ARGUMENT.findall(dedent(section[1]))}
    return f"{text[: section.start()].strip()}\n\n{text[section.end() :].strip()}".strip(), explained


def _place(function: Callable[..., Any]) -> str:
    code = getattr(unwrap(function), "__code__", None)
    return "" if code is None else f" ({basename(code.co_filename)}, line {code.co_firstlineno})"


async def _in_thread(function: Callable[[], object], run: Run, name: str) -> object:
    """Call a function in a thread. If cancelled, leave it there; what it then raises is reported."""
    is_abandoned = False

    def work() -> object:
        try:
            return function()
        except BaseException as error:
            if is_abandoned and not all(is_any(leaf, PASSING) for leaf in leaves(error)):
                report_error(error, conversation=run.conversation, run=run.id, tool=name)
            raise

    try:
        return await to_thread.run_sync(work, abandon_on_cancel=True, limiter=_limit.limiter())
    finally:
        is_abandoned = True  # or it has ended
