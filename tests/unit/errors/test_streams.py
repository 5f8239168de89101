"""Prints, warnings and errors without anybody to be raised to become records, and block nobody."""

from __future__ import annotations

import gc
import json
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from tricorn.errors.streams import LINE_MAX, recorded

Records = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    return lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]


def test_lines_become_records(records: Records) -> None:
    with recorded():
        print("one\ntwo", end="")
        print(" and a half", file=sys.stdout)
        print("oh", file=sys.stderr)
        sys.stdout.flush()
    assert [(each["severity"], each["message"], each["stream"]) for each in records()] == [
        ("INFO", "one", "stdout"),
        ("INFO", "two and a half", "stdout"),
        ("WARNING", "oh", "stderr"),
    ]


def test_a_line_without_an_end_is_not_kept_for_ever(records: Records) -> None:
    with recorded():
        for _ in range(3):
            sys.stdout.write("x" * LINE_MAX)
    assert len(records()) == 1


def test_an_error_in_a_finalizer_is_reported(records: Records) -> None:
    class Leaves:
        def __repr__(self) -> str:
            raise AssertionError("is not asked")

        def __del__(self) -> None:
            raise ValueError("in a finalizer")

    with recorded():
        Leaves()
        gc.collect()
    [record] = records()
    assert record["message"] == "ValueError: in a finalizer"
    assert "Leaves.__del__" in record["object"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_a_thread_is_reported(records: Records) -> None:
    def fail() -> None:
        raise ValueError("in a thread")

    with recorded():
        thread = threading.Thread(target=fail, name="failing")
        thread.start()
        thread.join()
    [record] = records()
    assert (record["message"], record["thread"]) == ("ValueError: in a thread", "failing")


def test_a_warning_is_a_record(records: Records) -> None:
    with recorded(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    [record] = records()
    assert (record["severity"], record["message"]) == ("WARNING", "DeprecationWarning: old")
    assert record["place"].startswith(__file__)


def test_everything_is_as_before_afterwards() -> None:
    before = sys.stdout, sys.stderr, sys.unraisablehook, threading.excepthook, warnings.showwarning
    with pytest.raises(ZeroDivisionError), recorded():
        1 / 0  # noqa: B018
    assert (sys.stdout, sys.stderr, sys.unraisablehook, threading.excepthook, warnings.showwarning) == before
