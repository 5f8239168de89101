"""RFC 6455 and RFC 7692 as judged by a suite that nobody here wrote: kosoku, with the cases of Autobahn's test suite.

Most of the 216 cases of compression send a thousand messages of 8 to 128 KiB, which takes minutes; here are those of up
to 4 KiB. This command has all of the 517:

    pytest tests/integration/test_conformance.py --all-cases
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

ECHO = """
import tricorn

async def echo(ws):
    async for message in ws:
        await ws.send(message)

# The limit is what the largest case sends.
tricorn.run(echo, 0, settings=tricorn.Settings(max_message_bytes=2**24, deflate="takeover"))
"""
ALL = 517
SECTIONS = [*(f"12.{number}" for number in range(1, 6)), *(f"13.{number}" for number in range(1, 8))]
LARGE = [f"{section}.{case}" for section in SECTIONS for case in range(6, 19)]


async def test_every_case_is_ok(
    serving: Callable[..., AbstractAsyncContextManager[int]],
    tmp_path: Path,
    pytestconfig: pytest.Config,
    conformance: list[str],
) -> None:
    left_out = [] if pytestconfig.getoption("--all-cases") else LARGE
    async with serving(sys.executable, "-c", ECHO) as port:
        suite = Path(sys.executable).with_name("kosoku"), "-m", "fuzzingclient", "-o", tmp_path
        excluded = [word for case in left_out for word in ("-x", case)]
        await trio.run_process([*suite, *excluded, f"127.0.0.1:{port}"], check=False)
    (cases,) = json.loads((tmp_path / "index.json").read_text()).values()
    verdicts = {case: (verdict["behavior"], verdict["behaviorClose"]) for case, verdict in cases.items()}
    assert {case: both for case, both in verdicts.items() if not {*both} <= {"OK", "INFORMATIONAL"}} == {}
    assert len(verdicts) == ALL - len(left_out)
    conformance.append(f"{len(verdicts)} of {ALL} cases, each OK or INFORMATIONAL")
