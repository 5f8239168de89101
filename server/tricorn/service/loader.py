"""Loads what the command line names as module:function: an agent, a handler or an ASGI application."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from inspect import iscoroutinefunction, signature
from os.path import basename
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from tricorn.asgi_handler import AsgiHandler, asgi_handler, is_asgi_app
from tricorn.settings import SettingError

if TYPE_CHECKING:
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


def look_here_for(module: str) -> None:
    """Put the working directory first on `sys.path` if it has this module.

    Else whatever happens to lie there would be imported in place of the standard library and of installed packages.
    """
    package, here = module.partition(".")[0], os.getcwd()
    if package not in sys.modules and PathFinder.find_spec(package, [here]) is not None and sys.path[:1] != [here]:
        sys.path.insert(0, here)


def agent_name(text: str) -> Name:
    """Split the name of an agent. Raises `SettingError` if it is not module:function."""
    return _split(f"--agent {text}", text, AGENT, "tricorn.chat.agents.demo:demo")


def load_agent(text: str) -> Agent:
    """Import the agent that `text` (module:function) names. Raises `SettingError` that says what is wrong with it.

    An agent is anything async that can be called with one argument: a function, a partial one, an object.
    """
    name = agent_name(text)
    return cast("Agent", _check(name, _find(name)))


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
    found: Any = _import(name)
    for part in name.path.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise name.error(f"there is no {name.path} in {name.module}")
    return found


def _check(name: Name, found: Any) -> object:
    takes = f"must be {name.wanted.format(path=name.path)}"
    if not callable(found):
        raise name.error(f"is of type {type(found).__name__}; {takes}")
    if not iscoroutinefunction(found) and not iscoroutinefunction(type(found).__call__):
        raise name.error(f"is not async; {takes}")
    try:
        signature(found).bind(None)
    except TypeError:
        raise name.error(f"takes {signature(found)}; {takes}") from None
    return found


def _import(name: Name) -> ModuleType:
    look_here_for(name.module)
    try:
        return import_module(name.module)
    except ModuleNotFoundError as error:
        # What is missing may be the module itself, a package it should be in, or something that it imports.
        if error.name and f"{name.module}.".startswith(f"{error.name}."):
            raise name.error(f"there is no module {error.name} in this directory or installed") from None
        raise name.error(_what_it_raised(name.module, error)) from None
    except (Exception, SystemExit) as error:
        raise name.error(_what_it_raised(name.module, error)) from None


def _what_it_raised(module: str, error: BaseException) -> str:
    shown = " ".join(f"{type(error).__name__}: {error}".split())
    if not isinstance(error, SyntaxError):  # which says itself where it is
        place = extract_tb(error.__traceback__)[-1]
        shown += f" ({basename(place.filename)}, line {place.lineno})"
    return f"importing {module} raised {shown}"
