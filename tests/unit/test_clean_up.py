"""What a handler may still do when its peer has gone, and what it cannot hold up. Time is the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from fixtures.clock import seconds
from tricorn import Disconnected, Settings, WebSocket
from tricorn.testing import Client, connect

SETTINGS = Settings(close_timeout=2, drain_timeout=10, stall_timeout=5, ping_interval=10, ping_timeout=10)
MORE_THAN_FITS = bytes(200_000)

Records = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    """Returns what was reported since the last call."""
    return lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]


async def until(condition: Callable[[], object]) -> None:
    """Wait for what nothing tells of."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.01)


async def close(client: Client) -> None:
    await client.close()


async def vanish(client: Client) -> None:
    client.vanish()


async def iterate(ws: WebSocket) -> None:
    async for _ in ws:
        pass


async def receive(ws: WebSocket) -> None:
    with pytest.raises(Disconnected):  # noqa: PT012
        while True:
            await ws.receive()


async def send_on(ws: WebSocket) -> None:
    with pytest.raises(Disconnected):  # noqa: PT012
        while True:
            await ws.send(MORE_THAN_FITS)


async def send_fragments(ws: WebSocket) -> None:
    with pytest.raises(Disconnected):
        await ws.send(bytes(50_000) for _ in range(1000))


@pytest.mark.parametrize("go", [close, vanish])
@pytest.mark.parametrize("be_told", [iterate, receive, send_on, send_fragments])
async def test_a_handler_that_was_told_may_await(autojump_clock: MockClock, be_told: Any, go: Any) -> None:
    cleaned = trio.Event()

    async def handler(ws: WebSocket) -> None:
        await be_told(ws)
        await trio.sleep(1.9)
        cleaned.set()

    async with connect(handler, settings=SETTINGS) as client:
        if be_told in (send_on, send_fragments):
            client.stall()
        await trio.testing.wait_all_tasks_blocked()
        async with seconds(1.9):
            await go(client)
            await cleaned.wait()


@pytest.mark.parametrize("be_told", [iterate, receive, send_on, send_fragments])
async def test_a_handler_that_was_told_is_cancelled_after_the_close_timeout(
    autojump_clock: MockClock, be_told: Any
) -> None:
    ended = trio.Event()

    async def handler(ws: WebSocket) -> None:
        await be_told(ws)
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with connect(handler, settings=SETTINGS) as client:
        if be_told in (send_on, send_fragments):
            client.stall()
        await trio.testing.wait_all_tasks_blocked()
        async with seconds(2):
            client.vanish()
            await ended.wait()


@pytest.mark.parametrize("go", [close, vanish])
async def test_a_handler_that_is_busy_elsewhere_is_cancelled_at_once(autojump_clock: MockClock, go: Any) -> None:
    ended = trio.Event()

    async def handler(ws: WebSocket) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with connect(handler, settings=SETTINGS) as client, seconds(0):
        await go(client)
        await ended.wait()


async def test_a_handler_that_was_told_learns_no_more_of_a_second_task(autojump_clock: MockClock) -> None:
    """Nothing can be received or sent any more, in whichever task."""
    ends: list[str] = []

    async def sends(ws: WebSocket) -> None:
        await trio.sleep(1)
        with pytest.raises(Disconnected):
            await ws.send("late")
        ends.append("sends")

    async def handler(ws: WebSocket) -> None:
        ws.nursery.start_soon(sends, ws)
        async for _ in ws:
            pass
        await trio.sleep(1.5)
        ends.append("handler")

    async with connect(handler, settings=SETTINGS) as client:
        await client.close()
    assert ends == ["sends", "handler"]


async def stay_in_a_shield(ws: WebSocket) -> None:
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(14)


async def stay_behind_the_end(ws: WebSocket) -> None:
    await iterate(ws)
    with trio.CancelScope(shield=True):
        await trio.sleep(14)


async def swallow_cancellations(ws: WebSocket) -> None:
    for _ in range(140):
        try:
            await trio.sleep(0.1)
        except BaseException:  # noqa: ASYNC103
            with trio.CancelScope(shield=True):
                await trio.sleep(0.1)


@pytest.mark.parametrize("handler", [stay_in_a_shield, stay_behind_the_end, swallow_cancellations])
@pytest.mark.parametrize("go", [close, vanish])
async def test_tasks_that_do_not_end_hold_up_no_socket(
    autojump_clock: MockClock, records: Records, handler: Any, go: Any
) -> None:
    async def closed(client: Client) -> None:
        async with seconds(2, 0.2):
            await until(lambda: client._wire.ended)

    async with connect(handler, settings=SETTINGS) as client:
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(closed, client)
            await go(client)
    [record] = [record for record in records() if record["severity"] == "ERROR"]
    assert record["message"] == "a connection's tasks do not end when they are cancelled; its socket was closed"
    assert any(__file__ in task and handler.__name__ in task for task in record["tasks"])


@pytest.mark.parametrize("how", ["returns", "raises", "closes"])
async def test_all_that_was_sent_arrives_while_the_peer_takes_it(autojump_clock: MockClock, how: str) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send(bytes(1_000_000))
        if how == "raises":
            raise ValueError("x")
        if how == "closes":
            await ws.close(4000)

    async def read_slowly() -> None:
        while not client._wire.ended:  # 64 KiB each time, less than one in each stall timeout would be too slow
            client._stalled = False
            client._advance()
            client._stalled = True
            await trio.sleep(4)

    code = {"returns": 1000, "raises": 1011, "closes": 4000}[how]
    with pytest.raises(ExceptionGroup) if how == "raises" else trio.CancelScope():
        async with connect(handler, settings=SETTINGS) as client:
            client.stall()
            await read_slowly()
            assert await client.receive() == bytes(1_000_000)
            assert client.closed is not None
            assert client.closed.code == code


async def test_who_takes_nothing_has_the_stall_timeout_and_that_of_closing(autojump_clock: MockClock) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send(bytes(1_000_000))

    async with connect(handler, settings=SETTINGS) as client, seconds(7, 0.5):
        client.stall()
        await until(lambda: client._wire.ended)
        client.vanish()


async def test_a_loop_that_stood_still_is_not_held_against_the_peer(autojump_clock: MockClock) -> None:
    async def echo(ws: WebSocket) -> None:
        async for message in ws:
            await ws.send(message)

    async with connect(echo, settings=SETTINGS) as client:
        for number in range(100):
            autojump_clock.jump(60)  # as a handler that computes for a minute, or a SIGSTOP, would
            await trio.sleep(0.7)
            await client.send(str(number))
            assert await client.receive() == str(number)
        start = trio.current_time()
        client.stall()  # and one that does not answer is found all the same
        await until(lambda: client.websocket.closed is not None)
        assert client.websocket.closed.code == 4000
        assert 10 <= trio.current_time() - start <= 25


async def test_a_peer_that_is_slow_because_the_loop_stood_still_is_not_stalled(autojump_clock: MockClock) -> None:
    async def handler(ws: WebSocket) -> None:
        while True:
            await ws.send(bytes(100_000))

    async with connect(handler, settings=SETTINGS) as client:
        for _ in range(50):
            await client.receive()
            autojump_clock.jump(60)
            await trio.sleep(0.7)
        assert client.websocket.closed is None
        client.stall()
        async with seconds(5, 5):
            await until(lambda: client.websocket.closed is not None)
        assert client.websocket.closed.code == 4001


async def test_the_silence_of_a_peer_is_counted_without_the_time_that_the_loop_stood_still(
    autojump_clock: MockClock,
) -> None:
    async with connect(iterate, settings=SETTINGS) as client:
        client.stall()
        for awake in (5, 8, 4):  # less than the interval and the timeout of a ping
            await trio.sleep(awake)
            assert client.websocket.closed is None
            autojump_clock.jump(60)
        await until(lambda: client.websocket.closed is not None)
        assert client.websocket.closed.code == 4000


async def test_a_stall_is_counted_without_the_time_that_the_loop_stood_still(autojump_clock: MockClock) -> None:
    async with connect(send_on, settings=SETTINGS) as client:
        client.stall()
        for awake in (1.5, 1):  # with a look that is late for each, less than the stall timeout
            await trio.sleep(awake)
            assert client.websocket.closed is None
            autojump_clock.jump(60)
        await until(lambda: client.websocket.closed is not None)
        assert client.websocket.closed.code == 4001
