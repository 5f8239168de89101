"""Functions that need nothing of their module when they run: rule E3 of docs/error-path.md."""

from __future__ import annotations

from functools import update_wrapper
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

Function = TypeVar("Function", bound="Callable[..., object]")


def binder(names: dict[str, Any]) -> Callable[[Function], Function]:
    """Return a decorator for functions that use `names` as their globals.

    `names` is a copy of a module's names, so nothing that happens to the module, to `sys.modules` or at interpreter
    shutdown affects the functions. What they assign with `global` lives in the copy, and each function finds those
    that were decorated before it.
    """

    def bound(function: Function) -> Function:
        assert isinstance(function, FunctionType)  # noqa: S101
        copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
        copy.__kwdefaults__ = function.__kwdefaults__
        names[function.__name__] = update_wrapper(copy, function)
        return cast("Function", copy)

    return bound
