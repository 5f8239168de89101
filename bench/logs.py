"""Logs for the chat to be measured with, each a block that has one and gives its URL.

Redis and PostgreSQL are the installed programs, on a Unix socket in a directory of their own, and keep what they have
acknowledged. Without the program the block raises FileNotFoundError, which says what installs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

DEBIAN = "/usr/lib/postgresql"  # where Debian keeps what only the server's own user needs
TIMEOUT = 60  # seconds, for what takes one or two


@contextmanager
def memory() -> Iterator[str]:
    yield "memory:"


@contextmanager
def sqlite() -> Iterator[str]:
    with TemporaryDirectory(prefix="sqlite-") as directory:
        yield f"sqlite:///{directory}/chat.db"


@contextmanager
def redis() -> Iterator[str]:
    program = _program("redis-server", "redis-server")
    with TemporaryDirectory(prefix="redis-") as directory:
        path = f"{directory}/redis.sock"
        kept = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")
        command = [program, "--port", "0", "--unixsocket", path, "--dir", directory, *kept]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert any("eady to accept connections" in line for line in process.stdout), "Redis did not start"
                yield f"unix://{path}"
            finally:
                process.kill()


@contextmanager
def postgres() -> Iterator[str]:
    versions = sorted(Path(DEBIAN).glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    program = _program("pg_ctl", "postgresql", os.pathsep.join(map(str, versions)))
    with TemporaryDirectory(prefix="postgres-") as directory:
        pg_ctl = [program, f"--pgdata={directory}/data"]
        if os.geteuid() == 0:  # PostgreSQL does not run as root
            shutil.chown(directory, "postgres", "postgres")
            pg_ctl = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *pg_ctl]
        _run(*pg_ctl, "initdb", "--options=--auth=trust --username=postgres --no-sync --no-locale -E UTF8")
        options = f"-c listen_addresses='' -c unix_socket_directories={directory}"
        _run(*pg_ctl, f"--log={directory}/log", f"--options={options}", "--wait", "start")
        try:
            yield f"postgresql://postgres@/postgres?host={directory}"
        finally:
            _run(*pg_ctl, "--mode=immediate", "--wait", "stop")


def _program(name: str, package: str, search: str | None = None) -> str:
    path = shutil.which(name, path=search) or shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"skipped: there is no {name}: apt-get install {package}")
    return path


def _run(*command: str) -> None:
    # Not to a pipe: the server that this starts would hold it open.
    subprocess.run(command, check=True, timeout=TIMEOUT, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
