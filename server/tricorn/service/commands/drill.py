"""`tricorn drill`: start up as `tricorn serve` does, and serve nobody."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter, process_time

import trio

from tricorn.service.chat_drill import drill_chat
from tricorn.service.commands import serve  # noqa: F401 (what serving imports is what is measured)
from tricorn.service.settings import ServiceSettings
from tricorn.service.start_up import make_agent


def command(arguments: Namespace) -> int:
    """Print what each step loads and how long it takes. The agent is looked for in the current directory too."""
    settings = ServiceSettings.from_environ()
    if arguments.agent is not None:
        settings = replace(settings, agent=arguments.agent, model=None)
    _print_step("imports", process_time(), sys.modules)  # in CPU time: who began to import had no clock yet
    with _timed_step("agent"):
        make_agent(settings)
    with _timed_step("drill"):
        trio.run(drill_chat)
    return 0


@contextmanager
def _timed_step(name: str) -> Iterator[None]:
    began, known = perf_counter(), set(sys.modules)
    yield
    seconds, loaded = perf_counter() - began, sorted(set(sys.modules) - known)
    _print_step(name, seconds, loaded)
    for module in loaded:
        print(f"  {module}")


def _print_step(name: str, seconds: float, modules: Collection[str]) -> None:
    print(f"{name:7} {seconds:6.3f} s {len(modules):4} module{'' if len(modules) == 1 else 's'}")
