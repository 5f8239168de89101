"""Where many are connected they are closed in batches, so that their clients do not come back all at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tricorn import Settings, WebSocket

Served = Callable[..., AbstractAsyncContextManager[Any]]

PAUSE = 1.0  # seconds
TIME = 6.0  # seconds that the drain has, but for the last closing


class Ends:
    """A handler that keeps, of every connection, how many seconds after the start of the drain it ended."""

    def __init__(self) -> None:
        self.began = 0.0
        self.times: list[float] = []

    async def __call__(self, ws: WebSocket) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.times.append(trio.current_time() - self.began)

    def drain(self, server: Any) -> None:
        self.began = trio.current_time()
        server.scope.cancel()

    def batches(self) -> dict[float, int]:
        return dict(Counter(round(time, 3) for time in self.times))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tricorn.server.BATCH", 2)
    monkeypatch.setattr("tricorn.server.BATCH_PAUSE", PAUSE)


@pytest.fixture
def settings() -> Settings:
    return Settings(drain_timeout=TIME + 2, close_timeout=2)


async def connected(stack: AsyncExitStack, server: Any, count: int) -> list[Any]:
    return [await stack.enter_async_context(server.connect()) for _ in range(count)]


async def closed(clients: list[Any]) -> None:
    async def one(client: Any) -> None:
        assert await client.closed() == (1012, "")

    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(one, client)


@pytest.mark.parametrize(
    ("count", "batches"),
    [
        (1, {0: 1}),
        (2, {0: 2}),
        (5, {0: 2, 1: 2, 2: 1}),
        (18, {TIME * batch / 8: 2 for batch in range(9)}),  # as many as there is time for, evenly
    ],
)
async def test_batches(
    served: Served, patient_clock: MockClock, settings: Settings, count: int, batches: dict[float, int]
) -> None:
    handler = Ends()
    async with served(handler, settings=settings) as server, AsyncExitStack() as stack:
        clients = await connected(stack, server, count)
        handler.drain(server)
        await closed(clients)
        await server.over.wait()
        assert trio.current_time() - handler.began < max(batches) + 0.1
    assert handler.batches() == pytest.approx(batches)


async def test_a_drain_that_takes_long_leaves_half_of_the_time_to_the_batches(
    served: Served, patient_clock: MockClock, settings: Settings
) -> None:
    handler = Ends()
    async with served(handler, settings=settings, drain=trio.sleep_forever) as server, AsyncExitStack() as stack:
        clients = await connected(stack, server, 14)
        handler.drain(server)
        await closed(clients)
    assert handler.batches() == pytest.approx({TIME / 2 + TIME / 2 * batch / 6: 2 for batch in range(7)}, abs=0.01)


async def test_who_is_closed_late_is_served_until_then(
    served: Served, patient_clock: MockClock, settings: Settings
) -> None:
    async def answer(ws: WebSocket) -> None:
        async for message in ws:
            await ws.send(message)

    async with served(answer, settings=settings) as server, AsyncExitStack() as stack:
        clients = await connected(stack, server, 3)
        server.scope.cancel()
        await closed(clients[:2])
        await clients[2].send("still there")
        assert await clients[2].receive() == "still there"
        await closed(clients[2:])


async def test_a_peer_that_does_not_answer_holds_nobody_up(
    served: Served, patient_clock: MockClock, settings: Settings
) -> None:
    handler = Ends()
    async with served(handler, settings=settings) as server, AsyncExitStack() as stack:
        await connected(stack, server, 5)
        handler.drain(server)
        await server.over.wait()
        assert trio.current_time() - handler.began <= settings.drain_timeout + 0.1
    assert handler.batches() == {0: 2, 1: 2, 2: 1}
