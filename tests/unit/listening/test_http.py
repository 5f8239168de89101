"""What is used of Hypercorn that is not its public interface, so that another version of it fails here first."""

from __future__ import annotations

from importlib.metadata import version
from inspect import Parameter, isasyncgenfunction, iscoroutinefunction, signature
from typing import Any

import pytest
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState


def names(function: Any) -> list[str]:
    return [name for name, each in signature(function).parameters.items() if each.default is Parameter.empty]


def test_it_is_the_version_that_was_read() -> None:
    assert version("hypercorn").startswith("0.18.")


@pytest.mark.parametrize(
    ("function", "takes"),
    [
        (TCPServer.__init__, ["self", "app", "config", "context", "state", "stream"]),
        (Lifespan.__init__, ["self", "app", "config", "state"]),
        (WorkerContext.__init__, ["self", "max_requests"]),
        (ASGIWrapper.__init__, ["self", "app"]),
        (ASGIWrapper.__call__, ["self", "scope", "receive", "send", "sync_spawn", "call_soon"]),
    ],
)
def test_what_is_called_takes_what_it_gets(function: Any, takes: list[str]) -> None:
    assert names(function) == takes


@pytest.mark.parametrize(
    "function", [TCPServer.run, Lifespan.handle_lifespan, Lifespan.wait_for_startup, Lifespan.wait_for_shutdown]
)
def test_what_is_awaited_can_be(function: Any) -> None:
    assert iscoroutinefunction(function)
    assert not isasyncgenfunction(function)


def test_the_options_that_are_set_are_there() -> None:
    for option in (
        "h11_max_incomplete_size",
        "websocket_max_message_size",
        "websocket_ping_interval",
        "ssl_handshake_timeout",
        "accesslog",
        "errorlog",
        "include_server_header",
    ):
        assert hasattr(Config, option), option


async def test_the_event_of_the_end_is_one_that_is_set() -> None:
    context = WorkerContext(None)
    assert not context.terminated.is_set()
    await context.terminated.set()
    assert context.terminated.is_set()


def test_a_connections_state_is_a_dict() -> None:
    assert isinstance(ConnectionState({}), dict)
