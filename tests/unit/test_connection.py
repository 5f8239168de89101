"""How a connection ends, on a transport that does nothing: phases, causes, the record. The rest is on real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tricorn import Accept, Disconnected, Request, ServerMetrics, Settings, WebSocket
from tricorn.connection import Connection, Traffic
from tricorn.protocol.close import Close
from tricorn.protocol.phase import Phase
from tricorn.transport.keep_alive import Reaper

TRACE = "0af7651916cd43dd8448eb211c80319c"

Records = Callable[[], list[dict[str, Any]]]


class Transport:
    """Takes everything at once."""

    def __init__(self, bytes_received: int = 0, close_received: int | None = None) -> None:
        self.seen = Traffic(bytes_received, 0, close_received, None)
        self.steps: list[object] = []
        self.unconfirmed = 0

    def start(self, connection: Connection) -> None:
        self.steps.append("start")

    def idle(self) -> None:
        pass

    def send(self, payloads: Any, *, text: bool, more: bool) -> bool:
        self.seen = self.seen._replace(bytes_sent=self.seen.bytes_sent + sum(map(len, payloads)))
        return True

    async def close(self, close: Close) -> None:
        self.steps.append(close)
        self.seen = self.seen._replace(close_sent=close.code)

    async def flushed(self) -> None:
        await trio.lowlevel.checkpoint()

    def waiting(self) -> int:
        return self.unconfirmed

    def taken(self) -> object:
        return -self.unconfirmed

    def abort(self, close: Close | None = None) -> None:
        self.steps.append("abort")

    def traffic(self) -> Traffic:
        return self.seen


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    """Returns what was reported since the last call."""
    return lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]


Handler = Callable[[Connection, WebSocket], Awaitable[None]]


def connection(transport: Any, headers: dict[str, str] | None = None) -> Connection:
    request = Request("GET", "/x", "", "1.1", headers or {}, ("::1", 5))
    settings = Settings(close_timeout=2, stall_timeout=20)
    return Connection(transport, request, settings, ServerMetrics(), Reaper())


async def run(connection: Connection, handler: Handler) -> None:
    async def handle(ws: WebSocket) -> None:
        await handler(connection, ws)

    await connection.run(handle, WebSocket(connection, Accept()))


async def test_the_record_of_an_end(records: Records, autojump_clock: MockClock) -> None:
    async def handler(connection: Connection, ws: WebSocket) -> None:
        ws.context["user"] = "ann"
        await ws.send("four")
        connection.deliver(["one", "two"])
        await ws.receive()
        await trio.sleep(1.5)

    transport = Transport(bytes_received=14, close_received=1000)
    ended = connection(transport, {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
    await run(ended, handler)
    assert transport.steps == ["start", Close(1000), "abort"]
    assert records() == [
        {
            "severity": "INFO",
            "message": "connection closed",
            "connection": ended.id,
            "peer": ["::1", 5],
            "path": "/x",
            "logging.googleapis.com/trace": TRACE,
            "context": {"user": "ann"},
            "phase": "open",
            "code": 1000,
            "reason": "",
            "close_sent": 1000,
            "close_received": 1000,
            "seconds": 1.5,
            "messages_received": 2,
            "messages_sent": 1,
            "bytes_received": 14,
            "bytes_sent": 4,
        }
    ]


async def test_an_error_has_the_context_of_its_connection(records: Records) -> None:
    async def handler(connection: Connection, ws: WebSocket) -> None:
        raise ValueError("x")

    transport = Transport()
    ended = connection(transport, {"x-cloud-trace-context": f"{TRACE}/1"})
    await run(ended, handler)
    error, end = records()
    assert (error["message"], error["connection"], error["peer"]) == ("ValueError: x", ended.id, ["::1", 5])
    assert (error["phase"], error["logging.googleapis.com/trace"]) == ("open", TRACE)
    assert (end["severity"], end["code"], end["reason"]) == ("WARNING", 1011, error["error_id"])
    assert end["error_id"] == error["error_id"]
    assert transport.steps[1] == Close(1011, error["error_id"])


@pytest.mark.parametrize(
    ("code", "severity"),
    [
        *[(code, "INFO") for code in (1000, 1001, 1005, 1006, 1012, 4000, 4001, 4321)],
        *[(code, "WARNING") for code in (1002, 1007, 1009, 1011)],
    ],
)
async def test_the_severity_of_an_end(records: Records, code: int, severity: str) -> None:
    async def handler(connection: Connection, ws: WebSocket) -> None:
        connection.end(Close(code, "why"))
        await trio.sleep_forever()

    await run(connection(Transport()), handler)
    [record] = records()
    assert (record["severity"], record["code"], record["reason"]) == (severity, code, "why")


async def test_the_first_cause_counts_and_later_ones_are_notes(records: Records) -> None:
    async def handler(connection: Connection, ws: WebSocket) -> None:
        connection.end(Close(4321, "first"))
        connection.end(Close(1001))
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("third")

    transport = Transport()
    await run(connection(transport), handler)
    error, end = records()
    assert error["code"] == 4321
    assert (end["code"], end["reason"]) == (4321, "first")
    assert end["notes"] == f"1001; 1011 {error['error_id']}"
    assert end["error_id"] == error["error_id"]
    assert transport.steps[1] == Close(4321, "first")


async def test_notes_are_bounded(records: Records) -> None:
    async def handler(connection: Connection, ws: WebSocket) -> None:
        for code in range(4000, 5000):
            connection.end(Close(code))
        await trio.sleep_forever()

    await run(connection(Transport()), handler)
    [end] = records()
    assert end["notes"].split("; ") == [str(code) for code in range(4001, 4011)]


async def test_a_handler_that_returns_after_its_peer_went_is_no_cause(records: Records) -> None:
    async def handler(connection: Connection, ws: WebSocket) -> None:
        connection.end(Close(1001, "bye"))
        with pytest.raises(Disconnected), trio.CancelScope(shield=True):
            await ws.receive()

    await run(connection(Transport()), handler)
    [end] = records()
    assert (end["code"], "notes" in end) == (1001, False)


async def test_what_fails_in_the_host_ends_the_connection(records: Records) -> None:
    async def handler(connection: Connection, ws: WebSocket) -> None:
        connection.fail(MemoryError())
        await trio.sleep_forever()

    await run(connection(Transport()), handler)
    error, end = records()
    assert error["message"] == "MemoryError"
    assert (end["code"], end["reason"], end["error_id"]) == (1011, error["error_id"], error["error_id"])
    assert "notes" not in end


async def test_a_transport_that_fails_in_closing_is_aborted_all_the_same(records: Records) -> None:
    class Broken(Transport):
        async def close(self, close: Close) -> None:
            raise RuntimeError("a bug")

    async def handler(connection: Connection, ws: WebSocket) -> None:
        raise ValueError("first")

    transport = Broken()
    await run(connection(transport), handler)
    first, second, end = records()
    assert (first["message"], second["message"]) == ("ValueError: first", "RuntimeError: a bug")
    assert second["phase"] == "closing"
    assert (end["code"], end["error_id"]) == (1011, first["error_id"])
    assert transport.steps == ["start", "abort"]


async def test_a_refused_transition_is_reported_and_hides_nothing(records: Records) -> None:
    """With a bug of ours that has the connection in the wrong phase, the first error comes first, and all ends."""

    async def handler(connection: Connection, ws: WebSocket) -> None:
        connection.phase = Phase.CLOSED
        raise ValueError("first")

    transport = Transport()
    ended = connection(transport)
    await run(ended, handler)
    first, refused, end = records()
    assert first["message"] == "ValueError: first"
    assert refused["message"] == "IllegalMove: a connection cannot go from closed to closing"
    assert (end["message"], end["code"], end["error_id"]) == ("connection closed", 1011, first["error_id"])
    assert transport.steps == ["start", Close(1011, first["error_id"]), "abort"]


async def test_a_refused_transition_says_what_led_to_it(records: Records) -> None:
    """What ends the program passes through, and what is wrong with the phase is found on the way."""

    async def handler(connection: Connection, ws: WebSocket) -> None:
        connection.phase = Phase.CLOSED
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await run(connection(Transport()), handler)
    refused, _ = records()
    assert "cannot go from closed to closing" in refused["message"]
    assert "KeyboardInterrupt" in refused["stack_trace"]


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), asyncio.CancelledError()], ids=repr)
async def test_what_is_no_exception_fails_one_connection(records: Records, error: BaseException) -> None:
    async def handler(connection: Connection, ws: WebSocket) -> None:
        raise error

    transport = Transport()
    await run(connection(transport), handler)
    failure, end = records()
    assert failure["message"].startswith(type(error).__name__)
    assert (end["code"], end["reason"], end["error_id"]) == (1011, failure["error_id"], failure["error_id"])
    assert transport.steps[1] == Close(1011, failure["error_id"])


async def test_a_connection_that_has_ended_does_not_begin_again(records: Records) -> None:
    ran: list[WebSocket] = []

    async def handler(connection: Connection, ws: WebSocket) -> None:
        ran.append(ws)

    ended = connection(Transport())
    await run(ended, handler)
    records()
    await run(ended, handler)
    assert len(ran) == 1
    messages = [record["message"] for record in records()]
    assert messages[0] == "IllegalMove: a connection cannot go from closed to open"
