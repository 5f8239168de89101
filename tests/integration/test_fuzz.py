"""A short run of what `tests/fuzz/fuzz.py` does for longer."""

from __future__ import annotations

import sys
from pathlib import Path
from shutil import copytree

import pytest
import trio

FUZZ = Path(__file__).parents[1] / "fuzz"
SECONDS = 5


@pytest.mark.parametrize("target", ["codec", "handshake"])
async def test_nothing_is_found(target: str, tmp_path: Path) -> None:
    corpus = copytree(FUZZ / "corpus" / target, tmp_path / "corpus")  # what is found in passing goes there, too
    command = [sys.executable, FUZZ / "fuzz.py", target, f"-max_total_time={SECONDS}", corpus]
    finished = await trio.run_process(command, cwd=tmp_path, capture_stderr=True, capture_stdout=True, check=False)
    assert finished.returncode == 0, finished.stderr.decode()[-4000:]
    assert b"Done " in finished.stderr
