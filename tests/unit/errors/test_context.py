"""Rule E10: nothing that an application supplies can break a record, a close code or an error id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import pytest
import trio

from tricorn.errors.report import CONTEXT_MAX, KEY_MAX, LINE_MAX, NOT_SHOWN, VALUE_MAX, report, report_error

Records = Callable[[], list[dict[str, Any]]]

OURS = (
    "severity",
    "message",
    "error_id",
    "stack_trace",
    "code",
    "phase",
    "error",
    "context",
    "fields",
    "trace",
    "self",
)


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    """Returns what came on stderr since the last call."""
    return lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]


class Odd:
    """Shown, it does what it was made for."""

    def __init__(self, show: Callable[[], Any]) -> None:
        self._show = show

    def __repr__(self) -> Any:
        return self._show()

    __str__ = __repr__


def raises(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: object) -> Any:
        raise error

    return raise_it


class Text(str):
    """A text that lies about its length and its parts."""

    __slots__ = ()

    def __len__(self) -> int:
        return 0

    def __getitem__(self, key: object) -> Any:
        return 5

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return self


class Supplied(Mapping[Any, Any]):
    """A mapping whose items are what it is told."""

    def __init__(self, items: Callable[[], Any]) -> None:
        self._items = items

    def items(self) -> Any:
        return self._items()

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")

    def __getitem__(self, key: object) -> object:
        raise RuntimeError("no such key")

    __len__ = __iter__ = raises(RuntimeError("no keys"))


class Dict(dict[Any, Any]):
    def items(self) -> Any:
        raise SystemExit


def told(context: Any, records: Records) -> object:
    """The context as both kinds of records have it, after what else they must hold was checked."""
    error_id = report_error(ValueError("x"), context=context, phase="open", code=1011)
    report("WARNING", "y", context=context, phase="open", code=1011)
    error, warning = records()
    assert error["stack_trace"] == "ValueError: x\n"
    assert (error["severity"], error["message"], error["error_id"]) == ("ERROR", "ValueError: x", error_id)
    assert (warning["severity"], warning["message"]) == ("WARNING", "y")
    assert (error["phase"], error["code"]) == (warning["phase"], warning["code"]) == ("open", 1011)
    assert error.get("context") == warning.get("context")
    return error.get("context")


def test_what_is_ours_stays_ours(records: Records) -> None:
    context = dict.fromkeys(OURS, "theirs")
    assert told(context, records) == context


@pytest.mark.parametrize(
    ("context", "shown"),
    [
        ({}, None),
        (None, None),
        (
            {"none": None, "yes": True, "half": 0.5, "many": 2**70},
            {"none": None, "yes": True, "half": 0.5, "many": f"{2**70}"},
        ),
        ({1: 1, None: 2, (3, "x"): 3, b"b": 4}, {"1": 1, "None": 2, "(3, 'x')": 3, "b'b'": 4}),
        ({"list": [1], "tuple": (1, 2), "dict": {"a": 1}}, {"list": "[1]", "tuple": "(1, 2)", "dict": "{'a': 1}"}),
        ({"nan": float("nan"), "inf": float("inf")}, {"nan": None, "inf": None}),
        ({"a\n\x1b[2J\ud800": "b\0\x9b\udfff"}, {"a\n\\x1b[2J\\ud800": "b\\x00\\x9b\\udfff"}),
    ],
    ids=str,
)
def test_what_there_is_is_shown(context: Any, shown: object, records: Records) -> None:
    assert told(context, records) == shown


DEEP: Any = ()
for _ in range(100_000):
    DEEP = (DEEP,)


@pytest.mark.parametrize(
    "error", [RuntimeError(), MemoryError(), RecursionError(), SystemExit(), trio.WouldBlock()], ids=repr
)
def test_what_raises_when_it_is_shown(error: BaseException, records: Records) -> None:
    odd = Odd(raises(error))
    assert told({"before": 1, "odd": odd, "after": 2}, records) == {"before": 1, "odd": NOT_SHOWN, "after": 2}
    assert told({"before": 1, odd: "odd", "after": 2}, records) == {"before": 1, NOT_SHOWN: "odd", "after": 2}


@pytest.mark.parametrize("value", [Odd(lambda: 5), Odd(lambda: b"x"), DEEP, 10**5000], ids=["5", "b", "deep", "digits"])
def test_what_cannot_be_shown(value: object, records: Records) -> None:
    assert told({"odd": value, "after": 2}, records) == {"odd": NOT_SHOWN, "after": 2}


def test_a_text_that_lies(records: Records) -> None:
    context = told({"odd": Odd(lambda: Text("x" * 1_000_000)), Text("key"): Text("value")}, records)
    assert isinstance(context, dict)
    assert context["key"] == "value"
    assert len(context["odd"]) < VALUE_MAX + 100


@pytest.mark.parametrize("text", ["x", "\0", '"', "\\", "\ud800", "\U0001f600"], ids=ascii)
@pytest.mark.parametrize(
    "huge", [lambda text: {text * 10**6: text * 10**6}, lambda text: {f"{n}": text * 1000 for n in range(1000)}]
)
def test_what_is_huge_is_cut(text: str, huge: Callable[[str], Any], capfd: pytest.CaptureFixture[str]) -> None:
    report_error(ValueError("x" * 4000), context=huge(text), phase="open")
    line = capfd.readouterr().err
    record = json.loads(line)
    assert len(line.encode()) <= LINE_MAX
    assert record["phase"] == "open"
    assert len(json.dumps(record["context"], ensure_ascii=False).encode()) < CONTEXT_MAX + 200
    assert all(len(key) < KEY_MAX * 6 + 100 for key in record["context"])


@pytest.mark.parametrize(
    ("items", "shown"),
    [
        (raises(RuntimeError()), {"...": NOT_SHOWN}),
        (raises(SystemExit()), {"...": NOT_SHOWN}),
        (lambda: 5, {"...": NOT_SHOWN}),
        (lambda: [("a", 1), ("b",)], {"a": 1, "...": NOT_SHOWN}),
        (lambda: (("same", 1) for _ in count()), {"same": 1, "...": "<left out>"}),
    ],
)
def test_a_mapping_that_misbehaves(items: Callable[[], Any], shown: object, records: Records) -> None:
    assert told(Supplied(items), records) == shown


@pytest.mark.parametrize(
    "context", [Dict(a=1), [("a", 1)], "text", 5, Odd(raises(OSError()))], ids=lambda each: type(each).__name__
)
def test_what_is_no_mapping(context: Any, records: Records) -> None:
    assert told(context, records) == {"...": NOT_SHOWN}


def test_a_mapping_that_changes_while_it_is_shown(records: Records) -> None:
    context: dict[str, object] = {}
    context["odd"] = Odd(lambda: context.setdefault(f"{len(context)}", "new") and "odd")
    report("WARNING", "y", context=context)
    [record] = records()
    assert record["context"] == {"odd": "odd", "...": NOT_SHOWN}


def test_a_keyboard_interrupt_goes_on_once_the_error_is_reported(records: Records) -> None:
    with pytest.raises(KeyboardInterrupt):
        report_error(ValueError("x"), context={"odd": Odd(raises(KeyboardInterrupt()))})
    [record] = records()
    assert record["message"] == "ValueError: x"


def test_on_a_terminal_a_context_looks_like_no_field_of_ours() -> None:
    ours, theirs = os.openpty()
    script = """
from tricorn.errors.report import report
report("WARNING", "y", context={"error_id": "forged", "a\\nERROR: b": "c\\nERROR: d"}, code=1011)
"""
    assert subprocess.run([sys.executable, "-c", script], stderr=theirs, timeout=60, check=True)
    os.close(theirs)
    text = os.read(ours, 65536).decode().replace("\r\n", "\n")
    os.close(ours)
    assert text == ("WARNING: y [code=1011 context.error_id=forged context.a\n    ERROR: b=c\n    ERROR: d]\n")
