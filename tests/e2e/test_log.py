"""`tricorn log`: what operators do with a log."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tricorn.chat.logs.base import Append
from tricorn.chat.logs.conformance import post
from tricorn.chat.logs.sqlite import connect
from tricorn.chat.settings import ChatSettings


def tricorn_log(*arguments: str, directory: Path) -> tuple[int, str, str]:
    """Return the exit status, and what is on stdout and on stderr."""
    command = [sys.executable, "-m", "tricorn", "log", *arguments]
    environ = {**os.environ, "TRICORN_LOG": "sqlite:///kept.db"}
    done = subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


async def fill(path: Path) -> str:
    """Append three entries, and return the epoch of their conversation."""
    async with connect(f"sqlite:///{path}", ChatSettings()) as log:
        epoch = (await log.open("ann/c")).epoch
        for n in range(3):
            await log.append("ann/c", epoch, Append(post(str(n)), f"post:{n}"))
    return epoch


async def test_a_log_is_checked_and_its_conversations_get_other_epochs(tmp_path: Path) -> None:
    path = tmp_path / "kept.db"
    epoch = await fill(path)
    assert tricorn_log("check", directory=tmp_path) == (0, "1 conversations, 3 entries: no problem\n", "")
    status, said, complaint = tricorn_log("epoch", f"sqlite:///{path}", directory=tmp_path)
    assert (status, complaint) == (0, "")
    assert "another epoch" in said
    assert await fill(path) != epoch
    with sqlite3.connect(path) as other:
        other.execute("DELETE FROM entry WHERE seq = 2")
    other.close()
    missing = "conversation 'ann/c' should have the entries 1 to 3, and has 2 from 1 to 3\n"
    assert tricorn_log("check", directory=tmp_path) == (1, f"{missing}1 conversations, 2 entries: 1 problems\n", "")


@pytest.mark.parametrize("action", ["check", "epoch"])
def test_what_cannot_be_done_is_told_in_one_line(tmp_path: Path, action: str) -> None:
    problem = "tricorn: SQLite file kept.db: there is no such file\n"
    assert tricorn_log(action, directory=tmp_path) == (1, "", problem)
    assert list(tmp_path.iterdir()) == []
    problem = "tricorn: log: memory: ends with its process; there is nothing to look after\n"
    assert tricorn_log(action, "memory:", directory=tmp_path) == (2, "", problem)
