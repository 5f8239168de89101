from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tricorn.errors import import_guard
from tricorn.errors.import_guard import FRAMES, KEPT, guarded

Records = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that is not loaded yet."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "latecomer.py").write_text("")
    yield "latecomer"
    sys.modules.pop("latecomer", None)


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    return lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]


def load() -> None:
    __import__("latecomer")


def load_deep(depth: int) -> None:
    if depth:
        load_deep(depth - 1)
    else:
        load()


def unloadable() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("there.is.no.such.module")


def test_what_is_imported_is_counted_with_its_stack(module: str, records: Records) -> None:
    with guarded("count") as late:
        load()
        load()
    assert list(late) == [module]
    assert late[module].splitlines()[-1] == f'  File "{__file__}", line {load.__code__.co_firstlineno + 1}, in load'
    assert "importlib" not in late[module]
    assert module in sys.modules
    assert records() == []


def test_it_is_reported(module: str, records: Records) -> None:
    with guarded("report") as late:
        load()
        load()
    assert module in sys.modules
    [record] = records()
    assert record["severity"] == "WARNING"
    assert record["message"] == "latecomer is imported after start-up"
    assert record["module"] == module
    assert record["stack_trace"].splitlines()[-1] == late[module].splitlines()[-1]


def test_it_is_denied(module: str, records: Records) -> None:
    with guarded("deny") as late:
        for _ in range(2):
            with pytest.raises(ImportError, match=r"^latecomer must not be imported after start-up: ") as raised:
                load()
            assert raised.value.name == module
    assert list(late) == [module]
    assert module not in sys.modules
    assert len(records()) == 1


def test_off_is_no_guard(module: str) -> None:
    before = list(sys.meta_path)
    with guarded("off") as late:
        assert sys.meta_path == before
        load()
    assert not late


@pytest.mark.parametrize("mode", ["count", "report", "deny"])
def test_what_is_loaded_goes_no_new_way(mode: Any, module: str, records: Records) -> None:
    load()
    with guarded(mode) as late:
        load()
        importlib.import_module(module)
        importlib.import_module("tricorn.errors.import_guard")
    assert not late
    assert records() == []


def test_to_reload_is_not_to_load(module: str) -> None:
    load()
    with guarded("deny") as late:
        importlib.reload(sys.modules[module])
    assert not late


def test_what_is_not_there_is_an_attempt_and_counts(records: Records) -> None:
    with guarded("report") as late:
        unloadable()
        unloadable()
    assert list(late) == ["there"]
    assert len(records()) == 1


def test_every_thread_is_watched(module: str) -> None:
    with guarded("count") as late:
        thread = Thread(target=load)
        thread.start()
        thread.join()
    assert list(late) == [module]


def test_the_guard_ends_with_its_block(module: str) -> None:
    before = list(sys.meta_path)
    with pytest.raises(ZeroDivisionError), guarded("deny"):
        raise ZeroDivisionError
    assert sys.meta_path == before
    load()


def test_somebody_else_may_have_removed_it() -> None:
    before = list(sys.meta_path)
    with guarded("deny"):
        sys.meta_path[:] = before
    assert sys.meta_path == before


@pytest.mark.parametrize("error", [ValueError, MemoryError, RecursionError])
def test_no_import_fails_for_a_guard_that_does(
    module: str, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(import_guard, "report", fail)
    with guarded("report"):
        load()
    assert module in sys.modules


def test_a_guard_needs_none_of_its_globals(module: str, records: Records) -> None:
    kept = dict(vars(import_guard))
    with guarded("report") as late:
        vars(import_guard).clear()
        try:
            load()
        finally:
            vars(import_guard).update(kept)
    assert list(late) == [module]
    assert len(records()) == 1


def test_a_stack_is_cut_at_its_outer_end(module: str) -> None:
    with guarded("count") as late:
        load_deep(2 * FRAMES)
    frames = late[module].splitlines()
    assert len(frames) == FRAMES
    assert frames[-1].endswith("in load")


def test_names_from_outside_take_no_endless_memory() -> None:
    with guarded("count") as late:
        for number in range(KEPT + 10):
            with pytest.raises(LookupError):
                b"x".decode(f"no-such-encoding-{number}")
    assert len(late) == KEPT
