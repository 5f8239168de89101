"""An agent that fails the way a message asks for: `FAULT DETAIL`. The replica and Tricorn both run it.

What it does is real: a module that is not there, a name that nobody bound, an interpreter that was tampered with.
"""

from __future__ import annotations

import builtins
import gc
import sys
from collections.abc import Callable
from importlib import import_module, invalidate_caches
from typing import Any

# It runs on the event loop of whichever service has imported it.
_on_trio = "trio" in sys.modules and "bench.asyncio_version" not in sys.modules
sleep = import_module("trio" if _on_trio else "asyncio").sleep

DAY = 86400
NESTING = 50
COLLECTIONS = 20


class UpstreamGone(Exception):
    """What really happened, in those faults that then break something which an error path may lean on."""


async def agent(run: Any) -> None:
    fault, _, detail = run.message.partition(" ")
    await run.think(f"about {fault}")
    async with run.tool(fault, detail=detail) as tool:
        if fault == "stream":
            await stream(run)
        elif fault == "wait":
            await wait(detail)
        else:
            tool.result = FAULTS[fault](detail)
    await run.say(f"{fault}: {tool.result}")


async def stream(run: Any) -> None:
    """Talk until the run is ended."""
    while True:
        await run.say(".")
        await sleep(0.002)


async def wait(module: str) -> None:
    """Wait until the run is ended, with a clean-up that imports."""
    try:
        await sleep(DAY)
    finally:
        import_module(module)


def succeed(detail: str) -> str:
    return detail


def lazy(module: str) -> object:
    """Import in the middle of things, as a module of that name may have come or gone since."""
    invalidate_caches()
    return import_module(module).ANSWER


def unbound(name: str) -> object:
    return eval(name)


def poisoned(module: str) -> object:
    sys.modules[module] = None  # type: ignore[assignment]
    return import_module(module)


def cleanup(detail: str) -> object:
    """Fail, and then fail to clean up."""
    try:
        raise UpstreamGone(detail)
    finally:
        import_module("a_cleanup_that_is_missing")


def without_time(detail: str) -> object:
    """Fail deep down, where `time` can no longer be imported."""
    sys.modules["time"] = None  # type: ignore[assignment]
    return nested(NESTING, detail)


def nested(depth: int, detail: str) -> object:
    if depth:
        return nested(depth - 1, detail)
    raise UpstreamGone(detail)


def without_modules(detail: str) -> object:
    """Fail after the modules that error paths are made of are no longer among those loaded."""
    for module in ("time", "traceback", "linecache", "json", "logging"):
        sys.modules.pop(module, None)
    raise UpstreamGone(detail)


def without_imports(detail: str) -> object:
    """Fail where no import statement works any more, for anybody."""
    builtins.__import__ = refuse
    raise UpstreamGone(detail)


def refuse(name: str, *_: object, **__: object) -> Any:
    """Refuse every import but one that no statement makes.

    From 3.12 on CPython itself imports `typing` when a class such as `class C[T]` or `class C(Generic[T])` is
    subscripted. AnyIO does that for each message, and so coredis does. No server can keep a library from doing so.
    """
    if name == "typing":
        return sys.modules[name]
    raise ImportError("imports are refused")


def collected(detail: str) -> object:
    """Fail in the midst of collections; from here on every allocation sets one off."""
    gc.set_threshold(1, 1, 1)
    for _ in range(COLLECTIONS):
        cycle: list[object] = []
        cycle.append(cycle)
        gc.collect()
    raise UpstreamGone(detail)


def modules(_: str) -> list[str]:
    return sorted(sys.modules)


FAULTS: dict[str, Callable[[str], object]] = {
    function.__name__: function
    for function in (
        succeed,
        lazy,
        unbound,
        poisoned,
        cleanup,
        without_time,
        without_modules,
        without_imports,
        collected,
        modules,
    )
}
