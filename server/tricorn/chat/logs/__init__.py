"""Where conversations are kept: the log that a URL names."""

from __future__ import annotations

from importlib import import_module

from tricorn.chat.logs.base import Log
from tricorn.chat.settings import ChatSettings
from tricorn.settings import SettingError, check_userinfo

ENGINES = {
    "memory": "memory",
    "sqlite": "sqlite",
    "redis": "redis",
    "rediss": "redis",
    "unix": "redis",
    "postgresql": "postgres",
    "postgres": "postgres",
}


def connect(url: str, settings: ChatSettings) -> Log:
    """Make the log that this URL names; enter it to open it. For start-up: this imports the engine.

    Raises SettingError if there is no such log, or if a package that it needs is not installed. No message contains the
    URL, since it may have a password in it.
    """
    engine = ENGINES.get(url.partition(":")[0])
    if engine is None:
        raise SettingError("log: must begin with memory:, sqlite:///, redis://, rediss://, unix:// or postgresql://")
    try:
        check_userinfo(url)
    except ValueError as error:
        raise SettingError(f"log: {error}") from None
    try:
        module = import_module(f"tricorn.chat.logs.{engine}")
    except ModuleNotFoundError as error:
        raise SettingError(f"log: {error.name} is not installed; pip install 'tricorn[{engine}]'") from None
    log: Log = module.connect(url, settings)
    return log
