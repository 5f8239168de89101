"""`tricorn.serve` starts a `Server`: what it listens on, who is there, what it counted, and how it closes."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import tricorn
from fixtures.client import connect, is_served, serving
from fixtures.clock import seconds
from fixtures.handlers import echo, flood, greet_and_sleep
from tricorn import Settings, WebSocket

SETTINGS = Settings(close_timeout=3, drain_timeout=10, stall_timeout=inf, ping_interval=inf)
PATIENCE = 60  # seconds


# Who is there


async def test_it_knows_who_is_there() -> None:
    members: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        members.append(ws)
        await ws.receive()

    async with serving(handler, 0) as server:
        assert server.connections == frozenset()
        async with connect(server.addresses[0]) as one, connect(server.addresses[0]) as other:
            await wait_all_tasks_blocked()
            assert server.connections == frozenset(members)
            assert len(members) == 2
            assert tricorn.broadcast(server.connections, "hello") == []
            assert [await one.receive(), await other.receive()] == ["hello", "hello"]
            await one.close()
            await one.closed()
            await wait_all_tasks_blocked()
            assert server.connections == {members[1]}
            for ws in server.connections:
                server_side = ws
            await other.send("return")
            await other.closed()
        await wait_all_tasks_blocked()
        assert server.connections == frozenset()
        assert server_side.closed == (1000, "")


async def test_who_is_in_its_closing_handshake_is_there_no_more() -> None:
    async with serving(greet_and_sleep, 0) as server, connect(server.addresses[0]) as client:
        await client.receive()
        [ws] = server.connections
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ws.close, 4321, "why")
            await wait_all_tasks_blocked()
            assert ws.closed == (4321, "why")
            assert server.connections == frozenset()
            assert await client.closed() == (4321, "why")


async def test_closed_is_none_until_all_is_received() -> None:
    seen: list[object] = []
    go_on = trio.Event()

    async def handler(ws: WebSocket) -> None:
        await go_on.wait()
        seen.append(ws.closed)
        async for message in ws:
            seen.extend((message, ws.closed))
        seen.append(ws.closed)

    async with serving(handler, 0) as server, connect(server.addresses[0]) as client:
        await client.send("last")
        await client.close(4321, "bye")
        await wait_all_tasks_blocked()
        go_on.set()
        assert await client.closed() == (4321, "bye")
    assert seen == [None, "last", None, (4321, "bye")]


async def test_servers_of_one_process_count_apart() -> None:
    settings = Settings(max_connections=1)
    async with serving(echo, 0, settings=settings) as one, serving(echo, 0) as other:
        async with connect(one.addresses[0]) as client:
            await client.send("hello")
            await client.receive()
            await is_served(other.addresses[0])
            await is_served(other.addresses[0])
            with pytest.raises(AssertionError, match="503"):
                await is_served(one.addresses[0])
            await wait_all_tasks_blocked()
            assert one.metrics.numbers().current["connections"]["open"] == [1]
            assert other.metrics.numbers().current["connections"]["open"] == [0]
            assert [each.metrics.opened.values[""] for each in (one, other)] == [1, 2]
            assert [each.metrics.limit_hits.values["max_connections"] for each in (one, other)] == [1, 0]
            assert [each.metrics.numbers().grown["messages"]["received"] for each in (one, other)] == [[1], [2]]
        await wait_all_tasks_blocked()
        assert [each.metrics.closed.values["1000"] for each in (one, other)] == [0, 2]
        assert [each.metrics.closed.values["1006"] for each in (one, other)] == [1, 0]


# Closing it


async def test_close_drains_and_closes_everybody() -> None:
    drained = trio.Event()

    async def drain() -> None:
        drained.set()

    async with serving(greet_and_sleep, 0, drain=drain) as server, connect(server.addresses[0]) as client:
        await client.receive()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.close)
            assert await client.closed() == (1012, "")
        assert drained.is_set()
        with pytest.raises(OSError):  # noqa: PT011
            await trio.open_tcp_stream(*server.addresses[0])
        await server.close()  # it is closed


async def test_serve_returns_when_its_server_is_closed() -> None:
    async with trio.open_nursery() as nursery:
        server = await nursery.start(tricorn.serve, echo, 0)
        await server.close()


async def test_close_waits_for_a_client_that_does_not_answer(patient_clock: MockClock, records: Any) -> None:
    """However often it is called: the others only wait."""
    async with serving(greet_and_sleep, 0, settings=SETTINGS) as server, connect(server.addresses[0]) as client:
        await client.receive()
        async with seconds(3), trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(server.close)
        [record] = records.read("INFO")
        assert (record["code"], record["close_sent"]) == (1012, 1012)


async def test_a_close_that_is_cancelled_goes_on(patient_clock: MockClock) -> None:
    async with serving(flood, 0, settings=SETTINGS) as server, connect(server.addresses[0]):
        await wait_all_tasks_blocked()
        with trio.move_on_after(1) as scope:
            await server.close()
        assert scope.cancelled_caught
        async with seconds(2):
            await server.close()


async def test_a_handler_may_close_its_server(patient_clock: MockClock) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.receive()
        await server.close()
        raise AssertionError  # it is cancelled instead

    async with serving(handler, 0, settings=SETTINGS) as server, connect(server.addresses[0]) as client:
        await client.send("close")
        assert await client.closed() == (1012, "")


async def test_begin_closing_twice_aborts(patient_clock: MockClock, records: Any) -> None:
    async with serving(greet_and_sleep, 0, settings=SETTINGS) as server, connect(server.addresses[0]) as client:
        await client.receive()
        async with seconds(0):
            server.begin_closing()
            await wait_all_tasks_blocked()
            server.begin_closing()
            await server.close()
