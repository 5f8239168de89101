"""Hypercorn's own options from a file, as far as they mean something behind our listener."""

from __future__ import annotations

from argparse import ArgumentParser
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from ssl import SSLError
from tomllib import TOMLDecodeError
from typing import TYPE_CHECKING

from hypercorn.config import Config

from tricorn.service.loader import look_here_for
from tricorn.settings import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TLS = {
    "alpn_protocols",
    "ca_certs",
    "certfile",
    "ciphers",
    "keyfile",
    "keyfile_password",
    "verify_flags",
    "verify_mode",
}
HTTP = {
    "alt_svc_headers",
    "h11_pass_raw_headers",
    "h2_max_concurrent_streams",
    "h2_max_header_list_size",
    "h2_max_inbound_frame_size",
    "include_date_header",
    "include_server_header",
    "keep_alive_max_requests",
    "keep_alive_timeout",
    "max_app_queue_size",
    "read_timeout",
    "root_path",
    "server_names",
    "startup_timeout",
}
# What there is instead of the others.
INSTEAD = {
    "bind": "--bind",
    "workers": "--workers",
    "graceful_timeout": "TRICORN_DRAIN_TIMEOUT",
    "shutdown_timeout": "TRICORN_DRAIN_TIMEOUT",
    "h11_max_incomplete_size": "TRICORN_MAX_HEAD_BYTES",
    "ssl_handshake_timeout": "TRICORN_HANDSHAKE_TIMEOUT",
    "websocket_max_message_size": "TRICORN_MAX_MESSAGE_BYTES",
    "websocket_ping_interval": "TRICORN_PING_INTERVAL",
}


def load_config(name: str) -> Config:
    """Load a TOML file, or as Hypercorn does `file:` and a Python file or `python:` and a module.

    Raises:
        SettingError: it cannot be read, or has an option that means nothing here.
    """
    config = _read(name)
    for option in vars(config):
        _check(name, option.removeprefix("_"), strict=":" not in name)
    if (config.certfile is None) != (config.keyfile is None):
        raise _problem(name, "certfile and keyfile need each other")
    if config.keyfile_password is None:
        config.keyfile_password = ""  # else OpenSSL would ask for it at the terminal, and everybody would wait
    try:
        config.create_ssl_context()
    except (OSError, SSLError) as error:  # a file that is not there, or holds something else
        raise _problem(name, f"TLS cannot be set up: {error}") from None
    return config


def workers_of(command: Sequence[str]) -> int | None:
    """Return how many workers Hypercorn's command line asks for; None if it is another program's.

    A worker of Hypercorn has the command line of the process that started it in `sys.argv`.

    Raises:
        SettingError: a file of options that it names cannot be read.
    """
    program = Path(command[0])
    if "hypercorn" not in (program.name, program.parent.name):  # bin/hypercorn, or python -m hypercorn
        return None
    parser = ArgumentParser(add_help=False)
    parser.add_argument("-c", "--config")
    parser.add_argument("-w", "--workers", type=int)
    options, _ = parser.parse_known_args(command[1:])
    if options.workers is not None:
        workers: int = options.workers
        return workers
    return 1 if options.config is None else _read(options.config).workers


def _read(name: str) -> Config:
    kind, colon, rest = name.partition(":")
    loaders: dict[str, Callable[[str], Config]] = {"file": Config.from_pyfile, "python": _from_module}
    try:
        return loaders[kind](rest) if colon and kind in loaders else Config.from_toml(name)
    except (OSError, TOMLDecodeError, ImportError, SyntaxError) as error:
        raise _problem(name, f"cannot be read: {' '.join(str(error).split())}") from None


def _from_module(name: str) -> Config:
    look_here_for(name)
    return Config.from_object(import_module(name))


def _check(name: str, option: str, *, strict: bool) -> None:
    if option in TLS | HTTP:
        return
    if option in INSTEAD:
        raise _problem(name, f"{option} means nothing here; there is {INSTEAD[option]}")
    if hasattr(Config, option):
        raise _problem(name, f"{option} means nothing here")
    if strict:  # a module may have names of its own
        near = get_close_matches(option, sorted(TLS | HTTP), n=1)
        raise _problem(name, f"there is no option {option}" + (f"; did you mean {near[0]}?" if near else ""))


def _problem(name: str, problem: str) -> SettingError:
    return SettingError(f"--config {name}: {problem}")
