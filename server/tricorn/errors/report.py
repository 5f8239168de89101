"""The error path: what went wrong, as one record on stderr.

Records are JSON lines that Cloud Logging understands, or text where stderr is a terminal when the process starts.

Nothing here raises, blocks, imports or takes a lock, and an error while reporting never replaces the one reported: full
record, else a short one, else fixed bytes, else it is counted. docs/error-path.md says why each of these is as it is.
"""

from __future__ import annotations

from collections import deque
from functools import update_wrapper
from os import O_NOCTTY, O_NONBLOCK, O_WRONLY, fstat, isatty, ttyname, urandom, write
from os import open as open_descriptor
from re import compile as pattern
from select import PIPE_BUF, POLLOUT, poll
from stat import S_ISSOCK
from traceback import TracebackException
from types import FunctionType
from typing import TYPE_CHECKING, TypeVar, cast

from msgspec.json import Encoder
from trio import Cancelled
from trio.lowlevel import enable_ki_protection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Record = dict[str, object]

STDERR = 2
LINE_MAX = 60_000  # bytes of a record; it fits into an empty pipe, and Cloud Logging takes 256 KiB
TEXT_MAX = 4_000  # characters of a message, and of each text that comes with it
TRACE_MAX = 24_000  # characters of a stack trace
GROUP_WIDTH = 100  # exceptions of a group, and how deep groups are shown in groups
GROUP_DEPTH = 20
OUTLINE_LINES = 100  # of a short record's stack trace
OUTLINE_PLACES = 20  # of each exception in it

UNKNOWN = "00000000"  # the id where there is none to be had
UNREPORTED = b'{"severity":"ERROR","message":"an error could not be reported"}\n'
UNWRITTEN = b'{"severity":"ERROR","message":"a record could not be written"}\n'
NOT_SHOWN = "<cannot be shown>"

_FIELD_NAMES = {"trace": "logging.googleapis.com/trace"}  # of stderr's lines it takes the bare id
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_TRACEPARENT = pattern("[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}").match
_CLOUD_TRACE = pattern("((?!0{32})[0-9a-f]{32})(?:[/;]|$)").match

_encode = Encoder().encode
_name_of = cast("Callable[[type], str]", type.__dict__["__name__"].__get__)  # whatever a metaclass says


def _open_sink() -> int:
    """Stderr; or, where that is a terminal, the same anew, since others who share it do not want O_NONBLOCK.

    A terminal counts as writable when it has room for one byte, so that asking first does not help.
    """
    try:
        return open_descriptor(ttyname(STDERR), O_WRONLY | O_NOCTTY | O_NONBLOCK)
    except OSError:
        return STDERR


def _socket_number(descriptor: int) -> int:
    """What tells the socket behind a descriptor from others; 0 where there is none."""
    try:
        status = fstat(descriptor)
    except OSError:
        return 0
    return status.st_ino if S_ISSOCK(status.st_mode) else 0


_TO_TERMINAL = isatty(STDERR)
SINK = _open_sink()
_SINK_SOCKET = _socket_number(STDERR)

_dropped = 0  # records that stderr did not take, and that no record has told of
_torn = False  # the last line that stderr took has no end

counted = {"errors": 0, "records_dropped": 0, "late_imports": 0}  # since start-up, for metrics

# The functions below have a copy of this module's names for globals, so that nothing that happens to the module, to
# sys.modules or at interpreter shutdown reaches them.
_names = dict(globals())

Function = TypeVar("Function", bound="Callable[..., object]")


def _bound(function: Function) -> Function:
    """The function, bound to `_names`, for those that come after it too."""
    assert isinstance(function, FunctionType)
    bound = FunctionType(function.__code__, _names, function.__name__, function.__defaults__, function.__closure__)
    _names[function.__name__] = update_wrapper(bound, function)
    return cast("Function", bound)


_socket_number = _bound(_socket_number)


@_bound
def _without_cancellations(error: BaseException) -> BaseException:
    if isinstance(error, BaseExceptionGroup):
        return error.split(Cancelled)[1] or error
    return error


@_bound
def _clean(text: str, limit: int) -> str:
    """At most `limit` characters, none of which a terminal obeys or UTF-8 lacks."""
    if len(text) > limit:
        left_out = f"\n[{len(text) - limit} characters left out]\n"
        text = text[: limit // 2] + left_out + text[len(text) - limit // 2 :]
    return str.translate(text, _ESCAPES).encode(errors="backslashreplace").decode()


@_bound
def _shown(value: object, show: Callable[[object], str]) -> str:
    try:
        return _clean(show(value), TEXT_MAX)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: ASYNC103 - nothing here waits, so no Cancelled of Trio's passes
        return NOT_SHOWN  # noqa: ASYNC104


@_bound
def _plain(value: object) -> object:
    """The value as JSON has it: a scalar, or a list where it is a tuple."""
    if type(value) is tuple:
        return [_plain(each) for each in value]
    if type(value) is bool or type(value) is float or (type(value) is int and -(1 << 63) <= value < 1 << 63):
        return value
    return _shown(value, str if type(value) is str else repr)


@_bound
def _title(error: BaseException) -> str:
    """What the error is. A nursery makes a group of every error: where there is one, that is what people look for."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    text = _shown(error, str)
    name = _name_of(type(error))
    return f"{name}: {text}" if text else name


@_bound
def _outline(error: BaseException) -> str:
    """A stack trace of types and places only, which takes little memory and asks nothing of the exceptions."""
    lines: list[str] = []
    pending: list[BaseException] = [error]
    while pending and len(lines) < OUTLINE_LINES:
        each = pending.pop()
        places = deque((each.__traceback__,), OUTLINE_PLACES)
        while places[-1] is not None:
            places.append(places[-1].tb_next)
        lines.append("Traceback (most recent call last):")
        for place in places:
            if place is not None:
                code = place.tb_frame.f_code
                lines.append(f'  File "{code.co_filename}", line {place.tb_lineno}, in {code.co_name}')
        lines.append(_name_of(type(each)))
        if each.__cause__ is not None:
            pending.append(each.__cause__)
        elif each.__context__ is not None and not each.__suppress_context__:
            pending.append(each.__context__)
        if isinstance(each, BaseExceptionGroup):
            pending += [inner for inner in each.exceptions[::-1] if not isinstance(inner, Cancelled)]
    return _clean("\n".join(lines), TRACE_MAX)


@_bound
def _as_text(record: Record) -> bytes:
    """For people: a headline with what is known, then the stack trace. Only a record begins at the line's start."""
    rest = dict(record)
    headline = f"{rest.pop('severity')}: {rest.pop('message')}"
    trace = rest.pop("stack_trace", "")
    known = " ".join([f"{key}={value}" for key, value in rest.items()])
    text = f"{headline} [{known}]" if known else headline
    text = f"{text}\n{trace}".rstrip("\n")
    return text.replace("\n", "\n    ").encode() + b"\n"


@_bound
def _takes_more(ready: poll) -> bool:
    return any(events & POLLOUT for _, events in ready.poll(0))


@_bound
def _send(line: bytes) -> bool:
    """Write a line as far as stderr takes it now, and say whether that was all of it; else it is counted as dropped.

    A pipe or socket that polls writable takes PIPE_BUF bytes without blocking. Once stderr is closed its number may
    go to somebody's socket, which is not where records belong.
    """
    global _dropped, _torn
    sent = 0
    try:
        if _torn:
            line = b"\n" + line
        if _socket_number(SINK) in (0, _SINK_SOCKET):
            ready = poll()
            ready.register(SINK, POLLOUT)
            while sent < len(line) and _takes_more(ready):
                sent += write(SINK, line[sent : sent + PIPE_BUF])
    except Exception:
        pass
    if sent:
        _torn = line[sent - 1] != 10
    if sent < len(line):
        _dropped += 1
        counted["records_dropped"] += 1
    return sent == len(line)


@_bound
def _write(record: Record) -> None:
    """Raises ValueError where the record is too long."""
    global _dropped
    told = _dropped
    if told:
        record["records_dropped"] = told
    line = _as_text(record) if _TO_TERMINAL else _encode(record) + b"\n"
    if len(line) > LINE_MAX:
        raise ValueError("the record is too long")
    if _send(line):
        _dropped -= told


@_bound
def _known(context: Mapping[str, object]) -> Record:
    return {_FIELD_NAMES.get(key, key): _plain(value) for key, value in context.items() if value is not None}


@_bound
def _report_in_full(error: BaseException, error_id: str, context: Mapping[str, object]) -> None:
    rest = _without_cancellations(error)
    trace = TracebackException(
        type(rest),
        rest,
        rest.__traceback__,
        compact=True,
        max_group_width=GROUP_WIDTH,
        max_group_depth=GROUP_DEPTH,
    )
    head = {"severity": "ERROR", "message": _title(rest), "error_id": error_id}
    _write({**head, **_known(context), "stack_trace": _clean("".join(trace.format()), TRACE_MAX)})


@_bound
def _report_in_short(error: BaseException, error_id: str, context: Mapping[str, object]) -> None:
    _write({"severity": "ERROR", "message": _title(error), "error_id": error_id, "stack_trace": _outline(error)})


@_bound
def _report_in_fixed_bytes(error: BaseException, error_id: str, context: Mapping[str, object]) -> None:
    _send(UNREPORTED)


@enable_ki_protection
@_bound
def report_error(error: BaseException, **context: object) -> str:
    """Report an error with what is known about where it happened, and return its id. Never blocks.

    The id is all that a peer may see of it. An exception group is one error: whole, but for its cancellations. What is
    None is not known. Nothing is raised but a KeyboardInterrupt, and that after the error was reported.
    """
    global _dropped
    counted["errors"] += 1
    interrupt = None
    try:
        error_id = urandom(4).hex()
    except Exception:
        error_id = UNKNOWN
    for attempt in (_report_in_full, _report_in_short, _report_in_fixed_bytes):
        try:
            attempt(error, error_id, context)
            break
        except KeyboardInterrupt as raised:
            interrupt = raised
        except BaseException:  # noqa: ASYNC103 - whatever the error's own code raises when it is asked for its text
            pass
    else:
        _dropped += 1
        counted["records_dropped"] += 1
    if interrupt is not None:
        raise interrupt
    return error_id


@enable_ki_protection
@_bound
def report(severity: str, message: str, **fields: object) -> None:
    """Write one record that is not about an exception; what is None is left out. Never raises, never blocks."""
    global _dropped
    try:
        _write({"severity": severity, "message": _shown(message, str), **_known(fields)})
    except Exception:
        try:
            _send(UNWRITTEN)
        except Exception:
            _dropped += 1
            counted["records_dropped"] += 1


@_bound
def trace_id(headers: Mapping[str, str]) -> str | None:
    """The id of the trace that a request belongs to, by `traceparent` (W3C) or `X-Cloud-Trace-Context`."""
    found = _TRACEPARENT(headers.get("traceparent", "")) or _CLOUD_TRACE(headers.get("x-cloud-trace-context", ""))
    return None if found is None else found[1]
