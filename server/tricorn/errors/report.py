"""The error path: reports what went wrong as one record, on stderr unless the program chooses another sink.

On stderr, records are JSON lines that Cloud Logging understands, or text if stderr is a terminal when the process
starts.

Nothing here raises, blocks, imports or takes a lock, and an error while reporting never replaces the error reported. If
the full record fails, a short one is written, then fixed bytes; if these fail too, the loss is counted.
docs/error-path.md gives the reasons.
"""

from __future__ import annotations

from collections import deque
from functools import update_wrapper
from inspect import iscoroutinefunction
from json.encoder import encode_basestring
from logging import Logger
from math import isfinite
from os import O_NOCTTY, O_NONBLOCK, O_WRONLY, fstat, isatty, ttyname, urandom, write
from os import open as open_descriptor
from re import compile as pattern
from select import PIPE_BUF, POLLOUT, poll
from stat import S_ISSOCK
from threading import get_ident
from traceback import TracebackException
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from trio import Cancelled
from trio.lowlevel import enable_ki_protection

from tricorn.errors.sinks import LEVELS, LoggerSink, fields_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tricorn.errors.sinks import Destination, Level, Record, Sink

STDERR = 2
LINE_MAX = 60_000  # bytes of a record; it fits into an empty pipe, and Cloud Logging takes 256 KiB
TEXT_MAX = 4_000  # characters of a message, and of each text that comes with it
TRACE_MAX = 24_000  # characters of a stack trace
CONTEXT_MAX = 12_000  # bytes of what an application supplies; with all of the above a record still fits
KEY_MAX = 100  # characters of each key in it
VALUE_MAX = 1_000  # characters of each value in it
GROUP_WIDTH = 100  # exceptions that are shown of a group
GROUP_DEPTH = 20  # levels of groups within groups that are shown
OUTLINE_LINES = 100  # lines of a short record's stack trace
OUTLINE_PLACES = 20  # lines of each exception in it

UNKNOWN = "00000000"  # the error id if the system has no random bytes
UNREPORTED = b'{"severity":"ERROR","message":"an error could not be reported"}\n'
UNWRITTEN = b'{"severity":"ERROR","message":"a record could not be written"}\n'
NOT_SHOWN = "<cannot be shown>"

_FIELD_NAMES = {"trace": "logging.googleapis.com/trace"}  # of stderr's lines it takes the bare id
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_TRACEPARENT = pattern("[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}").match
_CLOUD_TRACE = pattern("((?!0{32})[0-9a-f]{32})(?:[/;]|$)").match

_quoted = encode_basestring  # in CPython a function in C, which needs no globals
_name_of = cast("Callable[[type], str]", type.__dict__["__name__"].__get__)  # whatever a metaclass says


def _open_sink() -> int:
    """Return the descriptor to write to: stderr, or a terminal opened anew, as others share it and want it blocking.

    A terminal polls as writable when it has room for one byte, so it must not block when it is written to.
    """
    try:
        return open_descriptor(ttyname(STDERR), O_WRONLY | O_NOCTTY | O_NONBLOCK)
    except OSError:
        return STDERR


def _socket_number(descriptor: int) -> int:
    """Return a number that identifies the socket behind a descriptor, 0 if it is no socket."""
    try:
        status = fstat(descriptor)
    except OSError:
        return 0
    return status.st_ino if S_ISSOCK(status.st_mode) else 0


_TO_TERMINAL = isatty(STDERR)
SINK = _open_sink()
_SINK_SOCKET = _socket_number(STDERR)

_to: Destination = "stderr"  # as `send_records` was told
_level: Level = "WARNING"
_least = LEVELS[_level]
_sink: Sink | None = None  # the program's own, if it has one
_at_sink: set[int] = set()  # threads that are in the program's sink

_dropped = 0  # records that stderr did not take, and that no later record has mentioned
_torn = False  # the last line on stderr lacks its end

counted = {"errors": 0, "records_dropped": 0, "late_imports": 0}  # of the process since start-up, for metrics

# The functions below use a copy of this module's names as globals, so nothing that happens to the module, to
# sys.modules or at interpreter shutdown affects them. What they assign with `global` lives in that copy.
_names = dict(globals())

Function = TypeVar("Function", bound="Callable[..., object]")


def _bound(function: Function) -> Function:
    """Return the function bound to `_names`, where functions defined after it find it too."""
    assert isinstance(function, FunctionType)
    bound = FunctionType(function.__code__, _names, function.__name__, function.__defaults__, function.__closure__)
    bound.__kwdefaults__ = function.__kwdefaults__
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
    """Cut a text to `limit` characters, and escape those that a terminal obeys or UTF-8 lacks."""
    if len(text) > limit:
        left_out = f"\n[{len(text) - limit} characters left out]\n"
        text = text[: limit // 2] + left_out + text[len(text) - limit // 2 :]
    if text.isprintable():
        return text  # nothing in it to escape
    return str.translate(text, _ESCAPES).encode(errors="backslashreplace").decode()


@_bound
def _shown(value: object, show: Callable[[object], str], limit: int = TEXT_MAX) -> str:
    try:
        return _clean("".join((show(value),)), limit)  # joined, it is a str and of no subclass
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: ASYNC103 - nothing here waits, so no Cancelled of Trio's passes
        return NOT_SHOWN  # noqa: ASYNC104


@_bound
def _plain(value: object, limit: int = TEXT_MAX) -> object:
    """Return a value as JSON has it if it is a scalar or a tuple, else its repr, with at most `limit` characters."""
    if type(value) is str and len(value) <= limit and value.isprintable():
        return value  # as `_clean` would
    if type(value) is int and -(1 << 63) <= value < 1 << 63:
        return value
    if type(value) is tuple:
        return [_plain(each, limit) for each in value]
    if type(value) is float:
        return value if isfinite(value) else None
    if value is None or type(value) is bool:
        return value
    return _shown(value, str if type(value) is str else repr, limit)


@_bound
def _known(fields: Mapping[str, object]) -> Record:
    """Return our own fields. None means unknown and is left out."""
    return {_FIELD_NAMES.get(key, key): _plain(value) for key, value in fields.items() if value is not None}


@_bound
def _json(value: Any) -> str:
    """Encode what `_plain` returns, and lists and dicts of it."""
    kind = type(value)
    if kind is str:
        return _quoted(value)
    if kind is int or kind is float:
        return repr(value)
    if kind is dict:
        return "{" + ",".join([f"{_quoted(key)}:{_json(each)}" for key, each in value.items()]) + "}"
    if kind is list:
        return "[" + ",".join([_json(each) for each in value]) + "]"
    return "null" if value is None else "true" if value else "false"


@_bound
def _supplied(context: Mapping[Any, object] | None) -> Record:
    """Return what an application says as one field, as far as there is room and it can be shown."""
    if context is None:
        return {}
    shown: Record = {}
    room = CONTEXT_MAX
    try:
        for key, value in context.items():
            name = _shown(key, str if type(key) is str else repr, KEY_MAX)
            text = _shown(value, repr, VALUE_MAX) if type(value) is tuple else _plain(value, VALUE_MAX)
            room -= len(_json({name: text}).encode())
            if room < 0:
                shown["..."] = "<left out>"
                break
            shown[name] = text
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: ASYNC103 - as in `_shown`
        shown["..."] = NOT_SHOWN  # noqa: ASYNC104
    return {"context": shown} if shown else {}


@_bound
def _title(error: BaseException) -> str:
    """Return the headline of an error; of a group with a single error, as nurseries make them, that of the error."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    text = _shown(error, str)
    name = _name_of(type(error))
    return f"{name}: {text}" if text else name


@_bound
def _outline(error: BaseException) -> str:
    """Return a stack trace of types and places only, which takes little memory and does not call the exceptions."""
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
    """Format a record for people: a headline with the fields, then the stack trace, all but the headline indented."""
    fields = fields_of(record)
    headline = f"{record['severity']}: {record['message']}"
    text = f"{headline} [{fields}]" if fields else headline
    text = f"{text}\n{record.get('stack_trace', '')}".rstrip("\n")
    return text.replace("\n", "\n    ").encode() + b"\n"


@_bound
def _takes_more(ready: poll) -> bool:
    return any(events & POLLOUT for _, events in ready.poll(0))


@_bound
def _send(line: bytes) -> bool:
    """Write as much of a line as stderr takes now. Return whether that was all; if not, count it as dropped.

    A pipe or socket that polls writable takes PIPE_BUF bytes without blocking. Once stderr is closed, its number may
    belong to a client's socket, which must not get records.
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
def _taken(record: Record, sink: Sink) -> bool:
    """Give a record to the program's own sink, and return whether the sink took it.

    What a sink itself reports, and what finalizers report while it runs, is not for the sink: it may hold a lock that
    it would wait for here.
    """
    me = get_ident()
    if me in _at_sink:
        return False
    _at_sink.add(me)
    try:
        sink({**record})
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: ASYNC103 - as in `_shown`
        record["sink_error"] = _title(error)
        return False  # noqa: ASYNC104
    finally:
        _at_sink.discard(me)
    return True


@_bound
def _deliver(record: Record) -> None:
    """Give a record to the program's own sink, or else to stderr. Raises ValueError if it is too long for that."""
    global _dropped
    told = _dropped
    if told:
        record["records_dropped"] = told
    if _sink is None or not _taken(record, _sink):
        line = _as_text(record) if _TO_TERMINAL else _json(record).encode() + b"\n"
        if len(line) > LINE_MAX:
            raise ValueError("the record is too long")
        if not _send(line):
            return
    _dropped -= told


@_bound
def _report_in_full(
    error: BaseException, error_id: str, context: Mapping[Any, object] | None, fields: Mapping[str, object]
) -> None:
    rest = _without_cancellations(error)
    trace = TracebackException(
        type(rest),
        rest,
        rest.__traceback__,
        compact=True,
        max_group_width=GROUP_WIDTH,
        max_group_depth=GROUP_DEPTH,
    )
    record = {
        "severity": "ERROR",
        "message": _title(rest),
        "error_id": error_id,
        **_known(fields),
        **_supplied(context),
    }
    _deliver({**record, "stack_trace": _clean("".join(trace.format()), TRACE_MAX)})


@_bound
def _report_in_short(error: BaseException, error_id: str, *_: object) -> None:
    _deliver({"severity": "ERROR", "message": _title(error), "error_id": error_id, "stack_trace": _outline(error)})


@_bound
def _report_in_fixed_bytes(*_: object) -> None:
    _send(UNREPORTED)


@enable_ki_protection
@_bound
def report_error(error: BaseException, *, context: Mapping[Any, object] | None = None, **fields: object) -> str:
    """Report an error with what is known about where it happened, and return its id.

    The id is all that a peer may see of the error. An exception group is one error, without its cancellations. Never
    blocks on stderr; a program's own sink may (see `send_records`). Raises nothing but a KeyboardInterrupt, and only
    once the error is reported.

    context: what an application says about it: one field of the record, whatever keys and values it has.
    fields: our own, at the top level of the record. None means unknown and is left out.
    """
    global _dropped
    counted["errors"] += 1
    interrupt = None
    try:
        error_id = urandom(4).hex()
    except Exception:
        error_id = UNKNOWN
    if _least > LEVELS["ERROR"]:
        return error_id
    for attempt in (_report_in_full, _report_in_short, _report_in_fixed_bytes):
        try:
            attempt(error, error_id, context, fields)
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
def report(severity: Level, message: str, *, context: Mapping[Any, object] | None = None, **fields: object) -> None:
    """Report something that is not an exception. Arguments as for `report_error`; raises and blocks as little."""
    global _dropped
    if LEVELS.get(severity, _least) < _least:
        return
    try:
        _deliver({"severity": severity, "message": _shown(message, str), **_known(fields), **_supplied(context)})
    except Exception:
        try:
            _send(UNWRITTEN)
        except Exception:
            _dropped += 1
            counted["records_dropped"] += 1


@_bound
def send_records(to: Destination = "stderr", level: Level = "WARNING") -> tuple[Destination, Level]:
    """Choose where this process's records go, and how severe a record must be to go there.

    Returns the choice that this one replaces: `send_records(*before)` restores it.

    to: "stderr"; a `logging.Logger`; or a function that takes a record, which is a dict of what JSON can hold. The
        function or the logger's handlers run at once in the thread that reports, so while they block, so does the
        server. If they raise, the record goes to stderr, with what they raised as `sink_error`.
    level: the least severity that is written: "DEBUG", "INFO", "WARNING", "ERROR" or "CRITICAL".

    Raises:
        TypeError: `to` is nothing of the kind, for example an async function.
        ValueError: there is no such level.
    """
    global _to, _level, _least, _sink
    if level not in LEVELS:
        raise ValueError(f"level is one of {', '.join(LEVELS)}, not {level!r}")
    sink: Sink | None = None
    if isinstance(to, Logger):
        sink = LoggerSink(to)
    elif callable(to) and not iscoroutinefunction(to):
        sink = to
    elif to != "stderr":
        raise TypeError(f'records go to "stderr", a logging.Logger or a function that is not async, not to {to!r}')
    before = _to, _level
    _to, _level, _least, _sink = to, level, LEVELS[level], sink
    return before


@_bound
def trace_id(headers: Mapping[str, str]) -> str | None:
    """Return the id of the trace that a request belongs to, by `traceparent` (W3C) or `X-Cloud-Trace-Context`."""
    found = _TRACEPARENT(headers.get("traceparent", "")) or _CLOUD_TRACE(headers.get("x-cloud-trace-context", ""))
    return None if found is None else found[1]
