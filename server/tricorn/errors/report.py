"""The error path: reports what went wrong as one record, on stderr unless the program chooses another sink.

On stderr, records are JSON lines that Cloud Logging understands, or text if stderr is a terminal when the process
starts.

Nothing here raises, blocks, imports or takes a lock, and an error while reporting never replaces the error reported. If
the full record fails, a short one is written, then fixed bytes; if these fail too, the loss is counted.
docs/error-path.md gives the reasons.
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING, Any

from trio.lowlevel import enable_ki_protection

from tricorn.errors.bound import binder
from tricorn.errors.chain import first_of, hides_an_error, in_order
from tricorn.errors.sinks import LEVELS, LoggerSink, fields_of
from tricorn.errors.text import NOT_SHOWN, TEXT_MAX, outline, shown, stack_trace, title

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tricorn.errors.sinks import Destination, Level, Record, Sink

STDERR = 2
LINE_MAX = 60_000  # bytes of a record; it fits into an empty pipe, and Cloud Logging takes 256 KiB
TRACE_MAX = 24_000  # characters of a stack trace; a quarter of it if they need so many bytes that a record is too long
CONTEXT_MAX = 12_000  # bytes of what an application supplies; with all of the above a record still fits
KEY_MAX = 100  # characters of each key in it
VALUE_MAX = 1_000  # characters of each value in it

UNKNOWN = "00000000"  # the error id if the system has no random bytes
UNREPORTED = b'{"severity":"ERROR","message":"an error could not be reported"}\n'
UNWRITTEN = b'{"severity":"ERROR","message":"a record could not be written"}\n'

_FIELD_NAMES = {"trace": "logging.googleapis.com/trace"}  # of stderr's lines it takes the bare id
_TRACEPARENT = pattern("[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}").match
_CLOUD_TRACE = pattern("((?!0{32})[0-9a-f]{32})(?:[/;]|$)").match

_quoted = encode_basestring  # in CPython a function in C, which needs no globals


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

_bound = binder(_names := dict(globals()))

_socket_number = _bound(_socket_number)


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
    return shown(value, str if type(value) is str else repr, limit)


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
    found: Record = {}
    room = CONTEXT_MAX
    try:
        for key, value in context.items():
            name = shown(key, str if type(key) is str else repr, KEY_MAX)
            text = shown(value, repr, VALUE_MAX) if type(value) is tuple else _plain(value, VALUE_MAX)
            room -= len(_json({name: text}).encode())
            if room < 0:
                found["..."] = "<left out>"
                break
            found[name] = text
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: ASYNC103 - as in `shown`
        found["..."] = NOT_SHOWN  # noqa: ASYNC104
    return {"context": found} if found else {}


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
    except BaseException as error:  # noqa: ASYNC103 - as in `shown`
        record["sink_error"] = title(error)
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
    error: BaseException,
    error_id: str,
    context: Mapping[Any, object] | None,
    fields: Mapping[str, object],
    room: int = TRACE_MAX,
) -> None:
    order = in_order(error)
    record = {
        "severity": "ERROR",
        "message": title(first_of(order)),
        "error_id": error_id,
        **_known(fields),
        **_supplied(context),
    }
    _deliver({**record, "stack_trace": stack_trace(order, room)})


@_bound
def _report_less(
    error: BaseException, error_id: str, context: Mapping[Any, object] | None, fields: Mapping[str, object]
) -> None:
    _report_in_full(error, error_id, context, fields, TRACE_MAX // 4)


@_bound
def _report_in_short(error: BaseException, error_id: str, *_: object) -> None:
    order = in_order(error)
    headline = title(first_of(order))
    _deliver({"severity": "ERROR", "message": headline, "error_id": error_id, "stack_trace": outline(order)})


@_bound
def _report_in_fixed_bytes(*_: object) -> None:
    _send(UNREPORTED)


@enable_ki_protection
@_bound
def report_error(error: BaseException, *, context: Mapping[Any, object] | None = None, **fields: object) -> str:
    """Report an error with what is known about where it happened, and return its id.

    The headline is the first error that was not handled, of all that led to this one. The id is all that a peer may see
    of it. An exception group is one error, without its cancellations. Never blocks on stderr; a program's own sink may
    (see `send_records`). Raises nothing but a KeyboardInterrupt, and only once the error is reported.

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
    for attempt in (_report_in_full, _report_less, _report_in_short, _report_in_fixed_bytes):
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


@_bound
def report_hidden(error: BaseException, *, context: Mapping[Any, object] | None = None, **fields: object) -> None:
    """Report the error below something that ends a task, such as a cancellation. Cheap if it hides none."""
    if hides_an_error(error):
        report_error(error, context=context, **fields)


@enable_ki_protection
@_bound
def report(severity: Level, message: str, *, context: Mapping[Any, object] | None = None, **fields: object) -> None:
    """Report something that is not an exception. Arguments as for `report_error`; raises and blocks as little."""
    global _dropped
    if LEVELS.get(severity, _least) < _least:
        return
    try:
        _deliver({"severity": severity, "message": shown(message, str), **_known(fields), **_supplied(context)})
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

    Args:
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
