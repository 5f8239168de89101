from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import trio

from tricorn.report import report, report_error

Records = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    """Returns what came on file descriptor 2 since the last call, each line as JSON."""
    return lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class NamelessType(type):
    @property
    def __name__(cls) -> str:
        raise RuntimeError("no name")


class Nameless(Exception, metaclass=NamelessType):
    pass


class RaisingRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


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
    report_error(ValueError('a\nb\r\n"c"\0 \u2028 \u00e9'))
    line = capfd.readouterr().err
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert json.loads(line)["message"] == 'ValueError: a\nb\r\n"c"\0 \u2028 \u00e9'


def test_causes_and_notes_are_in_the_trace(records: Records) -> None:
    error = raised(ValueError("effect"), cause=raised(KeyError("cause")))
    error.add_note("this is a note")
    report_error(error)
    [record] = records()
    for text in ("KeyError: 'cause'", "direct cause", "ValueError: effect", "this is a note"):
        assert text in record["stack_trace"]


@pytest.mark.parametrize("size", [4000, 5000, 100_000])
def test_a_long_record_is_whole(records: Records, size: int) -> None:
    report_error(ValueError("x" * size + "end"))
    report_error(ValueError("next"))
    assert [record["message"][-3:] for record in records()] == ["end", "ext"]


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
    assert record["message"] == "ExceptionGroup: outer (2 sub-exceptions)"
    for text in ("ValueError: one", "inner (1 sub-exception)", "KeyError: 'two'", "OSError: why"):
        assert text in record["stack_trace"]
    assert "Cancelled" not in record["stack_trace"]


async def test_what_is_only_cancellations_is_reported_as_it_is(records: Records) -> None:
    error = await cancelled()
    report_error(error)
    report_error(BaseExceptionGroup("all", [error]))
    assert [record["message"] for record in records()] == [
        f"Cancelled: {error}",
        "BaseExceptionGroup: all (1 sub-exception)",
    ]


def test_a_group_keeps_what_is_no_exception(records: Records) -> None:
    report_error(BaseExceptionGroup("both", [KeyboardInterrupt(), ValueError("x")]))
    [record] = records()
    assert "KeyboardInterrupt" in record["stack_trace"]
    assert "ValueError: x" in record["stack_trace"]


# An error while reporting


def test_context_that_is_no_json_is_shown_by_its_repr(records: Records) -> None:
    report_error(ValueError("x"), where=Records, what={"deep": [Ellipsis]})
    [record] = records()
    assert (record["where"], record["what"]) == (repr(Records), {"deep": ["Ellipsis"]})
    assert record["message"] == "ValueError: x"


cyclic: list[object] = []
cyclic.append(cyclic)


@pytest.mark.parametrize("value", [RaisingRepr(), "\ud800", cyclic], ids=["repr raises", "a surrogate", "a cycle"])
def test_context_that_cannot_be_shown_leaves_the_short_record(records: Records, value: object) -> None:
    error_id = report_error(ValueError("x"), value=value)
    assert records() == [{"severity": "ERROR", "message": "ValueError", "error_id": error_id}]


@pytest.mark.parametrize("error", [Unprintable(), ValueError("\ud800")], ids=["str raises", "a surrogate"])
def test_an_error_that_cannot_be_shown_leaves_the_short_record(records: Records, error: Exception) -> None:
    error_id = report_error(error, connection="c1")
    assert records() == [{"severity": "ERROR", "message": type(error).__name__, "error_id": error_id}]


def test_an_unprintable_member_leaves_its_group_whole(records: Records) -> None:
    report_error(ExceptionGroup("both", [Unprintable(), ValueError("x")]))
    [record] = records()
    assert record["message"] == "ExceptionGroup: both (2 sub-exceptions)"
    assert "ValueError: x" in record["stack_trace"]


def test_an_error_without_even_a_name_leaves_fixed_bytes(records: Records) -> None:
    assert re.fullmatch("[0-9a-f]{8}", report_error(Nameless()))
    assert records() == [{"severity": "ERROR", "message": "an error could not be reported"}]


@pytest.mark.parametrize("value", [RaisingRepr(), "\ud800"], ids=["repr raises", "a surrogate"])
def test_a_record_that_cannot_be_shown_leaves_fixed_bytes(records: Records, value: object) -> None:
    report("INFO", "x", value=value)
    assert records() == [{"severity": "ERROR", "message": "a record could not be written"}]


# A standard error that does not take it


PREFACE = """
import json, os
from tricorn.report import report, report_error

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


TORN = """
open_stderr()
report_error(ValueError("x" * 200_000))
torn = read_stderr()
report("INFO", "after")
print(json.dumps([torn, read_stderr()]))
"""


def test_a_record_that_does_not_fit_does_not_block() -> None:
    torn, after = run(TORN)
    assert 0 < len(torn) < 200_000
    assert after.endswith("\n")


@pytest.mark.xfail(
    reason="the next record is written behind the torn one, on its line, and nothing counts it", strict=True
)
def test_a_torn_record_is_counted_and_does_not_spoil_the_next() -> None:
    torn, after = run(TORN)
    last_line = (torn + after).splitlines()[-1]
    assert json.loads(last_line) == {"severity": "INFO", "message": "after", "records_dropped": 1}
