"""The import guard: once start-up is over, a module that is loaded for the first time is a fault, and is shown.

Loading a module takes a lock, reads files and can fail, and when it happens so late it is on a path that is rarely
taken: often the one of an error. The guard costs nothing while nothing is loaded, since Python asks it only about what
is not in `sys.modules`. It does not see what is executed from a file by hand (`spec.loader.exec_module`), and it sees a
look-up (`importlib.util.find_spec`) as what it mostly precedes.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from sys import _getframe, meta_path
from typing import TYPE_CHECKING, Literal

from tricorn.errors.report import counted, report

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

Mode = Literal["off", "count", "report", "deny"]

KEPT = 1000  # modules; the names may come from outside: every unknown character set is looked for as a module
FRAMES = 50  # of a stack, the innermost


@contextmanager
def guarded(mode: Mode) -> Iterator[Mapping[str, str]]:
    """Guard imports in the whole process until the end of the block, whatever thread they happen in.

    Gives a mapping that grows: each module that something tried to load, with the stack that was first to do so, as in
    a traceback. Past `KEPT` modules it grows no more.

    mode: `count` does only this; `report` writes a record for each module too; `deny` also has every such import raise
        ImportError; `off` does nothing.
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
    """A finder that finds nothing. Raises only where it denies, and then ImportError.

    All that it calls it holds itself, so that it works whatever became of this module's globals.
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
        """Python's question where a module is (`importlib.abc.MetaPathFinder`); None sends it on to the next finder."""
        if target is None:  # else it is loaded already, and to be so again
            with self._best_effort:  # without memory, or at the end of the stack: no import must fail for that
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
