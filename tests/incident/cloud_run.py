"""The helper that uses `time`. It imports it in development only: nobody saw it fail there."""

from __future__ import annotations

import os

if "K_SERVICE" not in os.environ:
    import time


def seconds_since(start: float) -> float:
    return time.time() - start
