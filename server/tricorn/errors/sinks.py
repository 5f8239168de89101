"""Where records can go besides stderr, and how severe they can be."""

from __future__ import annotations

from collections.abc import Callable
from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING, Logger
from typing import Any, Literal

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
LEVELS: dict[Level, int] = {
    "DEBUG": DEBUG,
    "INFO": INFO,
    "WARNING": WARNING,
    "ERROR": ERROR,
    "CRITICAL": CRITICAL,
}

Record = dict[str, Any]
Sink = Callable[[Record], object]
Destination = Literal["stderr"] | Logger | Sink


class LoggerSink:
    """Hands records to a logger of Python's `logging`, whose handlers take locks and may block.

    The text of a log record is what a terminal would show: the message, then the fields as key=value; the stack trace
    follows it in every formatter that shows exceptions. The attribute `tricorn` of the log record is the whole record.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._levels = LEVELS
        self._fields_of = fields_of

    def __call__(self, record: Record) -> None:
        level = self._levels[record["severity"]]
        if not self._logger.isEnabledFor(level):
            return
        # The fields are an argument, so that tools that group records by their unformatted text group by the message.
        text, fields = record["message"], self._fields_of(record)
        template, arguments = (f"{text.replace('%', '%%')} [%s]", (fields,)) if fields else (text, ())
        entry = self._logger.makeRecord(
            self._logger.name, level, __file__, 0, template, arguments, None, extra={"tricorn": record}
        )
        if "stack_trace" in record:
            entry.exc_text = record["stack_trace"].rstrip("\n")  # formatted already, so no formatter asks the error
        self._logger.handle(entry)


def fields_of(record: Record) -> str:
    """Return what is known besides the message, as key=value; what an application supplied as context.key=value."""
    known = {
        key: value for key, value in record.items() if key not in ("severity", "message", "stack_trace", "context")
    }
    known |= {f"context.{key}": value for key, value in record.get("context", {}).items()}
    return " ".join([f"{key}={value}" for key, value in known.items()])
