"""What a program writes by itself becomes records: prints, warnings, errors that nobody could raise.

A pipe that nobody reads would block whoever writes to it, and with it every connection. Records never block.
"""

from __future__ import annotations

import sys
import threading
import warnings
from contextlib import ExitStack, contextmanager
from io import TextIOBase
from typing import TYPE_CHECKING, Any

from tricorn.errors.report import report, report_error
from tricorn.errors.sinks import Level

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE_MAX = 8192  # characters of a line without an end that are kept


class RecordStream(TextIOBase):
    """A text stream whose lines become records. Writing to it never blocks, and never raises."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, name: str, severity: Level, descriptor: int) -> None:
        self._name = name
        self._severity = severity
        self._descriptor = descriptor
        self._rest = ""
        self._report = report

    def write(self, text: str, /) -> int:
        *lines, self._rest = f"{self._rest}{text}".split("\n")
        if len(self._rest) > LINE_MAX:
            lines.append(self._rest)
            self._rest = ""
        for line in lines:
            if line.strip():
                self._report(self._severity, line, stream=self._name)
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """The descriptor behind the stream: what is written there does not go through here."""
        return self._descriptor


@contextmanager
def recorded() -> Iterator[None]:
    """Make records of what the process writes to `sys.stdout` and `sys.stderr` until the end of the block.

    The same goes for warnings, and for exceptions in finalizers and threads, which have nobody to be raised to.
    """
    theirs: list[tuple[Any, str, object]] = [
        (sys, "stdout", RecordStream("stdout", "INFO", 1)),
        (sys, "stderr", RecordStream("stderr", "WARNING", 2)),
        (sys, "unraisablehook", _unraisable),
        (threading, "excepthook", _in_a_thread),
        (warnings, "showwarning", _warning),
    ]
    with ExitStack() as stack:
        for module, name, ours in theirs:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, ours)
        yield


def _unraisable(unraisable: Any) -> None:
    error = unraisable.exc_value or unraisable.exc_type()
    report_error(error, phase=unraisable.err_msg or "ignored", object=_named(unraisable.object))


def _in_a_thread(arguments: Any) -> None:
    if arguments.exc_type is not SystemExit:
        error = arguments.exc_value or arguments.exc_type()
        report_error(error, phase="thread", thread=getattr(arguments.thread, "name", None))


def _warning(message: Any, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    report("WARNING", f"{category.__name__}: {message}", place=f"{filename}:{lineno}")


def _named(value: object) -> str:
    """The name of what failed: its `repr` is the program's own and may be what failed."""
    return getattr(value, "__qualname__", None) or type(value).__qualname__
