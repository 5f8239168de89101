"""Rule E9: what ends a handler, a hook or a drain hides no error below it; and what is no error is not reported."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from fixtures.handlers import greet_and_sleep
from fixtures.hosts import Host, asgi, native
from tricorn import Accept, Request, Settings, WebSocket
from tricorn.errors.chain import hides_an_error

Served = Callable[..., Any]
Records = Any
Ending = Callable[[WebSocket], Awaitable[None]]


def fail() -> None:
    raise LookupError("the first error")


async def send_until_told(ws: WebSocket) -> None:
    while True:
        await ws.send("sorry")
        await trio.sleep(0.001)


async def wait(ws: WebSocket) -> None:
    await trio.sleep_forever()


async def receive(ws: WebSocket) -> None:
    while True:
        await ws.receive()


# Handlers that fail, and whose peer is gone before they have said so.


async def handle_all(ws: WebSocket, end: Ending) -> None:
    try:
        fail()
    except Exception:
        await end(ws)
        raise


async def name_it_and_raise_again(ws: WebSocket, end: Ending) -> None:
    try:
        fail()
    except LookupError:
        await end(ws)
        raise


async def finally_end(ws: WebSocket, end: Ending) -> None:
    try:
        fail()
    finally:
        await end(ws)


@asynccontextmanager
async def ended(ws: WebSocket, end: Ending) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await end(ws)


async def leave_a_block(ws: WebSocket, end: Ending) -> None:
    async with ended(ws, end):
        fail()


async def in_a_nursery(ws: WebSocket, end: Ending) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(handle_all, ws, end)


async def in_the_connections_nursery(ws: WebSocket, end: Ending) -> None:
    ws.nursery.start_soon(handle_all, ws, end)
    await trio.sleep_forever()


async def started_in_the_connections_nursery(ws: WebSocket, end: Ending) -> None:
    async def task(task_status: trio.TaskStatus[str]) -> None:
        task_status.started("begun")
        await handle_all(ws, end)

    assert await ws.nursery.start(task) == "begun"
    await trio.sleep_forever()


async def under_two_clauses(ws: WebSocket, end: Ending) -> None:
    try:
        fail()
    except Exception:
        try:
            raise KeyError("a fallback")
        except KeyError:
            await end(ws)


FAILING = [
    handle_all,
    name_it_and_raise_again,
    finally_end,
    leave_a_block,
    in_a_nursery,
    in_the_connections_nursery,
    started_in_the_connections_nursery,
    under_two_clauses,
]


# Handlers that do nothing wrong


async def name_it(ws: WebSocket, end: Ending) -> None:
    try:
        fail()
    except LookupError:
        await end(ws)


async def after_it(ws: WebSocket, end: Ending) -> None:
    with suppress(LookupError):
        fail()
    await end(ws)


async def end_twice(ws: WebSocket, end: Ending) -> None:
    try:
        await end(ws)
    finally:
        await end(ws)


async def nothing(ws: WebSocket, end: Ending) -> None:
    await end(ws)


async def name_it_in_the_connections_nursery(ws: WebSocket, end: Ending) -> None:
    ws.nursery.start_soon(name_it, ws, end)
    await trio.sleep_forever()


FAULTLESS = [name_it, after_it, end_twice, nothing, name_it_in_the_connections_nursery]


async def _leave(served: Served, handle: Any, end: Ending, reset: bool) -> None:
    """Have the handler reach what it waits for, and the peer go."""
    begun = trio.Event()

    async def handler(ws: WebSocket) -> None:
        async def ending(ws: WebSocket) -> None:
            begun.set()
            await end(ws)

        await handle(ws, ending)

    async with served(handler, settings=QUICK) as server, server.connect() as client:
        await begun.wait()
        if reset:
            client.reset()
        else:
            await client.close(1000)
        await _all_ended(server)


async def _all_ended(server: Any) -> None:
    while server.own.connections:  # noqa: ASYNC110 (there is nothing that tells)
        await trio.sleep(0.005)


QUICK = Settings(close_timeout=0.3)


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "close frame"])
@pytest.mark.parametrize("end", [send_until_told, wait, receive], ids=lambda end: end.__name__)
@pytest.mark.parametrize("handle", FAILING, ids=lambda handle: handle.__name__)
async def test_an_error_below_what_ends_a_handler_is_reported(
    served: Served, records: Records, handle: Any, end: Ending, reset: bool
) -> None:
    await _leave(served, handle, end, reset)
    [record] = records.read("ERROR")
    assert record["message"] == "LookupError: the first error"
    assert "in fail\n" in record["stack_trace"]
    assert "Disconnected" in record["stack_trace"] or "Cancelled" in record["stack_trace"]


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "close frame"])
@pytest.mark.parametrize("end", [send_until_told, wait, receive], ids=lambda end: end.__name__)
@pytest.mark.parametrize("handle", FAULTLESS, ids=lambda handle: handle.__name__)
async def test_a_peer_that_goes_is_no_error(
    served: Served, records: Records, handle: Any, end: Ending, reset: bool
) -> None:
    await _leave(served, handle, end, reset)
    assert records.read("ERROR") == []


async def test_on_every_way_in_with_one_record_and_its_id(hosted: Served, capfd: pytest.CaptureFixture[str]) -> None:
    begun = trio.Event()

    async def handler(ws: WebSocket) -> None:
        try:
            fail()
        except Exception:
            begun.set()
            await ws.close(4321, "sorry")  # which cancels this task

    async with hosted(handler) as server, server.connect() as client:
        await begun.wait()
        assert await client.closed() == (4321, "sorry")
    error, end = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert (error["severity"], error["message"]) == ("ERROR", "LookupError: the first error")
    assert (end["message"], end["error_id"]) == ("connection closed", error["error_id"])
    assert end["notes"] == f"1011 {error['error_id']}"


async def test_in_a_task_of_the_connection_on_every_way_in(hosted: Served, capfd: pytest.CaptureFixture[str]) -> None:
    begun = trio.Event()

    async def task() -> None:
        try:
            fail()
        except Exception:
            begun.set()
            await trio.sleep_forever()

    async def handler(ws: WebSocket) -> None:
        ws.nursery.start_soon(task)
        await begun.wait()
        await ws.close(4321, "sorry")  # which cancels the task

    async with hosted(handler) as server, server.connect() as client:
        assert await client.closed() == (4321, "sorry")
    error, end = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert (error["severity"], error["message"]) == ("ERROR", "LookupError: the first error")
    assert (end["message"], end["error_id"]) == ("connection closed", error["error_id"])


async def test_a_hook_that_is_cut_off_while_it_cleans_up(
    served: Served, records: Records, autojump_clock: MockClock
) -> None:
    async def hook(request: Request) -> Accept:
        try:
            fail()
        finally:
            await trio.sleep_forever()
        return Accept()

    async def handler(ws: WebSocket) -> None:
        raise AssertionError

    settings = Settings(handshake_timeout=1)
    async with served(handler, settings=settings, before_upgrade=hook) as server, server.open() as stream:
        await stream.send_all(server.client(stream).request())
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 503")
    [record] = records.read("ERROR")
    assert record["message"] == "LookupError: the first error"
    assert record["path"] == "/"


@pytest.mark.parametrize("host", [native, asgi], ids=lambda host: host.__name__)
async def test_a_drain_that_is_cut_off_while_it_cleans_up(
    running: Served, records: Records, monkeypatch: pytest.MonkeyPatch, patient_clock: MockClock, host: Host
) -> None:
    monkeypatch.setattr("tricorn.application.LOOK", 1.0)

    async def drain() -> None:
        try:
            fail()
        finally:
            await trio.sleep_forever()

    settings = Settings(drain_timeout=8, close_timeout=2)
    async with running(host, greet_and_sleep, drain=drain, settings=settings) as server, server.connect() as client:
        assert await client.receive() == "hello"
        server.scope.cancel()
        assert await client.closed() == (1012, "")
    [record] = records.read("ERROR")
    assert (record["message"], record["phase"]) == ("LookupError: the first error", "draining")


async def test_disconnects_cost_no_look_at_a_chain(
    served: Served, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hides_an_error.__globals__, "in_order", None)

    async def handler(ws: WebSocket) -> None:
        if ws.request.path == "/receive":
            await receive(ws)
        elif ws.request.path == "/send":
            await send_until_told(ws)
        elif ws.request.path == "/ping":
            while True:
                await ws.ping()
        await wait(ws)

    async with served(handler, settings=QUICK) as server:
        for path in ("/receive", "/send", "/ping", "/wait"):
            async with server.connect(path) as client:
                client.reset()
            async with server.connect(path) as client:
                await client.close(1001)
        await _all_ended(server)
    assert records.read("ERROR") == []


async def test_the_connections_nursery_is_one_of_trios(served: Served, records: Records) -> None:
    async def named() -> None:
        await trio.sleep_forever()

    async def handler(ws: WebSocket) -> None:
        ws.nursery.start_soon(named)
        ws.nursery.start_soon(named, name="another name")
        names = {task.name for task in ws.nursery.child_tasks}
        assert {name.rpartition(".")[2] for name in names} == {"named", "another name"}
        assert ws.nursery.parent_task is trio.lowlevel.current_task()
        for wrong in (named(), print):
            with pytest.raises(TypeError, match="Trio"):
                ws.nursery.start_soon(wrong)
        await ws.send("well")
        ws.nursery.cancel_scope.cancel()

    async with served(handler) as server, server.connect() as client:
        assert await client.receive() == "well"
        assert await client.closed() == (1000, "")
    assert records.read("ERROR") == []
