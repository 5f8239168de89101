"""The suites, by name, in the order in which they run."""

from bench.suites import chat, connections, deflate, echo, model, start, tail
from bench.suites.suite import FULL, QUICK, TINY, Case, Figures, Sizes, Suite

SUITES: dict[str, Suite] = {
    **echo.SUITES,
    **chat.SUITES,
    **model.SUITES,
    **connections.SUITES,
    **tail.SUITES,
    **start.SUITES,
    **deflate.SUITES,
}

__all__ = ["FULL", "QUICK", "SUITES", "TINY", "Case", "Figures", "Sizes", "Suite"]
