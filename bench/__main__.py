"""The benchmarks.

    pip install -e '.[bench]'
    python -m bench [quick] [SUITE ...] [--servers a,b] [--rounds N] [--results DIR]
    python -m bench --readme

Each figure is the median of several rounds, in which all servers take turns. Servers have one core, the load has the
others. What is found goes into `bench/results` as JSON, as a table and as plots, and into `build/bench` where it was
`quick` or not all servers.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from signal import SIGTERM, signal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.load import Failed
from bench.process import ROOT, NotStarted, Server, serving
from bench.report import Results, write_readme
from bench.servers import SERVERS, Mode
from bench.suites import FULL, QUICK, SUITES, TINY, Case, Figures, Sizes

RESULTS = ROOT / "bench/results"
SIZES = {"quick": QUICK, "tiny": TINY}


class Run:
    """All suites against all servers, one run after the other: a case, then in each round one server after the other.

    A server that does not come up, or does something else than what is measured, is noted and left out of that case.
    """

    def __init__(self, sizes: Sizes, servers: Collection[str], results: Results, progress: Progress) -> None:
        self._sizes = sizes
        self._servers = servers
        self._results = results
        self._progress = progress
        self._bar = TaskID(0)
        self._running: dict[tuple[str, Mode, tuple[str, ...]], Server] = {}
        self._stack = ExitStack()  # for those that are running
        cores = sorted(os.sched_getaffinity(0))
        self._server_cores = cores[:1]
        os.sched_setaffinity(0, cores[1:] or cores)

    def suite(self, name: str) -> None:
        suite = SUITES[name]
        cases = list(suite.cases(self._sizes))
        servers = [server for server in suite.servers if server in self._servers]
        self._bar = self._progress.add_task(name, total=len(cases) * len(servers) * self._sizes.rounds)
        self._results.begin(name)
        with ExitStack() as stack:
            self._stack, self._running = stack, {}
            for case in cases:
                if not self._progress.console.is_terminal:
                    self._progress.console.print(f"{name}: {case.name}")
                self._case(name, case, servers)
        self._progress.update(self._bar, description=name, refresh=True)

    def _case(self, suite: str, case: Case, servers: list[str]) -> None:
        failed = set()
        for _, server in product(range(self._sizes.rounds), servers):
            self._progress.update(self._bar, description=f"{suite}: {case.name}: {server}", refresh=True)
            if server not in failed:
                try:
                    self._results.add(suite, case.name, server, self._measure(case, server))
                except (Failed, NotStarted, OSError) as error:
                    failed.add(server)
                    self._results.note(suite, case.name, server, getattr(error, "strerror", None) or str(error))
            self._progress.advance(self._bar)

    def _measure(self, case: Case, name: str) -> Figures:
        start = serving(name, case.mode, before=case.before, cores=self._server_cores)
        if case.fresh:
            with start as server:
                return case.measure(server)
        key = name, case.mode, case.before
        if key not in self._running or not self._running[key].is_alive():
            self._running[key] = self._stack.enter_context(start)
        return case.measure(self._running[key])


def main() -> None:
    arguments = parse()
    if arguments.readme:
        write_readme(Results(RESULTS / "results.json").readme(), ROOT / "README.md")
        return
    signal(SIGTERM, lambda *_: sys.exit(128 + SIGTERM))  # or the servers would be left behind
    results = Results(arguments.results / "results.json")
    console = Console(stderr=True)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        run = Run(arguments.sizes, arguments.servers, results, progress)
        for suite in arguments.suites:
            run.suite(suite)
            results.save()
    if find_spec("matplotlib"):
        import_module("bench.plots").draw(results.suites, arguments.results)
    else:
        console.print("no plots: matplotlib is not installed")
    print(results.table(arguments.suites))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of WebSocket servers.")
    parser.add_argument(
        "suites",
        metavar="SUITE",
        nargs="*",
        help=f"of: {', '.join(SUITES)} (all); before them `quick`, three minutes for all",
    )
    parser.add_argument("--servers", metavar="A,B", help=f"of: {', '.join(SERVERS)} (all; of `quick` some)")
    parser.add_argument("--rounds", type=int, help="how often each figure is measured")
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        help="for what is found (bench/results, or build/bench)",
    )
    parser.add_argument("--readme", action="store_true", help="put what is in bench/results into README.md, no more")
    arguments = parser.parse_args()
    size = arguments.suites.pop(0) if arguments.suites and arguments.suites[0] in SIZES else None
    sizes = SIZES[size] if size else FULL
    if arguments.results is None:
        arguments.results = ROOT / "build/bench" if size or arguments.servers else RESULTS
    arguments.sizes = replace(sizes, rounds=arguments.rounds or sizes.rounds)
    arguments.servers = arguments.servers.split(",") if arguments.servers else sizes.servers or list(SERVERS)
    arguments.suites = arguments.suites or list(SUITES)
    for kind, named, known in (("suite", arguments.suites, SUITES), ("server", arguments.servers, SERVERS)):
        if unknown := [name for name in named if name not in known]:
            parser.error(f"there is no {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    return arguments


if __name__ == "__main__":
    main()
