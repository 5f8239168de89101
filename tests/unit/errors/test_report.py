from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from fixtures.uncovered import uncovered
from tricorn.errors.report import report, report_error, trace_id

TRACE = "0af7651916cd43dd8448eb211c80319c"

Records = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    """Returns what came on file descriptor 2 since the last call, each line as JSON."""
    return lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]


class Raising(Exception):
    """Raises an error of a kind of one's choice when it is shown."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def __str__(self) -> str:
        raise self.kind

    __repr__ = __str__


class NamelessType(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in ("__name__", "__qualname__", "__module__"):
            raise RuntimeError("no name")
        return super().__getattribute__(name)


class Nameless(Exception, metaclass=NamelessType):
    pass


async def cancelled() -> BaseException:
    """A real cancellation."""
    kept: list[BaseException] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.lowlevel.checkpoint()
        except BaseException as error:
            kept.append(error)
            raise
    return kept[0]


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The error with the traceback of having been raised here."""
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def kind(value: object) -> str:
    return type(value).__name__


# What a record holds


def test_the_id_is_returned_and_in_the_line(records: Records) -> None:
    error_id = report_error(raised(ValueError("wrong")), connection="c1", peer=("::1", 5))
    [record] = records()
    assert re.fullmatch("[0-9a-f]{8}", error_id)
    assert record.pop("stack_trace").endswith("raise error from cause\nValueError: wrong\n")
    assert record == {
        "severity": "ERROR",
        "message": "ValueError: wrong",
        "error_id": error_id,
        "connection": "c1",
        "peer": ["::1", 5],
    }


def test_each_report_has_its_own_id(records: Records) -> None:
    ids = [report_error(ValueError()) for _ in range(5)]
    assert len(set(ids)) == 5
    assert [record["error_id"] for record in records()] == ids


def test_an_error_of_many_lines_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    report_error(ValueError('a\nb\r\n"c"\0\x1b[2J\x9b2J \u2028 \u00e9'))
    line = capfd.readouterr().err
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert json.loads(line)["message"] == 'ValueError: a\nb\\x0d\n"c"\\x00\\x1b[2J\\x9b2J \u2028 \u00e9'


def test_causes_and_notes_are_in_the_trace(records: Records) -> None:
    error = raised(ValueError("effect"), cause=raised(KeyError("cause")))
    error.add_note("this is a note")
    report_error(error)
    [record] = records()
    for text in ("KeyError: 'cause'", "direct cause", "ValueError: effect", "this is a note"):
        assert text in record["stack_trace"]


def test_a_record_longer_than_a_pipe_takes_at_once_is_whole(records: Records) -> None:
    report_error(ValueError("x" * 3900 + "end"))
    report_error(ValueError("next"))
    assert [record["message"][-3:] for record in records()] == ["end", "ext"]


@pytest.mark.parametrize("text", ["x", "\0", "\U0001f600", "\ud800"], ids=ascii)
def test_a_huge_text_is_cut_in_its_middle(capfd: pytest.CaptureFixture[str], text: str) -> None:
    report_error(raised(ValueError("begin" + text * 1_000_000 + "end")), connection="c" * 1_000_000)
    line = capfd.readouterr().err
    assert len(line.encode()) <= 60_000
    record = json.loads(line)
    assert record["message"].startswith("ValueError: begin")
    assert record["message"].endswith("end")
    assert "996008 characters left out" in record["message"]
    assert "Traceback (most recent call last)" in record["stack_trace"]


def test_a_traceback_as_deep_as_recursion_goes_is_bounded(capfd: pytest.CaptureFixture[str]) -> None:
    def ping(text: str) -> None:
        pong(text + "x")

    def pong(text: str) -> None:
        ping(text + "x")

    with pytest.raises(RecursionError) as caught:
        ping("")
    report_error(caught.value)
    line = capfd.readouterr().err
    assert len(line) <= 60_000
    record = json.loads(line)
    assert record["message"].startswith("RecursionError: maximum recursion depth exceeded")
    assert record["stack_trace"].startswith("Traceback (most recent call last)")
    assert "in pong" in record["stack_trace"]


def test_a_wide_group_and_a_deep_one_are_bounded(records: Records) -> None:
    report_error(ExceptionGroup("wide", [raised(ValueError(n)) for n in range(1000)]))
    deep: Exception = raised(ValueError("bottom"))
    for _ in range(5000):
        deep = ExceptionGroup("deep", [deep, KeyError()])
    report_error(deep)
    wide, deep_one = records()
    assert wide["message"] == "ValueError: 0"
    assert "ValueError: 0\n" in wide["stack_trace"]
    assert "[977 exceptions left out]" in wide["stack_trace"]
    assert wide["stack_trace"].endswith("ExceptionGroup: wide (1000 sub-exceptions)\n")
    assert deep_one["message"] == "ValueError: bottom"
    assert deep_one["stack_trace"].endswith("ExceptionGroup: deep (2 sub-exceptions)\n")


def test_what_is_not_known_is_left_out(records: Records) -> None:
    report("INFO", "x", code=None, reason="")
    assert records() == [{"severity": "INFO", "message": "x", "reason": ""}]


def test_a_trace_goes_where_cloud_logging_looks_for_it(records: Records) -> None:
    report("INFO", "x", trace="0af7651916cd43dd8448eb211c80319c")
    [record] = records()
    assert record["logging.googleapis.com/trace"] == "0af7651916cd43dd8448eb211c80319c"
    assert "trace" not in record


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"},
        {"traceparent": f"01-{TRACE}-b7ad6b7169203331-01-what-a-later-version-adds"},
        {"x-cloud-trace-context": TRACE},
        {"x-cloud-trace-context": f"{TRACE}/1;o=1"},
        {"x-cloud-trace-context": f"{TRACE};o=0"},
        {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-cloud-trace-context": "f" * 32},
        {"traceparent": "garbage", "x-cloud-trace-context": TRACE},
    ],
)
def test_the_trace_of_a_request(headers: dict[str, str]) -> None:
    assert trace_id(headers) == TRACE


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"traceparent": f"00-{'0' * 32}-b7ad6b7169203331-01"},
        {"traceparent": f"00-{TRACE}"},
        {"traceparent": f"00-{TRACE.upper()}-b7ad6b7169203331-01"},
        {"x-cloud-trace-context": f"{TRACE}0"},
        {"x-cloud-trace-context": "0" * 32},
        {"x-cloud-trace-context": '"}\n'},
    ],
)
def test_a_request_without_a_trace(headers: dict[str, str]) -> None:
    assert trace_id(headers) is None


def test_a_record_without_an_error(records: Records) -> None:
    report("INFO", "connection closed", code=1000, peer=("::1", 5), what=Ellipsis)
    assert records() == [
        {"severity": "INFO", "message": "connection closed", "code": 1000, "peer": ["::1", 5], "what": "Ellipsis"}
    ]


# Exception groups


async def test_a_group_is_whole_but_for_its_cancellations(records: Records) -> None:
    inner = BaseExceptionGroup("inner", [await cancelled(), raised(KeyError("two"), cause=raised(OSError("why")))])
    outer = raised(BaseExceptionGroup("outer", [raised(ValueError("one")), inner, await cancelled()]))
    error_id = report_error(outer)
    [record] = records()
    assert record["error_id"] == error_id
    assert record["message"] == "ValueError: one"
    for text in (
        "ValueError: one",
        "ExceptionGroup: inner",
        "KeyError: 'two'",
        "OSError: why",
        "ExceptionGroup: outer",
    ):
        assert text in record["stack_trace"]
    assert "Cancelled" not in record["stack_trace"]


async def test_what_is_only_cancellations_is_reported_as_it_is(records: Records) -> None:
    error = await cancelled()
    report_error(error)
    report_error(BaseExceptionGroup("all", [error]))
    assert [record["message"] for record in records()] == [
        f"Cancelled: {error}",
        f"Cancelled: {error}",
    ]


def test_a_group_of_one_has_the_headline_of_what_is_in_it(records: Records) -> None:
    """Trio makes a group of whatever ends a nursery."""
    report_error(ExceptionGroup("Exceptions from Trio nursery", [ExceptionGroup("inner", [raised(KeyError("x"))])]))
    [record] = records()
    assert record["message"] == "KeyError: 'x'"
    for text in ("Exceptions from Trio nursery", "inner", "KeyError: 'x'"):
        assert text in record["stack_trace"]


async def test_cancellations_are_dropped_however_deep_they_are(records: Records) -> None:
    error: BaseException = raised(KeyError("x"))
    for _ in range(5):
        error = BaseExceptionGroup("g", [error, await cancelled(), BaseExceptionGroup("h", [await cancelled()])])
    report_error(error)
    [record] = records()
    assert record["message"] == "KeyError: 'x'"
    assert "Cancelled" not in record["stack_trace"]


def test_a_group_keeps_what_is_no_exception(records: Records) -> None:
    report_error(BaseExceptionGroup("both", [KeyboardInterrupt(), ValueError("x")]))
    [record] = records()
    assert "KeyboardInterrupt" in record["stack_trace"]
    assert "ValueError: x" in record["stack_trace"]


# An error while reporting


cyclic: list[object] = []
cyclic.append(cyclic)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Ellipsis, "Ellipsis"),
        ({"deep": [Ellipsis]}, "{'deep': [Ellipsis]}"),
        (("::1", Ellipsis, ("x",)), ["::1", "Ellipsis", ["x"]]),
        ("\ud800", "\\ud800"),
        (cyclic, "[[...]]"),
        (2**63, str(2**63)),
        (-(2**63), -(2**63)),
        (10**5000, "<cannot be shown>"),
        (float("nan"), None),
        (Raising(RuntimeError), "<cannot be shown>"),
        (Raising(MemoryError), "<cannot be shown>"),
        (Raising(RecursionError), "<cannot be shown>"),
        (Raising(SystemExit), "<cannot be shown>"),
        (Raising(GeneratorExit), "<cannot be shown>"),
    ],
    ids=kind,
)
def test_context_is_shown_as_far_as_it_can_be(records: Records, value: object, shown: object) -> None:
    report_error(ValueError("x"), value=value)
    report("INFO", "y", value=value)
    full, plain = records()
    assert (full["message"], full["value"], full["stack_trace"]) == ("ValueError: x", shown, "ValueError: x\n")
    assert plain == {"severity": "INFO", "message": "y", "value": shown}


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, RecursionError, SystemExit, trio.WouldBlock])
def test_an_error_whose_text_raises_has_its_traceback(records: Records, kind: type[BaseException]) -> None:
    error_id = report_error(raised(Raising(kind)), connection="c1")
    [record] = records()
    assert (record["message"], record["error_id"]) == ("Raising: <cannot be shown>", error_id)
    assert record["connection"] == "c1"
    assert "raise error from cause" in record["stack_trace"]


def test_an_unprintable_member_leaves_its_group_whole(records: Records) -> None:
    report_error(ExceptionGroup("both", [Raising(RuntimeError), ValueError("x")]))
    [record] = records()
    assert record["message"] == "Raising: <cannot be shown>"
    assert "ValueError: x" in record["stack_trace"]
    assert "ExceptionGroup: both (2 sub-exceptions)" in record["stack_trace"]


class Splitless(ExceptionGroup[Exception]):
    def derive(self, excs: object) -> Any:
        raise RuntimeError("no such group")


@pytest.fixture
def unformatted(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no memory for a full record."""

    def fail(*_: object) -> str:
        raise MemoryError

    monkeypatch.setitem(report_error.__globals__, "stack_trace", fail)


def test_a_type_without_a_name_leaves_the_full_record(records: Records) -> None:
    error_id = report_error(raised(ValueError("x"), cause=raised(Nameless("y"))), connection="c1")
    [record] = records()
    assert (record["message"], record["error_id"], record["connection"]) == ("Nameless: y", error_id, "c1")
    assert "direct cause" in record["stack_trace"]


@pytest.mark.usefixtures("unformatted")
def test_what_cannot_be_formatted_leaves_the_short_record(records: Records) -> None:
    error = raised(ValueError("x"), cause=raised(KeyError("y")))
    error_id = report_error(error, connection="c1")
    [record] = records()
    trace = record.pop("stack_trace").splitlines()
    assert record == {"severity": "ERROR", "message": "KeyError: 'y'", "error_id": error_id}
    place = f'  File "{__file__}", line {raised.__code__.co_firstlineno + 3}, in raised'
    header = "Traceback (most recent call last):"
    assert trace == [header, place, "KeyError", "", header, place, "ValueError"]


@pytest.mark.usefixtures("unformatted")
async def test_a_short_record_knows_groups(records: Records) -> None:
    inner = ExceptionGroup("inner", [raised(ValueError("one")), Nameless(), *[KeyError() for _ in range(100)]])
    report_error(raised(BaseExceptionGroup("outer", [inner, await cancelled()])))
    [record] = records()
    trace = record["stack_trace"].splitlines()
    names = [line for line in trace if line and line[0] not in " T"]
    assert names[:3] == ["ValueError", "Nameless", "KeyError"]
    assert names[-2:] == ["ExceptionGroup", "BaseExceptionGroup"]
    assert len(names) == 24


def test_a_group_that_cannot_be_split_is_not_lost(records: Records) -> None:
    error_id = report_error(Splitless("x", [ValueError("y"), KeyError("z")]))
    [record] = records()
    assert (record["severity"], record["error_id"]) == ("ERROR", error_id)
    assert record["message"] == "ValueError: y"
    assert "Splitless: x (2 sub-exceptions)" in record["stack_trace"]


class NoTraceback(Exception):
    @property
    def __traceback__(self) -> Any:
        raise RuntimeError("no traceback")


class NoContext(Exception):
    @property
    def __context__(self) -> Any:
        raise SystemExit("no context")


@pytest.mark.parametrize("kind", [NoTraceback, NoContext])
def test_an_error_whose_attributes_raise_is_read_as_python_reads_it(records: Records, kind: type[Exception]) -> None:
    error_id = report_error(raised(kind("x"), cause=raised(KeyError("y"))))
    [record] = records()
    assert (record["message"], record["error_id"]) == ("KeyError: 'y'", error_id)
    assert record["stack_trace"].count("in raised") == 2


@pytest.mark.usefixtures("unformatted")
def test_an_error_that_cannot_be_reported_at_all_leaves_fixed_bytes(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = report_error.__globals__
    monkeypatch.setitem(reporter, "outline", reporter["stack_trace"])
    assert re.fullmatch("[0-9a-f]{8}", report_error(ValueError("x")))
    assert records() == [{"severity": "ERROR", "message": "an error could not be reported"}]


class BrokenLoader:
    def get_source(self, name: str) -> str:
        raise RuntimeError("no source")


def test_a_traceback_may_hold_broken_objects(records: Records) -> None:
    """Its frames' locals, which are not asked, and a module's loader, which is."""
    source = "def crash(local):\n    raise ValueError('x')"
    module: dict[str, Any] = {"__name__": "gone", "__loader__": BrokenLoader()}
    exec(compile(source, "gone.py", "exec"), module)
    with pytest.raises(ValueError, match="x") as caught:
        module["crash"](Raising(SystemExit))
    report_error(caught.value)
    [record] = records()
    assert record["message"] == "ValueError: x"
    assert '"gone.py", line 2, in crash' in record["stack_trace"]


@pytest.mark.parametrize("notes", ["text", 5, [Raising(SystemExit)]], ids=kind)
def test_notes_that_are_none_do_no_harm(records: Records, notes: Any) -> None:
    error = raised(ValueError("x"))
    error.__notes__ = notes
    report_error(error)
    [record] = records()
    assert record["message"] == "ValueError: x"


def test_causes_in_a_circle_come_to_an_end(records: Records) -> None:
    one, two, three = ValueError("one"), ValueError("two"), Nameless()
    one.__cause__, two.__context__, three.__cause__ = two, one, three
    report_error(one)
    report_error(three)
    first, second = records()
    assert first["stack_trace"].count("ValueError: one") == 1
    assert 0 < second["stack_trace"].count("Nameless") <= 100


def test_a_keyboard_interrupt_goes_on_once_the_error_is_reported(records: Records) -> None:
    with pytest.raises(KeyboardInterrupt):
        report_error(Raising(KeyboardInterrupt))
    assert records() == [{"severity": "ERROR", "message": "an error could not be reported"}]
    with pytest.raises(KeyboardInterrupt):
        report_error(raised(ValueError("x")), connection=Raising(KeyboardInterrupt))
    [record] = records()
    assert record["message"] == "ValueError: x"


def test_control_c_is_put_off_until_the_error_is_reported() -> None:
    """Under Trio, where it may come at any place."""
    interrupted, text = run("""
import signal, trio

class Slow(Exception):
    def __str__(self):
        signal.raise_signal(signal.SIGINT)
        return "slow"

async def main():
    report_error(Slow())
    await trio.sleep_forever()

open_stderr()
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if the tests run in the background
try:
    trio.run(main)
except KeyboardInterrupt:
    print(json.dumps(["interrupted", read_stderr()]))
""")
    [record] = parse(text)
    assert interrupted == "interrupted"
    assert (record["message"], record["stack_trace"]) == ("Slow: slow", "Slow: slow\n")


def test_at_recursion_depth_nothing_is_raised(records: Records) -> None:
    """From every depth near the limit. A call that does not get in at all raises at its caller, as every call does."""
    returned: list[object] = []
    raised_inside: list[str] = []
    report_file = report_error.__code__.co_filename

    def dive() -> None:
        try:
            dive()
        except RecursionError:
            try:
                returned.append(report_error(ValueError("deep"), connection="c1"))
                returned.append(report("INFO", "deep"))
            except RecursionError as error:
                frames = traceback.extract_tb(error.__traceback__)
                raised_inside.extend(frame.name for frame in frames if frame.filename == report_file)
            raise

    with pytest.raises(RecursionError):
        dive()
    written = records()
    errors = [record for record in written if record["severity"] == "ERROR"]
    dropped = sum(record.get("records_dropped", 0) for record in written)
    whole = [record for record in written if "could not be" not in record["message"]]
    assert raised_inside == []
    assert len(returned) <= len(written) + dropped
    assert whole[0]["records_dropped"] > 0
    assert "connection" in errors[-1]
    assert {record["error_id"] for record in errors if "error_id" in record} <= set(returned)


# A standard error that does not take it


PREFACE = """
import json, os
from tricorn.errors.report import report, report_error, send_records

send_records("stderr", "INFO")
reader, writer = os.pipe()
os.set_blocking(reader, False)

def open_stderr():
    os.dup2(writer, 2)

def read_stderr():
    data = b""
    try:
        while piece := os.read(reader, 1 << 16):
            data += piece
    except BlockingIOError:
        pass
    return data.decode()
"""


def run(script: str) -> list[str]:
    """Run a script that owns its file descriptor 2; return the texts that it prints. Fails if the script blocks."""
    result = subprocess.run(
        [sys.executable, "-c", PREFACE + script], stdout=subprocess.PIPE, timeout=60, check=True, text=True
    )
    texts: list[str] = json.loads(result.stdout)
    return texts


def parse(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_a_full_pipe_does_not_block_and_what_it_drops_is_counted() -> None:
    texts = run("""
open_stderr()
for n in range(200):
    report_error(ValueError("x" * 1000), n=n)
    report("INFO", "x" * 1000, n=n)
held = read_stderr()
report_error(ValueError("after"))
report("INFO", "later")
print(json.dumps([held, read_stderr()]))
""")
    held, (after, later) = map(parse, texts)
    assert 0 < len(held) < 400
    assert not any("records_dropped" in record for record in held)
    assert (after["message"], after["records_dropped"]) == ("ValueError: after", 400 - len(held))
    assert later == {"severity": "INFO", "message": "later"}


def test_drops_count_on_until_a_record_gets_through() -> None:
    [text] = run("""
os.close(2)
report("INFO", "1")
report_error(ValueError("2"))
report_error(ValueError("3"), n="\\ud800")
open_stderr()
report("INFO", "4")
report("INFO", "5")
print(json.dumps([read_stderr()]))
""")
    assert parse(text) == [
        {"severity": "INFO", "message": "4", "records_dropped": 3},
        {"severity": "INFO", "message": "5"},
    ]


@pytest.mark.parametrize(
    "broken",
    ["os.close(2)", "dead = os.pipe(); os.dup2(dead[1], 2); os.close(dead[0])"],
    ids=["closed", "nobody reads any more"],
)
def test_a_broken_stderr_is_no_error(broken: str) -> None:
    error_id, text = run(f"""
{broken}
error_id = report_error(ValueError("x" * 10_000))
open_stderr()
report("INFO", "after")
print(json.dumps([error_id, read_stderr()]))
""")
    assert re.fullmatch("[0-9a-f]{8}", error_id)
    assert parse(text) == [{"severity": "INFO", "message": "after", "records_dropped": 1}]


def test_a_torn_record_is_counted_and_does_not_spoil_the_next() -> None:
    torn, after = run("""
open_stderr()
os.set_blocking(2, False)
while True:
    try:
        os.write(2, b"x" * 4096)
    except BlockingIOError:
        break
os.read(reader, 3 * 4096)  # room for three pieces of a record
report_error(ValueError("y" * 20_000), text="z" * 20_000, more="a" * 20_000, end="b" * 20_000)
torn = read_stderr().lstrip("x")
report("INFO", "after")
report("INFO", "later")
print(json.dumps([torn, read_stderr()]))
""")
    assert len(torn) == 3 * 4096
    assert torn.startswith('{"severity":"ERROR","message":"ValueError: yyy')
    assert after.startswith("\n")
    assert parse(after[1:]) == [
        {"severity": "INFO", "message": "after", "records_dropped": 1},
        {"severity": "INFO", "message": "later"},
    ]


def test_the_longest_record_fits_into_an_empty_pipe() -> None:
    [text] = run("""
open_stderr()
report_error(ValueError("y" * 20_000), **{f"c{n}": "z" * 4000 for n in range(12)})
print(json.dumps([read_stderr()]))
""")
    [record] = parse(text)
    assert len(text) > 55_000
    assert record["c11"] == "z" * 4000


def test_a_full_context_is_too_long_for_a_full_record() -> None:
    [text] = run("""
open_stderr()
error_id = report_error(ValueError("y"), **{f"c{n}": "z" * 4000 for n in range(16)})
report("INFO", "y", **{f"c{n}": "z" * 4000 for n in range(16)})
print(json.dumps([read_stderr()]))
""")
    short, fixed = parse(text)
    assert (short["message"], "c1" in short) == ("ValueError: y", False)
    assert fixed == {"severity": "ERROR", "message": "a record could not be written"}


def test_a_client_that_got_the_descriptor_of_stderr_does_not_get_records() -> None:
    seen, text = run("""
import socket
os.close(2)
ours, theirs = socket.socketpair()
os.dup2(ours.fileno(), 2)
report_error(ValueError("secret"))
theirs.setblocking(False)
try:
    seen = theirs.recv(65536).decode()
except BlockingIOError:
    seen = ""
open_stderr()
report("INFO", "after")
print(json.dumps([seen, read_stderr()]))
""")
    assert seen == ""
    assert parse(text) == [{"severity": "INFO", "message": "after", "records_dropped": 1}]


def child(script: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", f"from tricorn.errors.report import *\nsend_records(level='INFO')\n{script}"], **options
    )


def test_stderr_may_be_a_socket() -> None:
    """As under journald. Full, it does not block either."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = child("for n in range(1000): report('INFO', 'x' * 1000, n=n)", stderr=theirs)
        assert process.wait(60) == 0
        theirs.shutdown(socket.SHUT_WR)
        with ours.makefile("rb") as file:
            received = file.read()
    whole = received[: received.rindex(b"\n") + 1].decode()
    assert [record["n"] for record in parse(whole)][:10] == list(range(10))
    assert len(whole) < 1_000_000


def test_stderr_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        process = child("for n in range(1000): report('INFO', 'x' * 1000, n=n)", stderr=file)
        assert process.wait(60) == 0
    assert [record["n"] for record in parse(path.read_text())] == list(range(1000))


def test_a_file_that_is_full_is_no_error() -> None:
    with open("/dev/full", "wb") as full:
        assert child("report('INFO', 'x')", stderr=full).wait(60) == 0


def read_terminal(terminal: int) -> str:
    """All that was written, once nobody has it open any more."""
    data = b""
    with suppress(OSError):
        while piece := os.read(terminal, 65536):
            data += piece
    return data.decode().replace("\r\n", "\n")


def test_on_a_terminal_records_are_text() -> None:
    ours, theirs = os.openpty()
    script = """
def crash():
    raise ValueError("a\\n\x1b[2Jb")
try:
    crash()
except ValueError as error:
    print(report_error(error, connection="c1", peer=("::1", 5)))
report("INFO", "connection closed", connection="c1", reason="")
report("INFO", "nothing more")
"""
    script = f"exec(compile({script!r}, 'gone.py', 'exec'))"
    process = child(script, stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    output, _ = process.communicate(timeout=60)
    text = read_terminal(ours)
    os.close(ours)
    error_id = output.decode().strip()
    assert (
        text
        == f"""\
ERROR: ValueError: a
    \\x1b[2Jb [error_id={error_id} connection=c1 peer=['::1', 5]]
    Traceback (most recent call last):
      File "gone.py", line 5, in <module>
      File "gone.py", line 3, in crash
    ValueError: a
    \\x1b[2Jb
INFO: connection closed [connection=c1 reason=]
INFO: nothing more
"""
    )


def test_a_terminal_that_nobody_reads_does_not_block() -> None:
    ours, theirs = os.openpty()
    process = child("for n in range(300): report('INFO', 'x' * 997, n=n)", stderr=theirs)
    os.close(theirs)
    assert process.wait(60) == 0
    os.close(ours)


# A process in need


def test_with_no_memory_left_something_is_still_reported(tmp_path: Path) -> None:
    """Under a limit on the address space, all of it in use, and none given back until the error is reported."""
    log = tmp_path / "log"
    script = """
import resource, sys
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def eat(kept):
    size = 16 << 20
    while size >= 16:
        try:
            while True:
                kept.append(bytearray(size))
        except MemoryError:
            size //= 2
    kept.append(bytearray(1 << 20))

kept = []
try:
    eat(kept)
except MemoryError as error:
    error_id = report_error(error, connection="c1")
    report("INFO", "still here")
    kept.clear()
    report("INFO", "after")
    sys.stdout.write(error_id)
"""
    with log.open("wb") as file:
        process = child(script, stderr=file, stdout=subprocess.PIPE, env=uncovered())  # coverage needs memory, too
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.fullmatch("[0-9a-f]{8}", output.decode())
    records = parse(log.read_text())
    assert records[-1]["message"] == "after"
    assert len(records) - 1 + records[-1].get("records_dropped", 0) >= 1
    assert records[0]["severity"] == "ERROR"


def test_while_the_interpreter_shuts_down(tmp_path: Path) -> None:
    """From atexit and from finalizers, when modules are being taken to pieces."""
    log = tmp_path / "log"
    script = """
import atexit, builtins, json, sys, traceback

class Last:
    def __init__(self, name):
        self.name = name
        self.report_error = report_error
    def __del__(self):
        try:
            raise ValueError(self.name)
        except ValueError as error:
            self.report_error(error, name=self.name)

atexit.register(lambda: Last("atexit"))
sys.last_of_all = Last("sys")
builtins.last_of_all = Last("builtins")
traceback.last_of_all = Last("traceback")
json.last_of_all = Last("json")
cycle = Last("cycle")
cycle.itself = cycle
del cycle
"""
    with log.open("wb") as file:
        assert child(script, stderr=file).wait(60) == 0
    records = parse(log.read_text())
    assert {record["message"] for record in records} == {
        f"ValueError: {name}" for name in ("atexit", "sys", "builtins", "traceback", "json", "cycle")
    }
    assert all("in __del__" in record["stack_trace"] for record in records)


# Rule E3


SABOTAGE = """
import builtins, sys
import tricorn.errors.report

def refuse(*args, **kwargs):
    raise ImportError("there is nothing to import")

def crash():
    raise ValueError("first") from KeyError("cause")

open_stderr()
"""


@pytest.mark.parametrize(
    "sabotage",
    [
        "vars(tricorn.errors.report).clear()",
        "sys.modules.clear()",
        "builtins.__import__ = refuse",
        "vars(tricorn.errors.report).clear(); sys.modules.clear(); builtins.__import__ = refuse",
    ],
)
def test_reporting_needs_no_globals_modules_or_imports(sabotage: str) -> None:
    error_id, text = run(f"""
{SABOTAGE}
dumps, printed = json.dumps, print
{sabotage}
try:
    crash()
except ValueError as error:
    error_id = report_error(error, connection="c1")
report("INFO", "after")
printed(dumps([error_id, read_stderr()]))
""")
    error, after = parse(text)
    assert (error["message"], error["error_id"]) == ("KeyError: 'cause'", error_id)
    for part in ("in crash", "KeyError", "ValueError: first"):
        assert part in error["stack_trace"]
    assert after == {"severity": "INFO", "message": "after"}
