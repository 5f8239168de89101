"""Whether the log can be written to, for probes: however many ask, the log is asked at most once a second."""

from __future__ import annotations

from math import inf

from trio import Lock, current_time, move_on_after

from tricorn.chat.logs.base import Log
from tricorn.errors.report import report, report_error

LOG_PATIENCE = 1.0  # seconds; probes wait as long by default
BELIEVED = 1.0  # seconds for which an answer stands: checking is a durable write


class Readiness:
    """What the log said last."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._lock = Lock()  # one check at a time, and whoever waits gets its answer
        self._until = -inf  # when the answer is too old, in Trio's time
        self._answer: str | None = None

    async def why_not(self) -> str | None:
        """Return why the log cannot be used, or None if it can be. Why not is reported. A checkpoint.

        Waits for the log for `LOG_PATIENCE` seconds. If this is cancelled, the next one who waits asks.
        """
        async with self._lock:
            if current_time() >= self._until:
                self._answer = await self._ask()
                self._until = current_time() + BELIEVED
            return self._answer

    async def _ask(self) -> str | None:
        with move_on_after(LOG_PATIENCE):
            try:
                await self._log.check()
            except Exception as error:
                report_error(error, phase="readiness")
                return "the log fails"
            return None
        report("ERROR", f"the log does not answer: {self._log.problem}", phase="readiness")
        return "the log does not answer"
