"""Hypercorn's options from a file: those that mean something, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from tricorn.service.hypercorn_config import HTTP, INSTEAD, TLS, Config, load_config, workers_of
from tricorn.settings import SettingError


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A certificate and its key."""
    certificate = trustme.CA().issue_cert("127.0.0.1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(chain)
    certificate.private_key_pem.write_to_path(key)
    return str(chain), str(key)


def written(directory: Path, text: str, name: str = "config.toml") -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def test_every_option_is_hypercorns() -> None:
    assert all(hasattr(Config, option) for option in TLS | HTTP | set(INSTEAD))
    assert not (TLS | HTTP) & set(INSTEAD)


def test_a_file(tmp_path: Path, files: tuple[str, str]) -> None:
    chain, key = files
    text = f"certfile = {chain!r}\nkeyfile = {key!r}\nkeep_alive_timeout = 7\nroot_path = '/x/'"
    config = load_config(written(tmp_path, text))
    assert config.ssl_enabled
    assert (config.keep_alive_timeout, config.root_path) == (7, "/x")


def test_a_python_file_may_have_names_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, "import os\nsome = 3\nkeep_alive_timeout = 2 * some\n", "config.py")
    assert load_config(f"file:{path}").keep_alive_timeout == 6


def test_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "h2_max_concurrent_streams = 5\n", "options_of_a_test.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_config("python:options_of_a_test").h2_max_concurrent_streams == 5


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("bind = ':80'", "bind means nothing here; there is --bind"),
        ("workers = 2", "workers means nothing here; there is --workers"),
        ("graceful_timeout = 2", "graceful_timeout means nothing here; there is TRICORN_DRAIN_TIMEOUT"),
        ("accesslog = '-'", "accesslog means nothing here"),
        ("keep_alive = 2", "there is no option keep_alive; did you mean keep_alive_timeout?"),
        ("nonsense = 2", "there is no option nonsense"),
        ("certfile = 'x'", "certfile and keyfile need each other"),
        ("certfile = '/none'\nkeyfile = '/none'", "TLS cannot be set up: [Errno 2] No such file or directory"),
        ("=", "cannot be read: Invalid statement (at line 1, column 1)"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, text: str, problem: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SettingError) as caught:
        load_config(path)
    assert str(caught.value) == f"--config {path}: {problem}"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/none.toml", "[Errno 2] No such file or directory: '/none.toml'"),
        ("python:none", "No module named 'none'"),
        ("file:/none.py", "[Errno 2] No such file or directory: '/none.py'"),
    ],
)
def test_what_cannot_be_read(name: str, problem: str) -> None:
    with pytest.raises(SettingError) as caught:
        load_config(name)
    assert str(caught.value) == f"--config {name}: cannot be read: {problem}"


@pytest.mark.parametrize(
    ("command", "workers"),
    [
        ("/venv/bin/hypercorn -k trio tricorn.asgi:app", 1),
        ("/venv/bin/hypercorn -k trio -w 2 tricorn.asgi:app", 2),
        ("/venv/bin/hypercorn --workers=3 tricorn.asgi:app -b 127.0.0.1:0", 3),
        ("/lib/hypercorn/__main__.py -w4 --keep-alive 5 tricorn.asgi:app", 4),
        ("hypercorn -c five.toml tricorn.asgi:app", 5),
        ("hypercorn --config file:six.py tricorn.asgi:app", 6),
        ("hypercorn -w 1 -c five.toml tricorn.asgi:app", 1),
        ("hypercorn -c none_said.toml tricorn.asgi:app", 1),
        ("my_server.py -w 2", None),
        ("-c", None),
    ],
)
def test_how_many_workers_hypercorn_was_told_to_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, workers: int | None
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "workers = 5\nbind = ':80'", "five.toml")
    written(tmp_path, "workers = 6", "six.py")
    written(tmp_path, "keep_alive_timeout = 7", "none_said.toml")
    assert workers_of(command.split()) == workers
