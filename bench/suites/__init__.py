"""The suites, by name, in the order in which they run."""

from . import echo
from .suite import FULL, QUICK, TINY, Case, Figures, Sizes, Suite

SUITES: dict[str, Suite] = {**echo.SUITES}

__all__ = ["FULL", "QUICK", "SUITES", "TINY", "Case", "Figures", "Sizes", "Suite"]
