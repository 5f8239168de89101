"""RFC 6455 and RFC 7692 as judged by a suite that nobody here wrote: kosoku, with the cases of Autobahn's test suite.

The 216 cases of compression send a thousand messages each, which takes minutes; here they send 20. In full:

    pytest tests/integration/test_conformance.py --all-messages
"""

from __future__ import annotations

import json
import sys
from collections import Counter
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
SUITE = """
import asyncio
import sys

from kosoku import _caseindex, _cli

build_index = _caseindex.build_index

def build_smaller_index(*arguments):
    cases, groups = build_index(*arguments)
    for name, case in cases.items():
        if name.startswith(("12.", "13.")):
            assert case.COUNT == 1000
            case.COUNT = int(messages)
    return cases, groups

messages = sys.argv.pop(1)
_caseindex.build_index = build_smaller_index
asyncio.run(_cli.amain())
"""
CASES = 517  # all of the pinned version


async def test_every_case_is_ok(
    serving: Callable[..., AbstractAsyncContextManager[int]],
    tmp_path: Path,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    messages = "1000" if pytestconfig.getoption("--all-messages") else "20"
    async with serving(sys.executable, "-c", ECHO) as port:
        suite = sys.executable, "-c", SUITE, messages, "-m", "fuzzingclient", "-o", tmp_path
        await trio.run_process([*suite, f"127.0.0.1:{port}"], check=False)
    (cases,) = json.loads((tmp_path / "index.json").read_text()).values()
    verdicts = {case: (verdict["behavior"], verdict["behaviorClose"]) for case, verdict in cases.items()}
    assert {case: both for case, both in verdicts.items() if not {*both} <= {"OK", "INFORMATIONAL"}} == {}
    assert len(verdicts) == CASES
    counts = Counter(behavior for behavior, _ in verdicts.values())
    told = ", ".join(f"{count} {behavior}" for behavior, count in counts.items())
    record_property("conformance", f"{CASES} cases: {told}")
