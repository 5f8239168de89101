"""`tricorn.testing`: what a client in memory and its handler see of each other, and of the connection's end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from trio._core import _run as scheduler
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.exceptions import NegotiationError

import tricorn
from fixtures.clock import seconds
from fixtures.handlers import echo
from tricorn import Accept, Close, Disconnected, Refuse, Request, Settings, WebSocket
from tricorn.testing import READ_AHEAD, Connect, connect, open_clients
from tricorn.transport.memory import CAPACITY
from tricorn.transport.native import NativeTransport

HOUR = 3600
SILENT = Settings(ping_interval=inf)  # no pings

Records = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    """Returns the records of one severity since the last call."""

    def read(severity: str) -> list[dict[str, Any]]:
        lines = map(json.loads, capfd.readouterr().err.splitlines())
        return [record for record in lines if record["severity"] == severity]

    return read


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a descriptor open."""
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


async def sleep(ws: WebSocket) -> None:
    await trio.sleep_forever()


async def fail(ws: WebSocket) -> None:
    await ws.receive()
    raise ValueError("no")


async def ends(client: tricorn.testing.Client) -> tuple[int, str]:
    """Receive until the connection is over, and return its code and reason."""
    async for _ in client:
        pass
    with pytest.raises(Disconnected) as caught:
        await client.receive()
    assert client.closed == (caught.value.code, caught.value.reason)
    return caught.value.code, caught.value.reason


# Messages


@pytest.mark.parametrize("deflate", ["off", "takeover", "no-takeover"])
async def test_a_message_of_each_kind_and_size_is_echoed(deflate: Any, records: Records) -> None:
    messages: list[str | bytes] = ["text", b"\0\xff", "", b"", "é" * 100_000, bytes(5 * CAPACITY)]
    async with connect(echo, settings=Settings(deflate=deflate)) as client:
        for message in messages:
            await client.send(message)
            assert await client.receive() == message
    [end] = records("INFO")
    assert (end["bytes_sent"] < 10_000) is (deflate != "off")


async def test_messages_arrive_in_order_while_both_sides_send() -> None:
    messages = [f"{number} {'x' * 1000}" for number in range(1000)]

    async def send_all(client: tricorn.testing.Client) -> None:
        for message in messages:
            await client.send(message)

    async with connect(echo) as client, trio.open_nursery() as nursery:
        nursery.start_soon(send_all, client)
        assert [await client.receive() for _ in messages] == messages


@pytest.mark.parametrize("deflate", ["off", "takeover"])
@pytest.mark.parametrize("fragments", [("é", "", "x" * 70_000), (b"\0", b"\1"), ("one",)])
async def test_a_fragmented_message_arrives_whole(deflate: Any, fragments: Any) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send(iter(fragments))

    async with connect(handler, settings=Settings(deflate=deflate)) as client:
        assert await client.receive() == type(fragments[0])().join(fragments)


async def test_a_broadcast_reaches_every_client(tricorn_connect: Connect) -> None:
    members: set[WebSocket] = set()

    async def room(ws: WebSocket) -> None:
        members.add(ws)
        async for message in ws:
            assert tricorn.broadcast(members, message) == []

    clients = [await tricorn_connect(room) for _ in range(3)]
    await wait_all_tasks_blocked()
    assert members == {client.websocket for client in clients}
    await clients[0].send("hello")
    assert [await client.receive() for client in clients] == ["hello"] * 3


async def test_iteration_gives_all_messages_and_ends_with_the_connection() -> None:
    async def handler(ws: WebSocket) -> None:
        for number in range(3):
            await ws.send(str(number))

    async with connect(handler) as client:
        assert [message async for message in client] == ["0", "1", "2"]
        assert client.closed == Close(1000)


async def test_a_receive_that_is_cancelled_loses_no_message(autojump_clock: MockClock) -> None:
    async def handler(ws: WebSocket) -> None:
        await trio.sleep(2)
        await ws.send("late")

    async with connect(handler) as client:
        with trio.move_on_after(1):
            await client.receive()
        assert trio.current_time() == 1
        assert await client.receive() == "late"


async def test_each_method_checks_for_cancellation() -> None:
    async with connect(echo) as client:
        await client.send("here")
        await wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.receive()
        assert scope.cancelled_caught
        assert await client.receive() == "here"
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.send("never sent")
        assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        async with connect(echo):
            raise AssertionError
    assert scope.cancelled_caught


# Backpressure


async def test_a_handler_waits_for_a_client_that_does_not_receive() -> None:
    sent: list[int] = []

    async def flood(ws: WebSocket) -> None:
        for number in range(1000):
            await ws.send(number.to_bytes(1000, "big"))
            sent.append(number)

    async with connect(flood) as client:
        await wait_all_tasks_blocked()
        held = len(sent) * 1000
        assert READ_AHEAD + CAPACITY < held < 2 * READ_AHEAD + CAPACITY + 70_000
        assert [int.from_bytes(message, "big") async for message in client if isinstance(message, bytes)] == sent
    assert len(sent) == 1000


async def test_a_stalled_client_holds_less(autojump_clock: MockClock) -> None:
    sent: list[int] = []

    async def flood(ws: WebSocket) -> None:
        while True:
            await ws.send(bytes(1000))
            sent.append(1000)

    async with connect(flood, settings=Settings(stall_timeout=6)) as client:
        client.stall()
        await trio.sleep(5)
        assert sum(sent) < CAPACITY + 70_000
        await client.receive()  # goes on
        await trio.sleep(5)
        assert client.websocket.closed is None


async def test_a_handler_waits_when_the_wire_is_exactly_full(autojump_clock: MockClock) -> None:
    sent: list[float] = []

    async def handler(ws: WebSocket) -> None:
        await ws.receive()
        for _ in range(3):
            await ws.send(bytes(CAPACITY - 4))  # and the head of its frame
            sent.append(trio.current_time())

    async with connect(handler) as client:
        await client.send("go")
        client.stall()
        await trio.sleep(5)
        assert [len(message) async for message in client] == [CAPACITY - 4] * 3
    assert sent == [0, 0, 5]


async def test_a_client_waits_for_a_handler_that_is_busy(autojump_clock: MockClock) -> None:
    async def busy(ws: WebSocket) -> None:
        await trio.sleep(5)
        async for _ in ws:
            pass

    async with connect(busy) as client, seconds(5):
        for _ in range(10):
            await client.send(bytes(CAPACITY))


async def test_a_send_that_is_cancelled_while_it_waits_is_sent_all_the_same(autojump_clock: MockClock) -> None:
    got: list[int] = []

    async def busy(ws: WebSocket) -> None:
        await trio.sleep(5)
        async for message in ws:
            got.append(len(message))

    async with connect(busy) as client:
        await client.send(bytes(2 * CAPACITY))
        with trio.move_on_after(1) as scope:
            await client.send(bytes(3 * CAPACITY))
        assert scope.cancelled_caught
        await client.send("x")
    assert got == [2 * CAPACITY, 3 * CAPACITY, 1]


# The end


async def test_the_client_closes() -> None:
    seen: list[object] = []

    async def handler(ws: WebSocket) -> None:
        with pytest.raises(Disconnected) as caught:
            await ws.receive()
        seen.extend([caught.value.code, caught.value.reason])

    async with connect(handler) as client:
        assert client.closed is None
        assert await client.close(4321, "bye") == 4321
        assert client.closed == client.websocket.closed == Close(4321, "bye")
        assert await client.close() == 4321  # again
    assert seen == [4321, "bye"]


async def test_a_close_that_is_cancelled_closes_all_the_same() -> None:
    async with connect(echo) as client:
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.close(3000)
        assert await ends(client) == (3000, "")


async def test_messages_before_the_end_are_received_after_closing() -> None:
    async with connect(echo) as client:
        await client.send("one")
        assert await client.close() == 1000
        assert await client.receive() == "one"
        assert await ends(client) == (1000, "")


async def test_the_handler_closes() -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send("last")
        await ws.close(4321, "enough")

    async with connect(handler) as client:
        assert await client.receive() == "last"
        assert await ends(client) == (4321, "enough")
        with pytest.raises(Disconnected, match="4321 enough"):
            await client.send("too late")
        assert await client.close() == 4321


async def test_the_test_closes_from_the_server() -> None:
    async with connect(sleep) as client:
        await client.websocket.close(4000, "x")
        assert client.closed == (4000, "x")


async def test_a_client_that_sends_into_the_closing_handshake_is_told_the_end(autojump_clock: MockClock) -> None:
    async def handler(ws: WebSocket) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)

    async with connect(handler) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.close, 3000)
        await wait_all_tasks_blocked()
        async with seconds(1):
            with pytest.raises(Disconnected, match="3000"):
                await client.send("x")


async def test_a_message_that_is_too_big_ends_the_connection_at_once(autojump_clock: MockClock) -> None:
    async with seconds(0), connect(echo, settings=Settings(max_message_bytes=1000)) as client:
        await client.send("x" * 1001)
        assert (await ends(client))[0] == 1009


async def test_a_client_that_vanishes_is_1006_on_both_sides() -> None:
    got: list[object] = []

    async def handler(ws: WebSocket) -> None:
        got.append(await ws.receive())
        got.append(await ws.receive())
        await ws.send("never received")
        with pytest.raises(Disconnected) as caught:
            await ws.receive()
        got.append(caught.value.code)

    async with connect(handler) as client:
        await client.send("one")
        await client.send("two")
        await wait_all_tasks_blocked()
        client.vanish()
        with pytest.raises(Disconnected, match="1006"):
            await client.receive()
        assert client.closed == Close(1006)
        with pytest.raises(Disconnected, match="1006"):
            await client.send("x")
        assert await client.close() == 1006
    assert got == ["one", "two", 1006]


async def test_a_handler_that_sends_right_after_its_client_vanished_receives_what_came_before(
    records: Records,
) -> None:
    got: list[object] = []
    sent = trio.Event()

    async def handler(ws: WebSocket) -> None:
        await sent.wait()
        client.vanish()
        await ws.send("to nobody")
        got.extend([message async for message in ws])

    async with connect(handler) as client:
        await client.send("one")
        await client.send("two")
        sent.set()
        await wait_all_tasks_blocked()
    assert got == ["one", "two"]
    [end] = records("INFO")
    assert (end["code"], end["bytes_sent"]) == (1006, 0)


async def test_a_client_that_vanishes_ends_what_waits_for_it() -> None:
    async def flood(ws: WebSocket) -> None:
        while True:
            await ws.send(bytes(1000))

    async with connect(flood) as client:
        await wait_all_tasks_blocked()
        client.vanish()
    assert client.websocket.closed is not None
    assert client.websocket.closed.code == 1006


async def test_a_send_that_waits_ends_with_the_connection(autojump_clock: MockClock) -> None:
    async def handler(ws: WebSocket) -> None:
        await trio.sleep(1)
        await ws.close(4321)

    async with connect(handler) as client:
        await client.send(bytes(2 * CAPACITY))
        async with seconds(1):
            await client.send(bytes(2 * CAPACITY))
        assert await ends(client) == (4321, "")


async def test_the_handler_is_cancelled_when_the_client_goes() -> None:
    ended: list[str] = []

    async def beside() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append("beside")

    async def handler(ws: WebSocket) -> None:
        ws.nursery.start_soon(beside)
        try:
            await trio.sleep_forever()
        finally:
            ended.append("handler")

    async with connect(handler) as client:
        await wait_all_tasks_blocked()
        await client.close()
        assert sorted(ended) == ["beside", "handler"]


# Time


async def test_a_silent_client_stays_for_hours(autojump_clock: MockClock) -> None:
    async with connect(echo) as client:
        await trio.sleep(HOUR)
        await client.send("still here")
        assert await client.receive() == "still here"


async def test_a_stalled_client_answers_no_ping(autojump_clock: MockClock) -> None:
    settings = Settings(ping_interval=8, ping_timeout=4, stall_timeout=100)
    async with connect(sleep, settings=settings) as client:
        client.stall()
        await trio.sleep(8 + 4 - 0.1)
        assert client.websocket.closed is None
        await trio.sleep(2)
        assert client.websocket.closed == (4000, "no pong")
        assert client.closed is None
        assert await ends(client) == (4000, "no pong")


async def test_the_latency_of_a_ping(autojump_clock: MockClock) -> None:
    latencies: list[float] = []

    async def handler(ws: WebSocket) -> None:
        await ws.receive()
        latencies.append(await ws.ping())

    async with connect(handler, settings=SILENT) as client:
        await client.send("now")
        client.stall()
        await trio.sleep(3)
        assert await ends(client) == (1000, "")
    assert latencies == [3]


async def test_a_stalled_client_is_given_up(autojump_clock: MockClock) -> None:
    async def flood(ws: WebSocket) -> None:
        while True:
            await ws.send(bytes(9 * CAPACITY))

    async with connect(flood, settings=Settings(stall_timeout=8, ping_interval=inf)) as client:
        client.stall()
        await trio.sleep(8 - 0.1)
        assert client.websocket.closed is None
        await trio.sleep(2 + 0.2)
        assert client.websocket.closed == (4001, "the peer stopped reading")
        assert await ends(client) == (1006, "")


async def test_a_stalled_client_does_not_answer_a_close_frame(autojump_clock: MockClock) -> None:
    async with connect(sleep, settings=Settings(close_timeout=3)) as client:
        client.stall()
        async with seconds(3):
            await client.websocket.close(4321)
        assert await ends(client) == (4321, "")


async def test_a_handler_that_was_told_has_close_timeout(autojump_clock: MockClock) -> None:
    async def handler(ws: WebSocket) -> None:
        await trio.sleep(1)
        await ws.receive()
        await trio.sleep_forever()

    async with connect(handler, settings=Settings(close_timeout=3)) as client:
        await client.send("unread")
        await wait_all_tasks_blocked()
        async with seconds(3):
            await client.close()


# The handshake


async def test_what_the_handler_knows_of_the_request() -> None:
    headers = {"X-Name": "Ann", "Host": "example.org", "Origin": "https://example.org"}
    async with connect(echo, "/room?a=b%20c", headers=headers, peer=("::1", 5)) as client:
        request = client.websocket.request
        assert (request.method, request.path, request.query, request.peer) == ("GET", "/room", "a=b%20c", ("::1", 5))
        assert {name: request.headers[name.lower()] for name in headers} == headers
        assert client.subprotocol is client.websocket.subprotocol is client.websocket.state is None
    async with connect(echo, peer=None) as client:
        assert client.websocket.request.peer is None


async def test_handlers_by_path() -> None:
    async with connect({"/a": sleep, "/echo": echo}, "/echo") as client:
        await client.send("x")
        assert await client.receive() == "x"
    with pytest.raises(Refuse, match="no WebSocket at /b") as caught:
        async with connect({"/a": sleep}, "/b"):
            raise AssertionError
    assert caught.value.status == 404


async def test_subprotocols() -> None:
    async with connect(echo, subprotocols=["one", "two"]) as client:
        assert client.subprotocol == client.websocket.subprotocol == "one"


async def test_a_hook_that_accepts() -> None:
    async def hook(request: Request) -> Accept:
        await trio.lowlevel.checkpoint()
        return Accept("two", {"X-Seen": "yes"}, request.headers["x-name"])

    options: Any = {"subprotocols": ["one", "two"], "headers": {"X-Name": "Ann"}}
    async with connect(echo, before_upgrade=hook, **options) as client:
        assert (client.subprotocol, client.websocket.state) == ("two", "Ann")


async def test_a_hook_that_accepts_what_the_client_does_not_know() -> None:
    async def hook(request: Request) -> Accept:
        return Accept("two")

    with pytest.raises(NegotiationError):
        async with connect(echo, before_upgrade=hook, headers={"Sec-WebSocket-Protocol": "two"}):
            raise AssertionError


@pytest.mark.parametrize("raises", [False, True])
async def test_a_hook_that_refuses(raises: bool) -> None:
    async def hook(request: Request) -> Refuse:
        if raises:
            raise Refuse(401, "who are you?", {"WWW-Authenticate": "Bearer"})
        return Refuse(401, "who are you?", {"WWW-Authenticate": "Bearer"})

    with pytest.raises(Refuse) as caught:
        async with connect(echo, before_upgrade=hook):
            raise AssertionError
    refused = caught.value
    assert (refused.status, refused.body, refused.headers) == (401, "who are you?", {"WWW-Authenticate": "Bearer"})


async def test_a_hook_that_fails(records: Records) -> None:
    async def hook(request: Request) -> Accept:
        raise ValueError("no")

    with pytest.raises(Refuse) as caught:
        async with connect(echo, before_upgrade=hook):
            raise AssertionError
    [error] = records("ERROR")
    assert (caught.value.status, caught.value.body) == (500, f"internal server error {error['error_id']}")


async def test_a_hook_that_is_late(autojump_clock: MockClock) -> None:
    async def hook(request: Request) -> Accept:
        await trio.sleep_forever()
        raise AssertionError

    async with seconds(7):
        with pytest.raises(Refuse) as caught:
            async with connect(echo, before_upgrade=hook, settings=Settings(handshake_timeout=7)):
                raise AssertionError
    assert caught.value.status == 503


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://else.where"}, 403),
        ({"Host": "a b"}, 400),
        ({"Sec-WebSocket-Version": "12"}, 426),
        ({"Sec-WebSocket-Extensions": "?"}, 400),
        ({"X-Long": "x" * 20_000}, 431),
    ],
)
async def test_requests_that_the_server_refuses(headers: dict[str, str], status: int) -> None:
    with pytest.raises(Refuse) as caught:
        async with connect(echo, headers=headers):
            raise AssertionError
    assert caught.value.status == status


# A handler that fails


async def test_receive_tells_what_the_handler_raised(records: Records) -> None:
    async with connect(fail) as client:
        await client.send("x")
        with pytest.raises(Disconnected) as caught:
            await client.receive()
        assert pytest.RaisesGroup(ValueError).matches(caught.value.__cause__)
        with pytest.raises(Disconnected) as again:
            await client.receive()
        assert again.value.__cause__ is None
    [error] = records("ERROR")
    assert (caught.value.code, caught.value.reason) == (1011, error["error_id"])


async def test_send_tells_what_the_handler_raised() -> None:
    async with connect(fail) as client:
        await client.send("x")
        await wait_all_tasks_blocked()
        with pytest.raises(Disconnected) as caught:
            await client.send("y")
        assert pytest.RaisesGroup(ValueError).matches(caught.value.__cause__)


async def test_the_block_raises_what_the_handler_raised_if_nothing_told() -> None:
    with pytest.RaisesGroup(ValueError):
        async with connect(fail) as client:
            await client.send("x")
    with pytest.RaisesGroup(ValueError):
        async with connect(fail) as client:
            await client.send("x")
            assert [message async for message in client] == []
    with pytest.RaisesGroup(ValueError):
        async with connect(fail) as client:
            await client.send("x")
            await wait_all_tasks_blocked()
            assert await client.close() == 1011


async def test_a_task_in_the_nursery_that_fails() -> None:
    async def handler(ws: WebSocket) -> None:
        ws.nursery.start_soon(fail, ws)
        await trio.sleep_forever()

    with pytest.RaisesGroup(ValueError):
        async with connect(handler) as client:
            await client.send("x")


async def test_a_disconnected_that_a_handler_lets_go_is_no_failure() -> None:
    async def handler(ws: WebSocket) -> None:
        while True:
            await ws.receive()

    async with connect(handler):
        pass


async def test_system_exit_fails_the_handler_and_nothing_else(records: Records) -> None:
    async def handler(ws: WebSocket) -> None:
        raise SystemExit(3)

    async with connect(handler) as client:
        with pytest.raises(Disconnected) as told:
            await client.receive()
    assert told.value.code == 1011
    assert isinstance(told.value.__cause__, BaseExceptionGroup)
    assert isinstance(told.value.__cause__.exceptions[0], SystemExit)
    assert [error["error_id"] for error in records("ERROR")] == [told.value.reason]


async def test_a_bug_in_the_transport_ends_the_connection(monkeypatch: pytest.MonkeyPatch, records: Records) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("a bug")

    async with connect(echo) as client:
        monkeypatch.setattr(NativeTransport, "readable", broken)
        await client.send("x")
        code, error_id = await ends(client)
    assert (code, [error["error_id"] for error in records("ERROR")]) == (1011, [error_id])


# Leaving the block


@pytest.mark.parametrize("handler", [echo, fail])
@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt()])
async def test_what_the_block_raises_is_in_no_group_and_hides_what_the_handler_raised(
    handler: Any, error: BaseException
) -> None:
    async def block() -> None:
        async with connect(handler) as client:
            await client.send("x")
            raise error

    with pytest.raises(type(error)) as caught:
        await block()
    assert caught.value is error


@pytest.mark.parametrize("state", ["open", "unread", "slow", "closed", "closing", "vanished", "stalled", "refused"])
async def test_leaving_the_block_ends_everything(state: str, autojump_clock: MockClock) -> None:
    ended: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        try:
            if state == "slow":
                await ws.send(bytes(9 * CAPACITY))
            await echo(ws)
        finally:
            ended.append(ws)

    tasks = trio.lowlevel.current_statistics().tasks_living
    async with seconds(0), connect(handler) as client:
        if state == "unread":
            await client.send("x")
        elif state == "slow":
            await wait_all_tasks_blocked()
        elif state == "closed":
            await client.close()
        elif state == "closing":
            with trio.CancelScope() as scope:
                scope.cancel()
                await client.close()
        elif state == "vanished":
            client.vanish()
        elif state == "stalled":
            client.stall()
    assert ended == [client.websocket]
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert client.closed == (Close(1006) if state == "vanished" else Close(1000))


async def test_a_block_that_is_cancelled_closes_with_1012_and_leaves_nothing(autojump_clock: MockClock) -> None:
    tasks = trio.lowlevel.current_statistics().tasks_living
    for moment in range(20):  # ticks of the scheduler
        with trio.CancelScope() as scope:
            async with seconds(0), connect(sleep) as client:
                for _ in range(moment):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert client.closed == client.websocket.closed == Close(1012)
        assert trio.lowlevel.current_statistics().tasks_living == tasks


async def test_a_cancelled_block_waits_for_the_handlers_cleanup(autojump_clock: MockClock) -> None:
    async def handler(ws: WebSocket) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)

    async with seconds(6):
        with trio.move_on_after(5):
            async with connect(handler):
                await trio.sleep_forever()


# Many


async def test_a_thousand_clients_at_once(tricorn_connect: Connect) -> None:
    clients = [await tricorn_connect(echo) for _ in range(1000)]
    for number, client in enumerate(clients):
        await client.send(str(number))
    assert [await client.receive() for client in clients] == [str(number) for number in range(1000)]


async def test_clients_without_nesting_end_with_the_block() -> None:
    tasks = trio.lowlevel.current_statistics().tasks_living
    async with open_clients() as connect_one:
        one, other = await connect_one(echo), await connect_one({"/x": echo}, "/x", headers={"X-Name": "Ann"})
        assert await one.close(3000) == 3000
        with pytest.raises(Refuse):
            await connect_one({"/x": echo})
    assert (one.closed, other.closed) == (Close(3000), Close(1000))
    assert trio.lowlevel.current_statistics().tasks_living == tasks


# Determinism


def test_the_same_seed_gives_the_same_course_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> list[object]:
        events: list[object] = []

        async def handler(ws: WebSocket) -> None:
            async for message in ws:
                events.append(("got", ws.request.path, message, trio.current_time()))
                tricorn.broadcast({client.websocket for client in clients}, message)

        async def talk(client: tricorn.testing.Client) -> None:
            for number in range(5):
                await client.send(str(number))
                events.append(("heard", await client.receive(), trio.current_time()))
                await trio.sleep(1)
            client.stall() if client is clients[0] else client.vanish()

        async with open_clients() as connect_one:
            clients = [await connect_one(handler, f"/{number}") for number in range(5)]
            async with trio.open_nursery() as nursery:
                for client in clients:
                    nursery.start_soon(talk, client)
            await trio.sleep(100)
            events.extend(client.websocket.closed for client in clients)
        return events

    def run(seed: int) -> list[object]:
        monkeypatch.setattr(scheduler, "_r", Random(seed))
        return trio.run(main, clock=MockClock(autojump_threshold=0))

    monkeypatch.setattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    first = run(1)
    assert all(run(1) == first for _ in range(50))
    assert any(run(seed) != first for seed in range(2, 10))


# The plugin


def test_the_plugin_imports_no_tricorn() -> None:
    code = "import pytest_tricorn, sys; sys.exit('tricorn' in sys.modules or 'trio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_handler_that_fails_fails_the_test_that_uses_the_fixture(tmp_path: Path) -> None:
    tmp_path.joinpath("test_it.py").write_text(
        "import pytest\n"
        "async def fail(ws):\n"
        "    raise ValueError('found me')\n"
        "@pytest.mark.trio\n"
        "async def test_it(tricorn_connect):\n"
        "    await tricorn_connect(fail)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "pytest_tricorn", "-p", "no:cacheprovider", "-q", "test_it.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "ValueError: found me" in result.stdout
    assert "1 failed" in result.stdout or "1 error" in result.stdout
