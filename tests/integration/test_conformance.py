"""RFC 6455 as judged by a suite that nobody here wrote: kosoku, which runs the cases of Autobahn's test suite."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import trio

ECHO = """
import tricorn

async def echo(ws):
    async for message in ws:
        await ws.send(message)

tricorn.run(echo, 0, settings=tricorn.Settings(max_message_bytes=2**24))  # what the largest case sends
"""
CASES = 301  # all of the pinned version but compression, which is not offered: 12.* and 13.*


async def test_every_case_is_ok(serving: Callable[..., AbstractAsyncContextManager[int]], tmp_path: Path) -> None:
    async with serving(sys.executable, "-c", ECHO) as port:
        suite = Path(sys.executable).with_name("kosoku"), "-m", "fuzzingclient", "-o", tmp_path
        await trio.run_process([*suite, "-x", "12.*", "-x", "13.*", f"127.0.0.1:{port}"], check=False)
    (cases,) = json.loads((tmp_path / "index.json").read_text()).values()
    verdicts = {case: (verdict["behavior"], verdict["behaviorClose"]) for case, verdict in cases.items()}
    assert {case: both for case, both in verdicts.items() if not {*both} <= {"OK", "INFORMATIONAL"}} == {}
    assert len(verdicts) == CASES
