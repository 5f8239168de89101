"""The benchmarks.

    pip install -e '.[bench]'
    python -m bench [quick] [SUITE ...] [--servers a,b] [--rounds N] [--results DIR]
    python -m bench --readme

Each figure is the median of several rounds, in which all servers take turns. Servers have one core, the load has the
others. What is found goes into `bench/results` (of `quick`: `build/bench`) as JSON, as a table and as plots.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .load import Failed
from .process import ROOT, NotStarted, Server, serving
from .report import Results, write_readme
from .servers import SERVERS, Mode
from .suites import FULL, QUICK, SUITES, TINY, Case, Sizes

RESULTS = ROOT / "bench/results"
SIZES = {"quick": QUICK, "tiny": TINY}


class Run:
    """All suites against all servers, one run after the other: a case, then in each round one server after the other.

    A server that does not come up, or does something else than what is measured, is noted and left out of that case.
    """

    def __init__(self, sizes: Sizes, servers: list[str], results: Results, progress: Progress) -> None:
        self._sizes = sizes
        self._servers = servers
        self._results = results
        self._progress = progress
        cores = sorted(os.sched_getaffinity(0))
        self._server_cores = cores[:1]
        os.sched_setaffinity(0, cores[1:] or cores)

    def suite(self, name: str) -> None:
        suite = SUITES[name]
        cases = list(suite.cases(self._sizes))
        servers = [server for server in suite.servers if server in self._servers]
        bar = self._progress.add_task(name, total=len(cases) * len(servers) * self._sizes.rounds)
        self._results.begin(name)
        with ExitStack() as stack:
            running: dict[tuple[str, Mode], Server] = {}
            for case in cases:
                if not self._progress.console.is_terminal:
                    self._progress.console.print(f"{name}: {case.name}")
                failed = set()
                for _ in range(self._sizes.rounds):
                    for server in servers:
                        self._progress.update(bar, description=f"{name}: {case.name}: {server}", refresh=True)
                        if server not in failed:
                            try:
                                figures = self._measure(case, server, running, stack)
                                self._results.add(name, case.name, server, figures)
                            except (Failed, NotStarted, OSError) as error:
                                failed.add(server)
                                self._results.note(
                                    name, case.name, server, getattr(error, "strerror", None) or str(error)
                                )
                        self._progress.advance(bar)
        self._progress.update(bar, description=name, refresh=True)

    def _measure(
        self, case: Case, name: str, running: dict[tuple[str, Mode], Server], stack: ExitStack
    ) -> dict[str, float]:
        start = serving(name, case.mode, before=case.before, cores=self._server_cores)
        if case.fresh:
            with start as server:
                return case.measure(server)
        key = name, case.mode
        if key not in running or not running[key].is_alive():
            running[key] = stack.enter_context(start)
        return case.measure(running[key])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of WebSocket servers.")
    parser.add_argument(
        "words",
        metavar="SUITE",
        nargs="*",
        help=f"of: {', '.join(SUITES)} (all); before them `quick`, about a minute for all",
    )
    parser.add_argument("--servers", metavar="A,B", help=f"of: {', '.join(SERVERS)} (all; of `quick` some)")
    parser.add_argument("--rounds", type=int, help="how often each figure is measured")
    parser.add_argument("--results", metavar="DIR", type=Path, help="where to put what is found")
    parser.add_argument("--readme", action="store_true", help="put what is in bench/results into README.md, no more")
    arguments = parser.parse_args()
    if arguments.readme:
        write_readme(Results(RESULTS / "results.json").readme(), ROOT / "README.md")
        return 0
    size = next((word for word in arguments.words if word in SIZES), None)
    sizes = FULL if size is None else SIZES[size]
    sizes = replace(sizes, rounds=arguments.rounds or sizes.rounds)
    servers = arguments.servers.split(",") if arguments.servers else list(sizes.servers or SERVERS)
    if unknown := [server for server in servers if server not in SERVERS]:
        parser.error(f"there is no server {', '.join(unknown)}; there are {', '.join(SERVERS)}")
    if unknown := [word for word in arguments.words if word not in SIZES and word not in SUITES]:
        parser.error(f"there is no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    suites = [word for word in arguments.words if word in SUITES] or list(SUITES)
    directory = arguments.results or (RESULTS if size is None else ROOT / "build/bench")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    results = Results(directory / "results.json")
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        run = Run(sizes, servers, results, progress)
        for suite in suites:
            run.suite(suite)
            results.save()
    if find_spec("matplotlib"):
        import_module(".plots", __package__).draw(results.suites, directory)
    else:
        console.print("no plots: matplotlib is not installed")
    print(results.table(suites))
    return 0


if __name__ == "__main__":
    sys.exit(main())
