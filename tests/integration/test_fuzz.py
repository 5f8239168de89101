"""A short run of what `tests/fuzz/fuzz.py` does for longer, from the same seed each time."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import pytest
import trio

from fixtures.uncovered import uncovered

FUZZ = Path(__file__).parents[1] / "fuzz"


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has no wheel for this Python or machine")
@pytest.mark.parametrize(("target", "runs"), [("codec", 20_000), ("handshake", 10_000)])
async def test_nothing_is_found(target: str, runs: int, tmp_path: Path) -> None:
    corpus = copytree(FUZZ / "corpus" / target, tmp_path / "corpus")  # what is found in passing goes there, too
    command = [sys.executable, FUZZ / "fuzz.py", target, f"-runs={runs}", "-seed=1", corpus]
    # It counts branches itself, and is slow where they are counted twice.
    finished = await trio.run_process(
        command, cwd=tmp_path, env=uncovered(), capture_stderr=True, capture_stdout=True, check=False
    )
    assert finished.returncode == 0, finished.stderr.decode()[-4000:]
    assert f"Done {runs} runs".encode() in finished.stderr
