"""Loads what the command line names as module:function: an agent, a handler or an ASGI application."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from inspect import getsourcefile, getsourcelines, isasyncgenfunction, isclass, iscoroutinefunction, signature, unwrap
from os import getcwd, sep
from os.path import basename, dirname
from sysconfig import get_path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from tricorn.asgi_handler import AsgiHandler, asgi_handler, is_asgi_app
from tricorn.settings import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from types import ModuleType

    from tricorn.chat import Agent
    from tricorn.websocket import Handler


AGENT = "an async function of one parameter, like: async def {path}(run)"
HANDLER = "an ASGI application, or an async function of one parameter, like: async def {path}(ws)"


class Name(NamedTuple):
    """What is named as module:function, and how to speak of it."""

    label: str  # what errors begin with
    module: str
    path: str
    wanted: str

    def error(self, problem: str) -> SettingError:
        """Make the error that says what is wrong with it."""
        return SettingError(f"{self.label}: {problem}")


class AgentFactory(NamedTuple):
    """What makes the agent when the server starts: `open` returns an async context manager that yields it."""

    name: Name
    open: Callable[[], AbstractAsyncContextManager[object]]


def look_here_for(module: str) -> None:
    """Put the working directory first on `sys.path` if it has this module.

    Else whatever happens to lie there would be imported in place of the standard library and of installed packages.
    """
    package, here = module.partition(".")[0], getcwd()
    if package not in sys.modules and PathFinder.find_spec(package, [here]) is not None and sys.path[:1] != [here]:
        sys.path.insert(0, here)


def agent_name(text: str) -> Name:
    """Split the name of an agent. Raises `SettingError` if it is not module:function."""
    return _split(f"--agent {text}", text, AGENT, "tricorn.chat.agents.demo:demo")


def load_agent(text: str) -> Agent | AgentFactory:
    """Import the agent that `text` (module:function) names. Raises `SettingError` that says what is wrong with it.

    An agent is anything async that can be called with one argument: a function, a partial one, an object. A factory is
    anything else that can be called with none: a function under `@asynccontextmanager`, a class that is an async
    context manager, a function that returns one. Neither is called here.
    """
    name = agent_name(text)
    found = _find(name)
    return AgentFactory(name, found) if _is_factory(name, found) else cast("Agent", _check(name, found))


def check_made(factory: AgentFactory, made: object) -> Agent:
    """Return an agent that a factory has made. Raises `SettingError` if it is none."""
    name = factory.name
    return cast("Agent", _check(name._replace(label=f"{name.label}, what it yields", path="agent"), made))


def load_handler(text: str) -> Handler | AsgiHandler:
    """Import a handler of WebSockets, or an ASGI application, in the same way. Of an application, make a handler."""
    name = _split(f"run {text}", text, HANDLER, "my_server:handler")
    found = _find(name)
    if is_asgi_app(found):
        return asgi_handler(found)
    return cast("Handler", _check(name, found))


def _split(label: str, text: str, wanted: str, example: str) -> Name:
    module, _, path = text.partition(":")
    name = Name(label, module, path, wanted)
    if not all(part.isidentifier() for part in [*module.split("."), *path.split(".")]):
        raise name.error(f"must be module:function, for example {example}")
    return name


def _find(name: Name) -> Any:
    module = _import(name)
    found: Any = module
    for part in name.path.split("."):
        found = getattr(found, part, None)
    if found is None:
        file = getattr(module, "__file__", None)
        raise name.error(f"there is no {name.path} in {name.module}{f' ({basename(file)})' if file else ''}")
    return found


def _is_factory(name: Name, found: Any) -> bool:
    """Whether it makes agents. Raises `SettingError` if it would, but for one thing."""
    if not callable(found) or _is_async(found):
        return False
    if isasyncgenfunction(found):
        raise name.error(f"is an async generator; put @asynccontextmanager above it{_where(found)}")
    manages = hasattr(found, "__aenter__") and hasattr(found, "__aexit__")
    if isclass(found) and not manages:
        return False
    try:
        signature(found).bind()
    except ValueError:  # of a builtin
        return False
    except TypeError:
        if isclass(found) or isasyncgenfunction(unwrap(found)):
            takes = f"takes {signature(found)}; what makes an agent must take nothing"
            raise name.error(f"{takes}{_where(found)}") from None
        return False
    return True


def _is_async(found: Any) -> bool:
    return iscoroutinefunction(found) or iscoroutinefunction(type(found).__call__)


def _where(found: Any) -> str:
    """Say in which file and line it is, if its source is there."""
    found = unwrap(found)
    try:
        return f" ({basename(getsourcefile(found) or '')}, line {getsourcelines(found)[1]})"
    except (OSError, TypeError):
        return ""


def _check(name: Name, found: Any) -> object:
    takes = f"must be {name.wanted.format(path=name.path)}"
    if not callable(found):
        raise name.error(f"is of type {type(found).__name__}; {takes}")
    if not _is_async(found):
        raise name.error(f"is not async; {takes}{_where(found)}")
    try:
        signature(found).bind(None)
    except TypeError:
        raise name.error(f"takes {signature(found)}; {takes}{_where(found)}") from None
    return found


def _import(name: Name) -> ModuleType:
    look_here_for(name.module)
    try:
        return import_module(name.module)
    except ModuleNotFoundError as error:
        # What is missing may be the module itself, a package it should be in, or something that it imports.
        if error.name and f"{name.module}.".startswith(f"{error.name}."):
            raise name.error(f"there is no module {error.name} in this directory or installed") from None
        raise name.error(f"importing {name.module} raised {describe(error)}") from None
    except (Exception, SystemExit) as error:
        raise name.error(f"importing {name.module} raised {describe(error)}") from None


def describe(error: BaseException) -> str:
    """Say in one line what code of others raised, and where: in which line of theirs that is not in a library."""
    shown = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, SyntaxError):  # which says itself where it is
        return shown
    frames = extract_tb(error.__traceback__)
    theirs = [each for each in frames if not _is_library(each.filename)]
    place = (theirs or frames)[-1]
    return f"{shown} ({basename(place.filename)}, line {place.lineno})"


def _is_library(file: str) -> bool:
    return file.startswith(_LIBRARIES) or not {"site-packages", "dist-packages"}.isdisjoint(file.split(sep))


_LIBRARIES = ("<frozen ", get_path("stdlib") + sep, dirname(dirname(__file__)) + sep)
