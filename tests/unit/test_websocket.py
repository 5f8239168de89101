"""What a handler holds, on a transport that takes everything. The rest is on real sockets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tricorn import Accept, Disconnected, Request, ServerMetrics, Settings, WebSocket
from tricorn.connection import Connection, Traffic
from tricorn.protocol.close import Close
from tricorn.transport.keep_alive import Reaper


class Transport:
    """Notes what is sent, once there is room."""

    def __init__(self, *, full: bool = False) -> None:
        self.full = full
        self.has_room = trio.Event()
        self.sent: list[object] = []
        self.more: list[bool] = []

    def start(self, connection: Connection) -> None:
        pass

    def idle(self) -> None:
        pass

    def send(self, payloads: Any, *, text: bool, more: bool) -> bool:
        if not self.full:
            self.sent.extend((payload, text) for payload in payloads)
            self.more.append(more)
        return not self.full

    def send_fragment(self, payload: bytes, *, text: bool | None, last: bool) -> bool:
        if not self.full:
            self.sent.append((payload, text, last))
        return not self.full

    async def room(self) -> None:
        await self.has_room.wait()

    def make_room(self) -> None:
        self.full = False
        self.has_room.set()

    async def close(self, close: Close) -> None:
        await trio.lowlevel.checkpoint()

    async def flushed(self) -> None:
        await trio.lowlevel.checkpoint()

    def waiting(self) -> int:
        return 0

    def taken(self) -> object:
        return None

    def abort(self, close: Close | None = None) -> None:
        pass

    def traffic(self) -> Traffic:
        return Traffic(0, 0, None, None)


async def run(handler: Any, transport: Any = None, peer: tuple[str, int] | None = ("::1", 5)) -> Connection:
    """Run a handler of the connection and of what it holds."""
    request = Request("GET", "/x", "", "1.1", {}, peer)
    settings = Settings(close_timeout=2)
    connection = Connection(transport or Transport(), request, settings, ServerMetrics(), Reaper())

    async def handle(ws: WebSocket) -> None:
        await handler(connection, ws)

    await connection.run(handle, WebSocket(connection, Accept(subprotocol="a", state=[1])))
    return connection


@pytest.mark.parametrize(("peer", "shown"), [(("::1", 5), "::1:5"), (None, "a Unix socket")])
async def test_it_says_what_it_is(peer: tuple[str, int] | None, shown: str) -> None:
    seen: list[str] = []

    async def handler(connection: Connection, ws: WebSocket) -> None:
        assert (ws.id, ws.request) == (connection.id, connection.request)
        assert ws.nursery.cancel_scope is connection.nursery.cancel_scope
        assert (ws.state, ws.subprotocol) == ([1], "a")
        seen.append(repr(ws))

    connection = await run(handler, peer=peer)
    assert seen == [f"<WebSocket {connection.id} /x of {shown}, open>"]


async def test_its_context_is_made_when_it_is_wanted() -> None:
    async def handler(connection: Connection, ws: WebSocket) -> None:
        assert connection.context is None
        ws.context["user"] = "ann"
        assert ws.context is connection.context

    assert (await run(handler)).context == {"user": "ann"}


async def test_closed_says_why_it_is_over() -> None:
    kept: list[WebSocket] = []

    async def handler(connection: Connection, ws: WebSocket) -> None:
        kept.append(ws)
        connection.deliver(["last"])
        connection.end(Close(4321, "why"))
        assert ws.closed is None
        await ws.send("still possible")
        assert await ws.receive() == "last"
        assert ws.closed is None
        with pytest.raises(Disconnected) as caught, trio.CancelScope(shield=True):
            await ws.receive()
        assert (caught.value.code, caught.value.reason) == (4321, "why") == ws.closed

    await run(handler)
    with pytest.raises(Disconnected):
        await kept[0].send("late")
    with pytest.raises(Disconnected):
        await kept[0].send(["l", "ate"])
    with pytest.raises(Disconnected):
        await kept[0].ping()
    await kept[0].close(1000, "again")
    assert kept[0].closed == (4321, "why")


@pytest.mark.parametrize(("code", "reason"), [(1005, ""), (1006, ""), (999, ""), (5000, ""), (1000, "é" * 62)])
async def test_what_cannot_be_sent_as_a_close_frame(code: int, reason: str) -> None:
    async def handler(connection: Connection, ws: WebSocket) -> None:
        with pytest.raises(ValueError, match="close"):
            await ws.close(code, reason)

    assert (await run(handler)).cause == (1000, "")


async def count_turns(turns: list[None]) -> None:
    while True:
        turns.append(None)
        await trio.lowlevel.checkpoint()


async def test_the_first_send_behind_a_receive_does_not_yield() -> None:
    turns: list[None] = []

    async def handler(connection: Connection, ws: WebSocket) -> None:
        ws.nursery.start_soon(count_turns, turns)
        connection.deliver(["one", "two"])
        for _ in range(2):
            await ws.receive()
            before = len(turns)
            await ws.send("first")
            assert len(turns) == before
            await ws.send("second")
            await ws.send("third")  # in a turn of all tasks each has one, in any order
            assert len(turns) > before

    transport = Transport()
    await run(handler, transport)
    assert transport.sent == [(b"first", True), (b"second", True), (b"third", True)] * 2
    assert transport.more == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("takes", "in_a_row"), [(0, 17), (0.0001, 17), (0.001, 5), (0.003, 5), (0.1, 5)])
async def test_others_have_their_turn_while_messages_wait(mock_clock: MockClock, takes: float, in_a_row: int) -> None:
    """Every few milliseconds, but for the first turn of a slow handler, or behind each message."""

    async def handler(connection: Connection, ws: WebSocket) -> None:
        turns: list[None] = []
        ws.nursery.start_soon(count_turns, turns)
        connection.deliver(["x"] * 1000)
        seen: list[int] = []
        for _ in range(1000):
            await ws.receive()
            mock_clock.jump(takes)
            await ws.send("y")
            seen.append(len(turns))
        # In a turn of all tasks each has one, in any order: at worst first in one and last in the next.
        counts = Counter(seen)
        assert max(counts.values()) <= 2 * in_a_row
        later = [counts[turn] for turn in sorted(counts)[3:]]
        assert max(later) * takes <= max(0.010, 2 * takes)

    assert (await run(handler)).cause == (1000, "")


@pytest.mark.parametrize("send", ["send", "send_texts", "fragments", "ping"])
async def test_a_task_that_is_cancelled_sends_nothing(send: str) -> None:
    """Also when another task of the connection has just received, so that its own send need not yield."""

    async def handler(connection: Connection, ws: WebSocket) -> None:
        connection.deliver(["one", "two"])
        await ws.receive()
        with trio.CancelScope() as scope:
            scope.cancel()
            if send == "send":
                await ws.send("no")
            elif send == "send_texts":
                await ws.send_texts([b"no"])
            elif send == "fragments":
                await ws.send(["n", "o"])
            else:
                await ws.ping()
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await ws.receive()
        assert scope.cancelled_caught
        await ws.send("yes")
        assert await ws.receive() == "two"

    transport = Transport()
    assert (await run(handler, transport)).cause == (1000, "")
    assert transport.sent == [(b"yes", True)]


async def test_a_fragment_is_asked_for_before_the_one_in_front_of_it_is_sent() -> None:
    def message() -> Iterator[bytes]:
        for number in range(3):
            seen.append(len(transport.sent))
            yield bytes([number])
        seen.append(len(transport.sent))

    async def handler(connection: Connection, ws: WebSocket) -> None:
        await ws.send(message())

    transport, seen = Transport(), []
    await run(handler, transport)
    assert transport.sent == [(b"\0", False, False), (b"\1", None, False), (b"\2", None, True)]
    assert seen == [0, 0, 1, 2]


async def test_who_waits_for_room_goes_in_order_and_is_counted() -> None:
    async def handler(connection: Connection, ws: WebSocket) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(ws.send_texts, [str(number).encode()])
                await wait_all_tasks_blocked()
            assert transport.sent == []
            transport.make_room()
            nursery.start_soon(ws.send, "last")

    transport = Transport(full=True)
    connection = await run(handler, transport)
    assert transport.sent == [(str(number).encode(), True) for number in range(5)] + [(b"last", True)]
    assert connection._metrics.send_stalls.values[""] == 6


async def test_who_is_cancelled_while_it_waits_sends_nothing_and_holds_nobody_up() -> None:
    async def cancelled(ws: WebSocket, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            task_status.started(scope)
            await ws.send("cancelled")

    async def handler(connection: Connection, ws: WebSocket) -> None:
        async with trio.open_nursery() as nursery:
            scopes = []
            for _ in range(2):  # one has its turn, the other waits for it
                scopes.append(await nursery.start(cancelled, ws))
                await wait_all_tasks_blocked()
            nursery.start_soon(ws.send, "sent")
            await wait_all_tasks_blocked()
            for scope in scopes:
                scope.cancel()
            await wait_all_tasks_blocked()
            transport.make_room()

    transport = Transport(full=True)
    await run(handler, transport)
    assert transport.sent == [(b"sent", True)]
