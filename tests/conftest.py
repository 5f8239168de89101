"""What holds for all tests: which of them run, and the table of those that answer the incident."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tricorn import send_records

# How long an example takes says only how busy the machine is.
settings.register_profile("tricorn", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tricorn")

pytest_plugins = [
    "fixtures.against",
    "fixtures.browser",
    "fixtures.model_server",
    "fixtures.real_services",
    "fixtures.proxies",
    "fixtures.service",
    "pytest_tricorn",
]

TESTS = Path(__file__).parent
LAYERS = ("unit", "integration", "e2e", "mission_critical")
ROOT = TESTS.parent
AGAINST = ("tricorn", "asyncio", "uvloop")
SERVICES = ("replica", "tricorn")
SERVED_BY = "(?:-(?:native|tls|hypercorn|trio-websocket)-[a-z]+)?"  # as `fixtures.service` names it
WIDTH = 64  # characters of a verdict
OUTCOMES = ("passed", "failed", "error", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("Tricorn")
    group.addoption("--category", choices=LAYERS, help="run the tests of one layer, and those that always run")
    group.addoption("--against", choices=AGAINST, default=AGAINST[0], help="the server of the tests of any server")
    group.addoption("--real-services", action="store_true", help="fail, not skip, where PostgreSQL or Redis is missing")
    group.addoption("--all-messages", action="store_true", help="run the conformance suite at full size, for minutes")
    group.addoption("--step", type=int, help="of every checkpoint: try this one only")
    group.addoption("--seed", type=int, default=0, help="of every checkpoint: the order in which tasks are run")
    group.addoption("--real-llm", action="store_true", help="run the tests that ask a real model, in llama.cpp")


def pytest_configure(config: pytest.Config) -> None:
    for layer in LAYERS:
        config.addinivalue_line("markers", f"{layer}: lies in tests/{layer}; set by itself")
    config.addinivalue_line("markers", "always: runs whatever --category says")
    config.addinivalue_line("markers", "any_server: talks to a process that serves the chat; --against says which")
    config.addinivalue_line("markers", "not_asyncio(reason): cannot be had of the asyncio version")
    config.addinivalue_line("markers", "not_asgi(reason): means nothing, or cannot be had, under plain Hypercorn")
    config.addinivalue_line("markers", "reads_source: starts no server, so that it needs no way in and no log")
    config.addinivalue_line("markers", "real_llm: asks a real model; skipped without --real-llm")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    category = config.getoption("--category")
    against_asyncio = config.getoption("--against") != AGAINST[0]
    selected, deselected = [], []
    for item in items:
        item.add_marker(item.path.relative_to(TESTS).parts[0])
        if item.get_closest_marker("real_llm") and not config.getoption("--real-llm"):
            item.add_marker(pytest.mark.skip(reason="asks a real model: --real-llm"))
        not_asyncio = item.get_closest_marker("not_asyncio")
        if against_asyncio and not_asyncio is not None:
            item.add_marker(pytest.mark.skip(reason=not_asyncio.args[0]))
        if "browser" in getattr(item, "fixturenames", ()):  # one at a time is enough for two processors
            item.add_marker(pytest.mark.xdist_group("browser"))
        chosen = category is None or item.get_closest_marker(category) or item.get_closest_marker("always")
        if against_asyncio and item.get_closest_marker("any_server") is None:
            chosen = False
        (selected if chosen else deselected).append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = selected


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many faults were tried, what the conformance suite found, and what each test of the incident did.

    All of it here: where tests run in other processes, this is the only conftest.py that this one reads.
    """
    cases = Counter[str]()
    for _, _, properties in noted(terminalreporter):
        cases.update({name: count for name, count in properties.items() if name.startswith("cases ")})
    if cases:
        terminalreporter.section("every checkpoint, every fault")
        for name, count in sorted(cases.items()):
            terminalreporter.write_line(f"{count} {name}")
    for _, _, properties in noted(terminalreporter):
        if "conformance" in properties:
            terminalreporter.section("RFC 6455 and RFC 7692, by kosoku")
            terminalreporter.write_line(properties["conformance"])
    told: dict[str, dict[str, list[str]]] = {}
    for name, service, verdict in verdicts(terminalreporter):
        told.setdefault(name, {}).setdefault(service, []).append(verdict)
    if not told:
        return
    rows = {name: {service: verdict_of(verdicts) for service, verdicts in row.items()} for name, row in told.items()}
    cells = [("", "the replica", "Tricorn"), *((name, *map(row.get, SERVICES)) for name, row in rows.items())]
    widths = [max(len(row[column] or "") for row in cells) for column in range(2)]
    terminalreporter.section("the incident")
    for name, replica, tricorn in cells:
        line = f"{name:{widths[0]}}  {replica or '':{widths[1]}}  {tricorn or ''}"
        terminalreporter.write_line(line.rstrip())


def verdict_of(verdicts: list[str]) -> str:
    """The verdict on all ways in and all logs: the worst, else the first, and how many there were."""
    if len(verdicts) == 1:
        return verdicts[0]
    for outcome in OUTCOMES[1:]:
        if outcome.upper() in verdicts:
            return f"{outcome.upper()}: {verdicts.count(outcome.upper())} of {len(verdicts)}"
    return f"{verdicts[0]} ({len(verdicts)} times)"


def verdicts(terminalreporter: pytest.TerminalReporter) -> Iterator[tuple[str, str, str]]:
    """The test, the service and the verdict, of every report that has one."""
    for outcome, report, properties in noted(terminalreporter):
        if "verdict" in properties or "service" in properties:
            service = properties.get("service", "tricorn")
            name = re.sub(rf"\[{service}{SERVED_BY}\]|{service}{SERVED_BY}-", "", report.nodeid.rpartition("::")[2])
            verdict = properties.get("verdict", outcome) if outcome == "passed" else outcome.upper()
            yield name, service, verdict if len(verdict) <= WIDTH else f"{verdict[:WIDTH]}…"


def noted(terminalreporter: pytest.TerminalReporter) -> Iterator[tuple[str, pytest.TestReport, dict[str, Any]]]:
    """The outcome and the report of every test that noted something, and what: in the order of the files.

    They ran in any order, and in other processes: only what `record_property` keeps gets here.
    """
    reports = [(outcome, report) for outcome in OUTCOMES for report in terminalreporter.getreports(outcome)]
    notes = [(outcome, report) for outcome, report in reports if getattr(report, "user_properties", ())]
    for outcome, report in sorted(notes, key=lambda note: note[1].location[:2]):
        yield outcome, report, dict(report.user_properties)


@pytest.fixture(autouse=True)
def every_record() -> Iterator[None]:
    """Have servers in the tests' own process write records of every level, as `tricorn serve` does from INFO on."""
    before = send_records("stderr", "DEBUG")
    yield
    send_records(*before)


@pytest.fixture(scope="session", autouse=True)
def environment_of_servers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have every `tricorn serve` that a test starts fail at what it would import late, and keep its log to itself."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRICORN_IMPORT_GUARD", "deny")
        environment.setenv("TRICORN_LOG", "memory:")  # no test leaves a file behind, or finds another's
        if request.config.getoption("--against") != AGAINST[0]:
            environment.setenv("PYTHONPATH", str(ROOT))  # where `bench` is
        yield
