"""How the cases of `test_every_checkpoint.py` are tried."""

from __future__ import annotations

from collections.abc import Callable
from socket import AF_UNIX
from typing import Any

import pytest

from fixtures.checkpoints import Scenario, every_step
from fixtures.faults import Fault


@pytest.fixture
def try_steps(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`every_step`, with the step and the seed that the command line asks for, and a command to see a failure again."""
    step, seed = request.config.getoption("--step"), request.config.getoption("--seed")

    def try_steps(scenario: Scenario, fault: Fault, **options: Any) -> None:
        if step is not None:
            options["steps"] = lambda possible: [step]
        again = f".venv/bin/pytest '{request.node.nodeid}'"
        count = every_step(scenario, fault, seed=seed, again=again, **options)
        where = "in memory" if options.get("family", AF_UNIX) == AF_UNIX else "over TCP"
        record_property(f"cases {where}", count)  # for the summary at the end

    return try_steps
