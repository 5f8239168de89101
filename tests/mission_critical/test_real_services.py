"""The services that a deployment leans on, as they are."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from socket import AF_UNIX, socket

import pytest

TIMEOUT = 20  # seconds


def ask_postgres(connection: str) -> str:
    command = ["psql", connection, "--no-psqlrc", "--tuples-only", "--no-align", "--command", "select 6 * 7"]
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=TIMEOUT).stdout


def ask_redis(path: str) -> str:
    with socket(AF_UNIX) as connection, connection.makefile("r") as answers:
        connection.settimeout(TIMEOUT)
        connection.connect(path)
        connection.sendall(b"PING\r\n")
        return answers.readline()


@pytest.mark.always
@pytest.mark.parametrize(
    ("name", "ask", "answer"),
    [
        pytest.param("postgres", ask_postgres, "42\n", id="PostgreSQL"),
        pytest.param("redis", ask_redis, "+PONG\n", id="Redis"),
    ],
)
def test_docker_services_availability(
    name: str,
    ask: Callable[[str], str],
    answer: str,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("verdict", "answers")
    assert ask(request.getfixturevalue(name)) == answer
