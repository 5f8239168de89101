"""The benchmark runs and names every server. What it measures is not a test's business."""

from __future__ import annotations

import sys
from pathlib import Path

import trio

BENCH = Path(__file__).parents[2] / "bench"


async def test_echo() -> None:
    command = [sys.executable, BENCH / "echo.py", "--connections", "2", "--messages", "20", "--rounds", "1"]
    finished = await trio.run_process(command, capture_stdout=True)
    printed = finished.stdout.decode()
    for program in (BENCH / "servers").glob("*.py"):
        assert f"\n{program.stem} " in printed


async def test_log() -> None:
    command = [sys.executable, BENCH / "log.py", "--events", "20", "--rounds", "1", "--readers", "1"]
    finished = await trio.run_process(command, capture_stdout=True)
    assert finished.stdout.decode().splitlines()[2].split() == ["memory", "sqlite"]


async def test_faults() -> None:
    servers, faults = "tricorn,websockets (asyncio)", "half-close;handler crashes;SIGTERM, idle clients"
    command = [sys.executable, BENCH / "faults.py", "--quick", "--servers", servers, "--faults", faults]
    finished = await trio.run_process(command, capture_stdout=True, capture_stderr=True)
    rows = [line.split(" | ") for line in finished.stdout.decode().splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in rows[1:]] == faults.split(";")
    assert all("fails" not in cell for row in rows for cell in row)
