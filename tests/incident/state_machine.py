"""The phases of a connection. Imports `utils`, which imports this module."""

from __future__ import annotations

import logging
from math import inf

from incident.utils import describe

logger = logging.getLogger("incident")

MAX_SECONDS = inf


class StateMachine:
    def __init__(self) -> None:
        self.entered: dict[str, float] = {}

    def transition(self, state: str) -> None:
        try:
            from incident.cloud_run import seconds_since

            self.entered[state] = seconds_since(0)
        except Exception:
            logger.error("Failed to transition %s", describe(state))
