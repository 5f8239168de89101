"""How many cases of `test_every_checkpoint.py` were tried, said at the end."""

from __future__ import annotations

from collections import Counter

import pytest

CASES: Counter[str] = Counter()


@pytest.fixture
def checkpoint_cases() -> Counter[str]:
    return CASES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CASES:
        terminalreporter.section("every checkpoint, every fault")
        for where, number in CASES.items():
            terminalreporter.write_line(f"{number} cases {where}")
