"""A server that is full says so, as long as that costs little, and lets the next in when somebody leaves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import pytest
import trio
import trio.testing

from fixtures.handlers import echo
from tricorn import Settings
from tricorn.host.listener import SPARE
from tricorn.metrics import LIMIT_HITS
from tricorn.web.pages import pages

Serving = Callable[..., AbstractAsyncContextManager[Any]]
FULL = (1013, "full, come back later")


async def ready() -> None:
    """Nothing speaks against it."""


@pytest.fixture
def before() -> float:
    return LIMIT_HITS.values["max_connections"]


async def test_who_comes_when_it_is_full_is_told_to_come_back(served: Serving, before: float) -> None:
    async with (
        served(echo, settings=Settings(max_connections=2), app=pages(ready)) as server,
        server.connect() as first,
    ):
        async with server.connect() as second:
            for _ in range(3):
                async with server.connect() as third:
                    await third.send("not heard")
                    assert await third.closed() == FULL
            await second.send("undisturbed")
            assert await second.receive() == "undisturbed"
            async with server.open() as page:
                await page.send_all(b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
                assert b"200" in await page.receive_some()
            await second.close()
            await second.closed()
        async with server.connect() as next_one:
            await next_one.send("there is room")
            assert await next_one.receive() == "there is room"
        await first.send("undisturbed")
        assert await first.receive() == "undisturbed"
    assert LIMIT_HITS.values["max_connections"] - before == 3


async def test_past_what_it_can_say_so_sockets_are_closed_unread(served: Serving, before: float) -> None:
    async with served(echo, settings=Settings(max_connections=1)) as server, server.connect() as first:
        async with AsyncExitStack() as silent:
            for _ in range(SPARE):
                await silent.enter_async_context(server.open())
            async with server.open() as stream:
                assert await stream.receive_some() == b""
            await first.send("undisturbed")
            assert await first.receive() == "undisturbed"
        await trio.testing.wait_all_tasks_blocked()
        async with server.connect() as refused:
            assert await refused.closed() == FULL
    assert LIMIT_HITS.values["max_connections"] - before == 2
