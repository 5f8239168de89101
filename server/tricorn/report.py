"""The error path: what went wrong, as one JSON line on stderr that Cloud Logging understands.

Everything called here is bound at module level, so that nothing is looked up, imported or locked while an error is
being handled. An error while reporting never replaces the one reported: full record, else a short one, else fixed
bytes.
"""

from __future__ import annotations

from os import write
from secrets import token_hex
from select import POLLOUT, poll
from traceback import format_exception

from msgspec.json import Encoder
from trio import Cancelled

STDERR = 2
CHUNK = 4096  # bytes; PIPE_BUF on Linux: a pipe that polls writable takes this much without blocking

_encode = Encoder(enc_hook=repr).encode
_dropped = 0


def report_error(error: BaseException, **context: object) -> str:
    """Report an error with what is known about where it happened, and return its id. Never raises, never blocks.

    The id is all that a peer may see of it. An exception group is one error: whole, but for its cancellations.
    """
    error_id = token_hex(4)
    try:
        shown = _without_cancellations(error)
        _write(
            {
                "severity": "ERROR",
                "message": f"{type(shown).__name__}: {shown}",
                "error_id": error_id,
                **context,
                "stack_trace": "".join(format_exception(shown)),
            }
        )
    except Exception:
        try:
            _write({"severity": "ERROR", "message": type(error).__name__, "error_id": error_id})
        except Exception:
            _send(b'{"severity":"ERROR","message":"an error could not be reported"}\n')
    return error_id


def report(severity: str, message: str, **fields: object) -> None:
    """Write one record that is not about an exception. Never raises, never blocks."""
    try:
        _write({"severity": severity, "message": message, **fields})
    except Exception:
        _send(b'{"severity":"ERROR","message":"a record could not be written"}\n')


def _without_cancellations(error: BaseException) -> BaseException:
    if isinstance(error, BaseExceptionGroup):
        return error.split(Cancelled)[1] or error
    return error


def _write(record: dict[str, object]) -> None:
    global _dropped
    if _dropped:
        record["records_dropped"] = _dropped
    if _send(_encode(record) + b"\n"):
        _dropped = 0
    else:
        _dropped += 1


def _send(line: bytes) -> bool:
    """Write a line as far as stderr takes it now; False if nothing of it went out."""
    ready = poll()
    ready.register(STDERR, POLLOUT)
    for start in range(0, len(line), CHUNK):
        try:
            if not any(events & POLLOUT for _, events in ready.poll(0)):
                return start > 0
            write(STDERR, line[start : start + CHUNK])
        except OSError:
            return start > 0
    return True
