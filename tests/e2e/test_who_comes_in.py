"""`tricorn` as processes: what they refuse to start with, tokens made and used, and secrets that stay secret."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

TRICORN = [sys.executable, "-m", "tricorn"]
SECRET = "a secret of thirty-two bytes or more"
TIMEOUT = 60  # seconds


def tricorn(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environ}
    return subprocess.run([*TRICORN, *arguments], capture_output=True, text=True, env=environment, timeout=TIMEOUT)


Serving = Callable[..., AbstractContextManager[tuple[Popen[str], str]]]


@pytest.fixture
def serving(serve: list[str]) -> Serving:
    """`with serving(*arguments, **environ) as (process, address)`."""

    @contextmanager
    def serving(*arguments: str, host: str = "127.0.0.1", **environ: str) -> Iterator[tuple[Popen[str], str]]:
        command = [*serve, "--bind", f"{host}:0", *arguments]
        with Popen(command, stdout=PIPE, stderr=PIPE, text=True, env={**os.environ, **environ}) as process:
            try:
                line = process.stdout.readline() if process.stdout else ""
                address = re.search(r"http://[^\s/]+", line)
                assert address, f"no address in {line!r}"
                yield process, address[0]
            finally:
                process.terminate()
                process.wait(20)

    return serving


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        (["--bind", "0.0.0.0:0"], {}),
        (["--bind", "[::]:0"], {}),
        (["--bind", "chat.example:0"], {}),
        ([], {"K_SERVICE": "chat", "PORT": "0"}),
        ([], {"TRICORN_BIND": "0.0.0.0:0"}),
    ],
)
def test_open_by_accident_is_impossible(arguments: list[str], environ: dict[str, str]) -> None:
    done = tricorn("serve", *arguments, **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    for way_out in ("TRICORN_JWT_KEY", "127.0.0.1", "--auth none"):
        assert way_out in done.stderr


@pytest.mark.any_server
def test_open_on_purpose(serving: Serving) -> None:
    with serving("--auth", "none", host="0.0.0.0") as (_, address):
        assert tricorn("chat", address, "--message", "1+1").returncode == 0
    assert tricorn("serve", "--auth", "none", TRICORN_JWT_KEY=SECRET).returncode == 2


@pytest.mark.parametrize(
    ("key", "says"),
    [("short-and-secret", "at least 32 bytes"), ("file:/no/such/file", "No such file"), ("", "not empty")],
)
def test_a_key_that_is_none(key: str, says: str) -> None:
    done = tricorn("serve", "--bind", "127.0.0.1:0", TRICORN_JWT_KEY=key)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tricorn: TRICORN_JWT_KEY: ")
    assert says in done.stderr
    assert "short-and-secret" not in done.stderr


@pytest.mark.any_server
def test_a_token_opens_the_chat_and_no_secret_shows(serving: Serving, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(SECRET)
    with serving(TRICORN_JWT_KEY=f"file:{key}", TRICORN_IMPORT_GUARD="deny") as (process, address):
        made = tricorn("token", "--user", "ada", "--ttl", "5m", TRICORN_JWT_KEY=SECRET)
        token = made.stdout.strip()
        assert (made.returncode, made.stderr, token.count(".")) == (0, "", 2)
        done = tricorn("chat", address, "--message", "1+1", TRICORN_TOKEN=token)
        assert (done.returncode, done.stderr) == (0, "")
        for bad in ("", "x", token[:-2]):
            refused = tricorn("chat", address, "--message", "1+1", **({"TRICORN_TOKEN": bad} if bad else {"X": ""}))
            assert refused.returncode == 1
            assert token not in refused.stderr
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.terminate()
        out, err = process.communicate(timeout=TIMEOUT)
    assert '"code":4500' in err
    for secret in (SECRET, *token.split(".")[1:]):
        assert secret not in out + err
        assert secret.encode() not in command


@pytest.mark.parametrize("password", ["pa55@w0rd", "pa55/w0rd", "5432/pa55w0rd", "pa55[w0rd"])
@pytest.mark.parametrize("log", ["redis://me:{}@127.0.0.1:1/0", "postgresql://me:{}@127.0.0.1:1/db"])
def test_no_part_of_a_password_shows(log: str, password: str) -> None:
    for arguments, environ in [
        ([], {"TRICORN_LOG": log.format(password), "TRICORN_LOG_TIMEOUT": "0.2"}),
        ([], {"TRICORN_JWT_KEY": f"https://me:{password}@issuer.invalid/jwks"}),
        ([log.format(password)], {}),
    ]:
        done = tricorn("serve", "--bind", "127.0.0.1:0", *arguments, **environ)
        assert done.returncode in {1, 2}
        assert "tricorn" in done.stderr
        for part in ("pa55", "w0rd", "5432"):
            assert part not in done.stdout + done.stderr


@pytest.mark.parametrize("ttl", ["", "1", "h", "0s", "-1h", "1w", "1.5h", "9" * 5000 + "s", "１h"])
def test_a_time_that_is_none(ttl: str) -> None:
    done = tricorn("token", "--user", "ada", f"--ttl={ttl}", TRICORN_JWT_KEY=SECRET)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("must be a time like 90s, 15m, 1h or 7d\n")


def test_no_token_without_a_key() -> None:
    done = tricorn("token", "--user", "ada")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tricorn: TRICORN_JWT_KEY: must be set")
