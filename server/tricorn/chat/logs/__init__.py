"""Where conversations are kept: the log that a URL names."""

from __future__ import annotations

from importlib import import_module

from tricorn.chat.logs.base import Log
from tricorn.chat.settings import ChatSettings
from tricorn.settings import SettingError

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
    """The log of this URL, by its scheme; it is opened by entering it. For start-up: this imports what it needs.

    Raises SettingError where there is no such log, or where what it needs is not installed. The URL is in no message,
    since it may have a password in it.
    """
    engine = ENGINES.get(url.partition(":")[0])
    if engine is None:
        raise SettingError("log: must begin with memory:, sqlite:///, redis://, rediss://, unix:// or postgresql://")
    try:
        module = import_module(f"tricorn.chat.logs.{engine}")
    except ModuleNotFoundError as error:
        raise SettingError(f"log: {error.name} is not installed; pip install 'tricorn[{engine}]'") from None
    log: Log = module.connect(url, settings)
    return log
