"""`tricorn log`: look after a log, while no server has it open or while others do."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial

import trio

from tricorn.chat.logs.base import Maintained, Unavailable
from tricorn.errors.failures import leaves
from tricorn.service.settings import Secret, ServiceSettings
from tricorn.service.start_up import make_log
from tricorn.settings import SettingError


def command(arguments: Namespace) -> int:
    """Check a log, or give its conversations new epochs. Return 0 if all is well, else 1."""
    settings = ServiceSettings.from_environ()
    if arguments.log is not None:
        settings = replace(settings, log=Secret(arguments.log))
    log = make_log(settings)
    if not isinstance(log, Maintained):
        raise SettingError("log: memory: ends with its process; there is nothing to look after")
    action = partial(_check if arguments.action == "check" else _renew, log)
    try:
        return trio.run(action)
    except* Unavailable as errors:
        problem = next(leaves(errors))
    print(f"tricorn: {problem}", file=sys.stderr)
    return 1


async def _check(log: Maintained) -> int:
    examined = await log.examine()
    for problem in examined.problems:
        print(problem)
    found = f"{len(examined.problems)} problems" if examined.problems else "no problem"
    print(f"{examined.conversations} conversations, {examined.entries} entries: {found}")
    return 1 if examined.problems else 0


async def _renew(log: Maintained) -> int:
    await log.renew_epochs()
    print("Every conversation has another epoch: clients start over with what the log has.")
    return 0
