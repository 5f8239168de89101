"""The import guard: after start-up, loading a module for the first time is a fault, and the guard shows it.

Loading a module takes a lock, reads files and can fail. After start-up it happens on rarely taken paths, often that of
an error. The guard costs nothing while nothing is loaded, since Python asks it only about modules that are not in
`sys.modules`. It does not see files that are executed by hand (`spec.loader.exec_module`), and takes a look-up
(`importlib.util.find_spec`) for the import that mostly follows it.
"""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager, suppress
from sys import _getframe, meta_path
from typing import TYPE_CHECKING, Literal

from tricorn.errors.report import counted, report

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

Mode = Literal["off", "count", "report", "deny"]

KEPT = 1000  # modules; clients can name some, as Python looks for a module for every unknown character set
FRAMES = 50  # the innermost ones of a stack


def import_at_once() -> None:
    """Have every import happen where it stands, and those that wait happen now (PEP 810, Python 3.15).

    A lazy import happens where its name is first used, which may be the handling of an error. For start-up, before the
    agent is imported.
    """
    set_filter = getattr(sys, "set_lazy_imports_filter", None)
    if set_filter is None:
        return
    getattr(sys, "set_lazy_imports")("normal")  # noqa: B009 (this Python may not have it)
    set_filter(lambda importing, imported, names: False)
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()):
            if isinstance(value, getattr(types, "LazyImportType")):  # noqa: B009
                getattr(module, name)


@contextmanager
def guarded(mode: Mode) -> Iterator[Mapping[str, str]]:
    """Guard imports in all threads of the process until the end of the block.

    Yields a mapping that grows: each module that something tried to load, with the stack that first did, as in a
    traceback. It stops growing at `KEPT` modules.

    mode: `count` does only this; `report` also writes a record for each module; `deny` also makes every such import
        raise ImportError; `off` does nothing.
    """
    late: dict[str, str] = {}
    if mode == "off":
        yield late
        return
    guard = _Guard(mode, late)
    meta_path.insert(0, guard)
    try:
        yield late
    finally:
        if guard in meta_path:
            meta_path.remove(guard)


class _Guard:
    """A finder that finds nothing, and raises nothing but the ImportError that `deny` asks for.

    It holds everything it calls, so that it works even if this module's globals are gone.
    """

    def __init__(self, mode: Mode, late: dict[str, str]) -> None:
        self._mode = mode
        self._late = late
        self._report = report
        self._counted = counted
        self._best_effort = suppress(Exception)
        self._frame = _getframe
        self._kept = KEPT
        self._frames = FRAMES

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Answer where a module is (`importlib.abc.MetaPathFinder`): None, so that Python asks the next finder."""
        if target is None:  # else the module is being reloaded
            with self._best_effort:  # no import fails because there is too little memory or stack to note it
                self._note(name)
            if self._mode == "deny":
                raise ImportError(
                    f"{name} must not be imported after start-up: do it at the top of a module", name=name
                )

    def _note(self, name: str) -> None:
        if name in self._late or len(self._late) >= self._kept:
            return
        self._late[name] = stack = self._stack()
        self._counted["late_imports"] += 1
        if self._mode != "count":
            self._report("WARNING", f"{name} is imported after start-up", module=name, stack_trace=stack)

    def _stack(self) -> str:
        lines: list[str] = []
        frame: FrameType | None = self._frame(3)  # the caller of find_spec
        while frame is not None and len(lines) < self._frames:
            code = frame.f_code
            if not code.co_filename.startswith("<frozen importlib"):
                lines.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n')
            frame = frame.f_back
        return "".join(reversed(lines))
