"""The drill itself, and `tricorn drill`."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import tricorn
from tricorn.errors.drill import EXCHANGES, Exchange, drill, fail_when_told
from tricorn.errors.report import counted
from tricorn.service.chat_drill import drill_chat

AFTER_THE_DRILL = """
import logging, socket, sys, traceback, trio
from functools import partial
from tricorn import serve
from tricorn.errors.drill import drill, fail_when_told
from tricorn.errors.import_guard import guarded

async def resolve(name):
    await trio.socket.getaddrinfo(name, 80, flags=socket.AI_NUMERICHOST)

def ignoring_errors(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        error.add_note("a note")
        traceback.print_exception(error)
        logging.exception("seen")

trio.run(drill, partial(serve, fail_when_told, 0))
known = set(sys.modules)
with guarded("count") as late:
    for host in ("localhost", "bücher.invalid"):
        ignoring_errors(socket.getaddrinfo, host, None, 0, 0, 0, socket.AI_NUMERICHOST)
        ignoring_errors(trio.run, resolve, host)
    for mistake in ("1 / 0", "nmae", "''.jion", "(", "b'\\\\xff'.decode()"):
        ignoring_errors(eval, mistake)
print(*late, *(set(sys.modules) - known))
"""


START = partial(tricorn.serve, fail_when_told, 0)


def descriptors() -> set[tuple[str, str]]:
    gc.collect()  # pipes that earlier tests left behind
    own = Path("/proc/self/fd")
    return {(name, os.readlink(own / name)) for name in os.listdir(own) if own.joinpath(name).exists()}


async def drill_server() -> None:
    await drill(START)


@pytest.mark.parametrize("drill", [drill_server, drill_chat])
async def test_it_leaves_nothing_behind(
    drill: Callable[[], Awaitable[None]], capfd: pytest.CaptureFixture[str]
) -> None:
    def all_there_is() -> tuple[object, ...]:
        root = trio.lowlevel.current_root_task()
        assert root is not None
        tasks = {task for nursery in root.child_nurseries for task in nursery.child_tasks}
        return descriptors(), tasks, list(sys.meta_path)

    before = all_there_is()
    threads = set(threading.enumerate())
    await drill()
    assert all_there_is() == before
    assert set(threading.enumerate()) <= threads  # an idle one of Trio's may have ended meanwhile
    assert capfd.readouterr() == ("", "")
    os.write(2, b"stderr is what it was")
    assert capfd.readouterr().err == "stderr is what it was"


async def test_what_it_reports_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(counted, "errors", 7)
    await drill(START)
    assert counted["errors"] == 7


async def test_it_ends_when_it_is_cancelled(capfd: pytest.CaptureFixture[str]) -> None:
    before = descriptors()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drill, START, [Exchange(b"half a request", b"no answer")])
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert descriptors() == before
    os.write(2, b"stderr is what it was")
    assert capfd.readouterr().err == "stderr is what it was"


async def test_an_answer_that_lacks_something_is_an_error() -> None:
    request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with pytest.raises(ExceptionGroup) as raised:
        await drill(START, [*EXCHANGES, Exchange(request, b"nobody says this")])
    assert raised.group_contains(RuntimeError, match="which lacks b'nobody says this'$")


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    return done.stdout


def test_what_fails_behind_it_imports_nothing() -> None:
    assert python("-c", AFTER_THE_DRILL) == "\n"


def test_the_command_says_what_is_loaded_and_how_long_it_takes() -> None:
    lines = python("-m", "tricorn", "drill").splitlines()
    steps = [re.fullmatch(r"(imports|agent  |drill  ) +\d+\.\d{3} s +(\d+) modules?", line) for line in lines]
    modules = {step[1].strip(): int(step[2]) for step in steps if step}
    assert list(modules) == ["imports", "agent", "drill"]
    assert modules["imports"] > 200
    assert len(lines) == 3 + modules["agent"] + modules["drill"]
    assert "  tricorn.chat.agents.demo" in lines[: modules["agent"] + 2]
    assert "  encodings.idna" in lines[-modules["drill"] :]


def test_the_command_checks_the_agent() -> None:
    command = [sys.executable, "-m", "tricorn", "drill", "--agent", "nothing:here"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("tricorn: --agent nothing:here: there is no module nothing")
