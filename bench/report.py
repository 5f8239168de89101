"""What was found: kept as JSON, shown as Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import machine, python_version, release
from statistics import median
from typing import Any

from .servers import CHATS, ECHO
from .suites import SUITES

OURS = dict.fromkeys(ECHO, "tricorn") | dict.fromkeys(CHATS, "tricorn-serve")  # what each is compared with
PACKAGES = ("aiohttp", "hypercorn", "picows", "trio", "trio-websocket", "uvicorn", "uvloop", "websockets", "wsproto")
DECIMALS = ((100, 0), (10, 1), (0, 2))


class Results:
    """Figures by suite, case, server and name, a list of them with one for each round; and notes where there are none.

    What was in the file of suites that do not run again stays.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.suites: dict[str, dict[str, Any]] = {}
        if file.exists():
            self.suites = json.loads(file.read_text())["suites"]

    def begin(self, suite: str) -> None:
        self.suites[suite] = {"machine": _machine(), "cases": {}, "notes": {}}

    def add(self, suite: str, case: str, server: str, figures: dict[str, float]) -> None:
        found = self.suites[suite]["cases"].setdefault(case, {}).setdefault(server, {})
        for name, value in figures.items():
            found.setdefault(name, []).append(value)

    def note(self, suite: str, case: str, server: str, sentence: str) -> None:
        """Say why there is nothing of this server; what other rounds have found does not count."""
        self.suites[suite]["cases"].get(case, {}).pop(server, None)
        self.suites[suite]["notes"].setdefault(server, {})[case] = sentence

    def save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps({"suites": self.suites}, indent=1, ensure_ascii=False) + "\n")
        self._file.with_name("results.md").write_text(self.table())

    def table(self, suites: Iterable[str] = SUITES) -> str:
        """These suites, a table for each."""
        return "\n".join(line for name in suites if name in self.suites for line in self._suite(name))

    def _suite(self, name: str) -> Iterator[str]:
        suite, found = SUITES[name], self.suites[name]
        columns = [
            (case, figure)
            for case, servers in found["cases"].items()
            for figure in next(iter(servers.values()), {})
            if figure in suite.shown
        ]
        titles = [f"{case}: {figure}" if len(suite.shown) > 1 else case for case, figure in columns]
        yield f"## {name}\n\n{suite.about}.\n"
        yield f"| | {' | '.join(titles)} |\n|---|{'---:|' * len(titles)}"
        for server in suite.servers:
            cells = [cell(found["cases"][case], server, figure) for case, figure in columns]
            if any(cells):
                yield f"| {server} | {' | '.join(cells)} |"
        yield ""
        for server, notes in found["notes"].items():
            for sentence in dict.fromkeys(notes.values()):
                where = [case for case, said in notes.items() if said == sentence]
                everywhere = len(where) == len(found["cases"])
                yield f"- {server}{'' if everywhere else ' (' + ', '.join(where) + ')'}: {sentence}"
        if found["notes"]:
            yield ""


def cell(servers: dict[str, dict[str, list[float]]], server: str, figure: str) -> str:
    """A median with its minimum and maximum, and how it compares with ours."""
    values = servers.get(server, {}).get(figure)
    if not values:
        return ""
    shown = number(median(values))
    if len(values) > 1:
        shown += f" ({number(min(values))}–{number(max(values))})"
    ours = servers.get(OURS[server], {}).get(figure)
    if server == OURS[server] or not ours or not median(ours):
        return shown
    return f"{shown} {median(values) / median(ours):.2f}×"


def number(value: float) -> str:
    decimals = next(decimals for least, decimals in DECIMALS if abs(value) >= least)
    return f"{value:,.{decimals}f}"


def _machine() -> dict[str, Any]:
    versions = {"python": python_version(), "linux": release()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"cores": os.cpu_count(), "architecture": machine(), "versions": versions}
