from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fixtures.uncovered import uncovered

SCRIPT = Path(__file__).with_name("mutate.py")


def test_every_fault_that_is_planted_is_caught() -> None:
    # Coverage would take most of the time, and of a copy of the package says nothing.
    done = subprocess.run([sys.executable, SCRIPT], env=uncovered(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SURVIVED" not in done.stdout
    assert " faults were caught" in done.stdout
