"""The options and the table of `tests/conftest.py`, as a run of pytest of its own shows them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNIT = "tests/unit/websocket/test_import_chain_validation.py"
STABILITY = "tests/mission_critical/test_websocket_import_stability.py"
SERVICES = "tests/mission_critical/test_real_services.py"


def pytest(*arguments: str, path: str | None = None) -> str:
    """What a run prints; `path` is for its search for programs."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environ = None if path is None else {"PATH": path}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False).stdout


def collected(*arguments: str) -> set[str]:
    lines = pytest("--collect-only", UNIT, STABILITY, SERVICES, *arguments).splitlines()
    return {line.partition("[")[0].rpartition("::")[2] for line in lines if "::" in line}


def test_a_category_is_a_layer_and_what_always_runs() -> None:
    always = {"test_websocket_basic_connectivity", "test_docker_services_availability"}
    assert collected("--category", "e2e") == always
    unit = collected("--category", "unit")
    assert always < unit
    assert "test_dynamic_import_under_gc_pressure" in unit
    assert "test_one_fault_after_the_other" not in unit
    assert "test_one_fault_after_the_other" in collected("--category", "mission_critical")


def test_the_incident_is_tried_on_every_way_in_and_with_every_log() -> None:
    directories = (f"tests/{layer}/websocket" for layer in ("unit", "integration", "e2e"))
    printed = pytest("--collect-only", *directories, STABILITY, "-m", "not reads_source")
    served: dict[str, set[tuple[str, str]]] = {}
    ids = r"^(\S+)\[tricorn-(native|tls|hypercorn|trio-websocket)-([a-z]+)"
    for test, way, log in re.findall(ids, printed, re.MULTILINE):
        served.setdefault(test, set()).add((way, log))
    assert len(served) == 21
    for pairs in served.values():
        assert sorted(way for way, _ in pairs) == ["hypercorn", "native", "tls", "trio-websocket"]
        assert sorted(log for _, log in pairs) == ["memory", "postgresql", "redis", "sqlite"]
    assert len(set().union(*served.values())) == 16, "all tests together have every pair"


def test_a_layer_is_a_marker() -> None:
    assert collected("-m", "unit") == collected("--category", "unit") - collected("--category", "e2e")


def test_a_service_that_is_missing_skips_and_says_so() -> None:
    printed = pytest(SERVICES, "-k", "Redis", "-rs", path="/nowhere")
    assert "1 skipped" in printed
    assert "no redis-server here: apt-get install redis-server" in printed


def test_a_service_that_is_missing_fails_with_real_services() -> None:
    printed = pytest(SERVICES, "-k", "Redis", "--real-services", path="/nowhere")
    assert "1 failed" in printed
    assert "no redis-server here: apt-get install redis-server" in printed


def test_the_table_has_a_row_for_a_test_and_both_verdicts() -> None:
    printed = pytest(UNIT, "-k", "circular").splitlines()
    [row] = [line for line in printed if line.startswith("test_circular_import_detection_websocket_utils")]
    assert row.split("  ")[1:] == ["finds incident.state_machine ↔ incident.utils", "finds none"]
    assert any(line.split() == ["the", "replica", "Tricorn"] for line in printed)


def test_a_real_model_is_asked_only_when_told(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    asks = tmp_path / "unit" / "test_asks.py"
    asks.parent.mkdir()
    asks.write_text("import pytest\n@pytest.mark.real_llm\ndef test_asks(): pass\n")
    there = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), str(asks))
    assert "1 skipped" in pytest(*there)
    assert "1 passed" in pytest(*there, "--real-llm")


def test_the_regression_test_is_a_command() -> None:
    command = [sys.executable, STABILITY, "-q", "-p", "no:cacheprovider", "-k", "basic_connectivity and native"]
    environ = {name: value for name, value in os.environ.items() if name != "PORT"}
    run = partial(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=False)
    passes = run(env=environ)
    assert passes.returncode == 0, passes.stdout + passes.stderr
    assert "1 passed" in passes.stdout
    fails = run(env=environ | {"PORT": "none"})
    assert fails.returncode == 1, fails.stdout + fails.stderr
    assert "PORT=none: must be " in fails.stdout
