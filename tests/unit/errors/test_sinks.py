"""Where records go, and which: stderr, a logger, a function; and what becomes of them if that fails."""

from __future__ import annotations

import json
import logging
import os
import queue
from collections.abc import Callable, Iterator
from logging.handlers import QueueHandler
from pathlib import Path
from subprocess import run
from sys import executable
from threading import Event, Thread
from typing import Any

import pytest
import trio

import tricorn
from tricorn.errors import report as report_module
from tricorn.errors.report import counted, report, report_error, send_records
from tricorn.errors.sinks import LEVELS
from tricorn.service.chat_drill import drill_chat

Records = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    """Returns what came on stderr since the last call."""
    return lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]


class Kept(logging.Handler):
    """Keeps log records, and their texts as the plainest of formatters has them."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[logging.LogRecord] = []
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.entries.append(record)
        self.texts.append(self.format(record))


@pytest.fixture
def logger() -> Iterator[tuple[logging.Logger, Kept]]:
    logger, handler = logging.Logger("tricorn", logging.DEBUG), Kept()
    logger.addHandler(handler)
    return logger, handler


def failed(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def say_each_level() -> None:
    for level in LEVELS:
        report(level, level)


# Levels


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_the_least_severity_that_is_written(level: Any, records: Records) -> None:
    said: list[dict[str, Any]] = []
    send_records(level=level)
    say_each_level()
    send_records(said.append, level)
    say_each_level()
    expected = [each for each in LEVELS if LEVELS[each] >= LEVELS[level]]
    assert [record["severity"] for record in records()] == expected
    assert [record["severity"] for record in said] == expected


def test_an_error_that_is_not_written_has_an_id_and_counts(records: Records) -> None:
    before = counted["errors"]
    send_records(level="CRITICAL")
    assert len(report_error(ValueError("x"))) == 8
    assert counted["errors"] == before + 1
    assert records() == []


def test_by_default_it_is_warning_on_stderr() -> None:
    """In a process of its own, where nobody has chosen."""
    script = "from tricorn.errors.report import report\nreport('INFO', 'i')\nreport('WARNING', 'w')"
    done = run([executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == ["w"]


async def test_an_embedded_server_writes_nothing_below_warning(records: Records, nursery: trio.Nursery) -> None:
    send_records()  # the default

    async def handler(ws: tricorn.WebSocket) -> None:
        await ws.receive()

    server = await nursery.start(tricorn.serve, handler, 0)
    [(host, port)] = server.addresses
    with trio.fail_after(30):
        async with await trio.open_tcp_stream(host, port) as stream:
            await stream.send_all(
                b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
                b"\x81\x80\0\0\0\0"
            )
            received = b""
            while b"\x88" not in received:
                received += await stream.receive_some()
    nursery.cancel_scope.cancel()
    assert records() == []


# The choice


def test_what_was_chosen_before_is_returned(logger: tuple[logging.Logger, Kept]) -> None:
    first = send_records(logger[0], "ERROR")
    assert send_records(print) == (logger[0], "ERROR")
    assert send_records(*first) == (print, "WARNING")
    assert send_records() == first


async def coroutine_function(record: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("to", ["stdout", None, logging, coroutine_function, 2])
def test_what_is_no_sink_is_refused_and_changes_nothing(to: Any, records: Records) -> None:
    with pytest.raises(TypeError, match="records go to"):
        send_records(to)
    report("WARNING", "still here")
    assert len(records()) == 1


def test_a_level_that_there_is_none_of() -> None:
    with pytest.raises(ValueError, match="'info'"):
        send_records(level="info")  # type: ignore[arg-type]


# A function


def test_a_function_takes_records_as_dicts(records: Records) -> None:
    said: list[dict[str, Any]] = []
    send_records(said.append)
    error_id = report_error(failed(ValueError("x")), context={"tenant": "acme"}, connection="c1", code=None)
    report("WARNING", "y", peer=("::1", 5))
    error, warning = said
    assert error.pop("stack_trace").endswith("\nValueError: x\n")
    assert error == {
        "severity": "ERROR",
        "message": "ValueError: x",
        "error_id": error_id,
        "connection": "c1",
        "context": {"tenant": "acme"},
    }
    assert warning == {"severity": "WARNING", "message": "y", "peer": ["::1", 5]}
    assert records() == []


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (OSError("full"), "OSError: full"),
        (SystemExit(3), "SystemExit: 3"),
        (Unprintable(), "Unprintable: <cannot be shown>"),
        (GeneratorExit(), "GeneratorExit"),
    ],
)
def test_what_a_function_raises_is_noted_on_stderr(raised: BaseException, shown: str, records: Records) -> None:
    def broken(record: dict[str, Any]) -> None:
        record.clear()
        raise raised

    send_records(broken)
    error_id = report_error(ValueError("x"), connection="c1")
    report("WARNING", "y")
    error, warning = records()
    assert (error["message"], error["error_id"], error["connection"]) == ("ValueError: x", error_id, "c1")
    assert warning == {"severity": "WARNING", "message": "y", "sink_error": shown}
    assert error["sink_error"] == shown


def test_a_function_that_spoils_a_record_and_raises(records: Records) -> None:
    """The values are the reporter's own; what cannot be encoded then leaves the short record."""

    def broken(record: dict[str, Any]) -> None:
        record.get("context", {})["x"] = record
        raise OSError

    send_records(broken)
    error_id = report_error(ValueError("x"), context={"a": 1})
    [record] = records()
    assert (record["message"], record["error_id"], record["sink_error"]) == ("ValueError: x", error_id, "OSError")
    assert "context" not in record


def test_a_keyboard_interrupt_in_a_function_goes_on_once_the_error_is_reported(records: Records) -> None:
    said = []

    def interrupted_once(record: dict[str, Any]) -> None:
        said.append(record)
        if len(said) == 1:
            raise KeyboardInterrupt

    send_records(interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        report_error(ValueError("x"))
    assert [record["message"] for record in said] == ["ValueError: x"] * 2
    assert records() == []


def test_what_a_function_reports_itself_goes_to_stderr(records: Records) -> None:
    """Else it would go round in circles, or wait for a lock that it holds."""
    said: list[str] = []

    def talkative(record: dict[str, Any]) -> None:
        report("WARNING", f"about {record['message']}")
        said.append(record["message"])

    send_records(talkative)
    report("WARNING", "one")
    report("WARNING", "two")
    assert said == ["one", "two"]
    assert [record["message"] for record in records()] == ["about one", "about two"]


def test_a_slow_function_keeps_its_own_thread_only(records: Records) -> None:
    said: list[str] = []
    entered, go_on = Event(), Event()

    def slow(record: dict[str, Any]) -> None:
        if record["message"] == "slow":
            entered.set()
            assert go_on.wait(60)
        said.append(record["message"])

    send_records(slow)
    thread = Thread(target=report, args=("WARNING", "slow"))
    thread.start()
    assert entered.wait(60)
    report("WARNING", "not slow")
    assert said == ["not slow"]
    go_on.set()
    thread.join()
    assert said == ["not slow", "slow"]
    assert records() == []


def test_a_function_hears_what_stderr_dropped(records: Records) -> None:
    said: list[dict[str, Any]] = []
    kept = os.dup(2)
    os.close(2)
    report("WARNING", "lost")
    os.dup2(kept, 2)
    os.close(kept)
    send_records(said.append)
    report("WARNING", "x")
    report("WARNING", "y")
    assert said == [
        {"severity": "WARNING", "message": "x", "records_dropped": 1},
        {"severity": "WARNING", "message": "y"},
    ]
    assert records() == []


def test_a_choice_reaches_functions_whose_module_is_wiped(records: Records) -> None:
    said: list[dict[str, Any]] = []
    kept = dict(vars(report_module))
    vars(report_module).clear()
    try:
        send_records(said.append, "INFO")
        report("INFO", "x")
    finally:
        vars(report_module).update(kept)
    assert said == [{"severity": "INFO", "message": "x"}]


# A logger


def test_a_logger_gets_the_severity_the_fields_and_the_trace(
    logger: tuple[logging.Logger, Kept], records: Records
) -> None:
    send_records(logger[0], "DEBUG")
    error_id = report_error(failed(ValueError("100%")), context={"tenant": "acme"}, connection="c1")
    say_each_level()
    error, *others = logger[1].entries
    assert (error.name, error.levelno, error.msg) == ("tricorn", logging.ERROR, "ValueError: 100%% [%s]")
    assert error.getMessage() == f"ValueError: 100% [error_id={error_id} connection=c1 context.tenant=acme]"
    assert logger[1].texts[0].startswith(f"{error.getMessage()}\nTraceback (most recent call last):\n")
    assert logger[1].texts[0].endswith("\nValueError: 100%")
    assert error.tricorn["error_id"] == error_id  # type: ignore[attr-defined]
    assert error.tricorn["context"] == {"tenant": "acme"}  # type: ignore[attr-defined]
    assert [(entry.levelno, entry.getMessage()) for entry in others] == [(LEVELS[level], level) for level in LEVELS]
    assert records() == []


def test_a_message_is_no_format(logger: tuple[logging.Logger, Kept]) -> None:
    send_records(logger[0])
    report("WARNING", "100 %s")
    report("WARNING", "100 %s", code=1)
    assert logger[1].texts == ["100 %s", "100 %s [code=1]"]


def test_a_logger_has_a_level_and_filters_of_its_own(logger: tuple[logging.Logger, Kept]) -> None:
    logger[0].setLevel("ERROR")
    send_records(logger[0], "DEBUG")
    say_each_level()
    logger[0].addFilter(lambda entry: entry.levelno > logging.ERROR)
    say_each_level()
    assert logger[1].texts == ["ERROR", "CRITICAL", "CRITICAL"]


def test_an_entry_can_be_handed_to_another_thread(logger: tuple[logging.Logger, Kept]) -> None:
    entries: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logger[0].addHandler(QueueHandler(entries))
    send_records(logger[0])
    report_error(failed(ValueError("x")))
    assert "Traceback" in entries.get_nowait().getMessage()


def test_a_logger_that_fails_leaves_the_record_on_stderr(logger: tuple[logging.Logger, Kept], records: Records) -> None:
    def broken(entry: logging.LogRecord) -> bool:
        raise OSError("no space")

    logger[0].addFilter(broken)
    send_records(logger[0])
    report("WARNING", "x")
    assert records() == [{"severity": "WARNING", "message": "x", "sink_error": "OSError: no space"}]


async def test_the_drill_says_nothing_anywhere(logger: tuple[logging.Logger, Kept], records: Records) -> None:
    before = send_records(logger[0], "DEBUG")
    await drill_chat()
    assert logger[1].texts == []
    assert records() == []
    assert send_records(*before) == (logger[0], "DEBUG")


def test_a_program_may_choose_where_an_agent_is_imported(tmp_path: Path) -> None:
    """`tricorn serve` asks for INFO before that."""
    (tmp_path / "quiet.py").write_text(
        "import tricorn\nprint(tricorn.send_records(level='ERROR'))\nasync def agent(run): ...\nraise SystemExit\n"
    )
    command = [executable, "-m", "tricorn", "serve", "--bind", "127.0.0.1:0", "--agent", "quiet:agent"]
    done = run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "('stderr', 'INFO')\n"
