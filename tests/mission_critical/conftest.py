"""How the cases of `test_every_checkpoint.py` are tried, and at the end, how many there were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from socket import AF_UNIX
from typing import Any

import pytest

from fixtures.checkpoints import Scenario, every_step
from fixtures.faults import Fault

CASES = ("cases in memory", "cases over TCP")


@pytest.fixture
def try_steps(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`every_step`, with the step and the seed that the command line asks for, and a command to see a failure again."""
    step, seed = request.config.getoption("--step"), request.config.getoption("--seed")

    def try_steps(scenario: Scenario, fault: Fault, **options: Any) -> None:
        if step is not None:
            options["steps"] = lambda possible: [step]
        again = f".venv/bin/pytest '{request.node.nodeid}'"
        count = every_step(scenario, fault, seed=seed, again=again, **options)
        record_property(CASES[options.get("family", AF_UNIX) != AF_UNIX], count)

    return try_steps


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    cases: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        cases.update({name: value for name, value in report.user_properties if name in CASES})
    if cases:
        terminalreporter.section("every checkpoint, every fault")
        for name in CASES:
            terminalreporter.write_line(f"{cases[name]} {name}")
