"""Compile `epoll_echo.c` with the system's compiler, and become it."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

with TemporaryDirectory() as directory:
    program = f"{directory}/epoll_echo"
    subprocess.run(["cc", "-O2", "-o", program, Path(__file__).with_suffix(".c")], check=True)  # noqa: S607
    descriptor = os.open(program, os.O_RDONLY | os.O_CLOEXEC)
os.execve(descriptor, ["epoll_echo", *sys.argv[1:]], {})  # noqa: S606
