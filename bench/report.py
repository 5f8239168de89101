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

from bench.servers import CHATS, ECHO, MODELS
from bench.suites import SUITES

# What each is compared with.
OURS = dict.fromkeys(ECHO, "tricorn") | dict.fromkeys(CHATS, "tricorn-serve") | dict.fromkeys(MODELS, "tricorn-model")
PACKAGES = (
    "aiohttp",
    "hypercorn",
    "openai",
    "picows",
    "trio",
    "trio-websocket",
    "uvicorn",
    "uvloop",
    "websockets",
    "wsproto",
)
FLOOR = "c-epoll"  # no rival: it has no handlers
LEVEL = 0.05  # of a ratio: a smaller difference is none, since medians differ by as much from one run to the next
BUSY = 90  # per cent, from which on the load may be what was waited for
# What README shows of each server: suite, case, figure, title.
ECHO_HEADLINES = (
    ("echo", "100 × 64 B", "µs CPU", "echo, 64 B"),
    ("pipelined", "100 × 64 B, 16 in flight", "µs CPU", "16 in flight"),
    ("echo", "100 × 4 KiB", "µs CPU", "4 KiB"),
    ("growth", "10,000", "µs CPU", "among 10,000"),
    ("connect", "handshake", "µs CPU", "handshake"),
    ("idle", "10,000", "KiB", "idle, KiB"),
)
CHAT_HEADLINES = (
    ("chat", "100 conversations, tricorn.v1", "µs CPU", "100 conversations"),
    ("chat", "100 conversations, tricorn.v1.batch", "µs CPU", "the same, in batches"),
    ("chat", "tricorn.v1, an agent that waits", "µs CPU", "an agent that waits"),
    ("chat", "tricorn.v1, an agent that waits for a pulse", "µs CPU", "that waits for a pulse"),
    ("fanout", "1,000 readers", "µs CPU", "1,000 readers of one"),
)
BEGIN, END = "<!-- python -m bench --readme -->\n", "<!-- end -->\n"
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

    def readme(self) -> str:
        """The main figures: medians, and how they compare with ours."""
        found = self.suites["echo"]
        rounds = max(len(each) for case in found["cases"].values() for each in case["tricorn"].values())
        versions = found["machine"]["versions"]
        return (
            f"CPU of the server for an echoed message of 100 connections, in µs, where nothing else is said.\n"
            f"Medians of {rounds} rounds on {found['machine']['cores']} cores ({found['machine']['architecture']}), "
            f"Python {versions['python']}; [all of it](bench/results/results.md).\n\n"
            f"{self._headlines(ECHO_HEADLINES, ECHO)}\n"
            f"{self._verdicts('echo', 'pipelined')}"
            "![](bench/results/echo.svg)\n\n"
            "CPU of the server for an event of the chat that is delivered to a client, in µs:\n\n"
            f"{self._headlines(CHAT_HEADLINES, CHATS)}\n"
            f"{self._verdicts('chat', 'fanout')}"
        )

    def verdict(self, name: str) -> str:
        """Say in one sentence who is ahead in each case of a suite, we or the best of the others, and by how much."""
        ahead: dict[str, list[str]] = {}
        for case, servers in self.suites[name]["cases"].items():
            for ours, rival, ratio in _duels(servers, SUITES[name].shown):
                if abs(ratio - 1) <= LEVEL:
                    winner, how = "nobody", f"{rival} takes {ratio:.2f} of {ours}"
                elif ratio < 1:
                    winner, how = rival, f"{ratio:.2f} of {ours}"
                else:
                    winner, how = ours, f"{rival} takes {ratio:.2f} of it"
                ahead.setdefault(winner, []).append(f"“{case}” ({how})")
        sentence = "; ".join(f"{winner} is ahead in {', '.join(cases)}" for winner, cases in ahead.items())
        return f"{sentence}." if sentence else ""

    def _verdicts(self, *suites: str) -> str:
        return "".join(f"- {name}: {self.verdict(name)}\n" for name in suites if name in self.suites) + "\n"

    def _headlines(self, headlines: Iterable[tuple[str, str, str, str]], servers: Iterable[str]) -> str:
        columns = [
            (title, self.suites[suite]["cases"][case], figure)
            for suite, case, figure, title in headlines
            if case in self.suites.get(suite, {}).get("cases", {})
        ]
        rows = [
            (server, [cell(case, server, figure, spread=False) for _, case, figure in columns]) for server in servers
        ]
        return "".join(
            [
                f"| | {' | '.join(title for title, _, _ in columns)} |\n|---|{'---:|' * len(columns)}\n",
                *(f"| {server} | {' | '.join(cells)} |\n" for server, cells in rows if any(cells)),
            ]
        )

    def _suite(self, name: str) -> Iterator[str]:
        suite, found = SUITES[name], self.suites[name]
        columns = [
            (case, figure)
            for case, servers in found["cases"].items()
            for figure in suite.shown
            if any(figure in figures for figures in servers.values())
        ]
        titles = [f"{case}: {figure}" if len(suite.shown) > 1 else case for case, figure in columns]
        yield f"## {name}\n\n{suite.about}.\n"
        yield f"| | {' | '.join(titles)} |\n|---|{'---:|' * len(titles)}"
        for server in suite.servers:
            cells = [cell(found["cases"][case], server, figure) for case, figure in columns]
            if any(cells):
                yield f"| {server} | {' | '.join(cells)} |"
        yield f"\n{self.verdict(name)}\n"
        for server, notes in found["notes"].items():
            for sentence in dict.fromkeys(notes.values()):
                where = [case for case, said in notes.items() if said == sentence]
                everywhere = len(where) == len(found["cases"])
                yield f"- {server}{'' if everywhere else ' (' + ', '.join(where) + ')'}: {sentence}"
        if busy := list(_waited_for_load(found["cases"])):
            yield f"- The load was busy all the time, so the server may have waited for it: {'; '.join(busy)}"
        yield ""


def write_readme(section: str, readme: Path) -> None:
    """Put the section where README has it. Raises ValueError where there is no such place."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no place for it: {BEGIN}{END}")
    readme.write_text(f"{before}{BEGIN}{section}{END}{after}")


def _duels(servers: dict[str, dict[str, list[float]]], figures: Iterable[str]) -> Iterator[tuple[str, str, float]]:
    """Yield what of ours was measured, the best of its rivals, and the rival's share of our figure, the first there is.

    Less is better in each. Who has not done all that was asked is no rival.
    """
    figure = next((figure for figure in figures if any(figure in found for found in servers.values())), "")
    medians = {
        server: median(found[figure])
        for server, found in servers.items()
        if figure in found and server in OURS and server != FLOOR and min(found.get("told %", [100])) == 100
    }
    for ours in dict.fromkeys(OURS.values()):
        rivals = [server for server in medians if OURS[server] == ours and not server.startswith("tricorn")]
        if rivals and medians.get(ours):
            rival = min(rivals, key=medians.__getitem__)
            yield ours, rival, medians[rival] / medians[ours]


def _waited_for_load(cases: dict[str, dict[str, dict[str, list[float]]]]) -> Iterator[str]:
    for case, servers in cases.items():
        for server, figures in servers.items():
            if "load busy %" in figures and median(figures["load busy %"]) > BUSY:
                yield f"{server}, {case}"


def cell(servers: dict[str, dict[str, list[float]]], server: str, figure: str, *, spread: bool = True) -> str:
    """A median, with minimum and maximum if `spread`, and how it compares with ours."""
    values = servers.get(server, {}).get(figure)
    if not values:
        return ""
    shown = number(median(values))
    if spread and len(values) > 1:
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
