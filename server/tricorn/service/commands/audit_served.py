"""`tricorn audit` without a target: audit the agent that would be served."""

from __future__ import annotations

from argparse import Namespace

from tricorn.service.commands import audit
from tricorn.service.settings import ServiceSettings


def command(arguments: Namespace) -> int:
    """Print the findings about the agent that the environment names, or the demo agent."""
    arguments.targets = [ServiceSettings.from_environ().answering]
    return audit.command(arguments)
