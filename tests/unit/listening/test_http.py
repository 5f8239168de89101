"""What is used of Hypercorn that is not its public interface, so that another version of it fails here first."""

from __future__ import annotations

from importlib.metadata import version
from inspect import Parameter, isasyncgenfunction, iscoroutinefunction, signature
from typing import Any

import pytest
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

PROTOCOL = ["self", "app", "config", "context", "task_group", "connection_state", "ssl", "client", "server", "send"]


def names(function: Any) -> list[str]:
    return [name for name, each in signature(function).parameters.items() if each.default is Parameter.empty]


def test_it_is_the_version_that_was_read() -> None:
    assert version("hypercorn").startswith("0.18.")


@pytest.mark.parametrize(
    ("function", "takes"),
    [
        (H11Protocol.__init__, PROTOCOL),
        (H2Protocol.__init__, PROTOCOL),
        (H2Protocol.initiate, ["self"]),
        (H11Protocol.initiate, ["self"]),
        (H11Protocol.handle, ["self", "event"]),
        (H2Protocol.handle, ["self", "event"]),
        (TaskGroup.spawn, ["self", "func", "args"]),
        (RawData, ["data"]),
        (Closed, []),
        (Updated, ["idle"]),
        (Lifespan.__init__, ["self", "app", "config", "state"]),
        (WorkerContext.__init__, ["self", "max_requests"]),
        (ASGIWrapper.__init__, ["self", "app"]),
        (ASGIWrapper.__call__, ["self", "scope", "receive", "send", "sync_spawn", "call_soon"]),
    ],
)
def test_what_is_called_takes_what_it_gets(function: Any, takes: list[str]) -> None:
    assert names(function) == takes


@pytest.mark.parametrize(
    "function",
    [
        H11Protocol.handle,
        H2Protocol.handle,
        Lifespan.handle_lifespan,
        Lifespan.wait_for_startup,
        Lifespan.wait_for_shutdown,
    ],
)
def test_what_is_awaited_can_be(function: Any) -> None:
    assert iscoroutinefunction(function)
    assert not isasyncgenfunction(function)


def test_the_options_that_are_set_are_there() -> None:
    for option in (
        "h11_max_incomplete_size",
        "h2_max_concurrent_streams",
        "h2_max_header_list_size",
        "keep_alive_timeout",
        "server_names",
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


def test_http_2_knows_its_streams_and_what_they_wait_with() -> None:
    """And the settings that it offers are those of its connection, which it has not sent yet."""
    protocol = H2Protocol(None, Config(), WorkerContext(None), None, ConnectionState({}), True, None, None, None)  # type: ignore[arg-type]
    assert protocol.idle
    assert protocol.stream_buffers == {}
    assert protocol.connection.local_settings.enable_connect_protocol == 1
    assert protocol.connection.data_to_send() == b""
