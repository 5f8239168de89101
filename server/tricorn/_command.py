"""Imported first: `python -m tricorn` imports nothing from the working directory, as the command `tricorn` does not."""

from __future__ import annotations

import sys
from os import getcwd

# While Python looks for what -m names it imports its package, and has put the working directory first on the path.
if sys.argv[:1] == ["-m"] and "tricorn" in sys.orig_argv and sys.path[:1] == [getcwd()]:
    del sys.path[0]
