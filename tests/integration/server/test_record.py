"""The record that a connection leaves, with what really went over the wire."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tricorn import Settings, WebSocket

Served = Callable[..., AbstractAsyncContextManager[Any]]

SETTINGS = Settings(close_timeout=3, drain_timeout=10)


async def test_what_went_over_the_wire(
    hosted: Served, hides_codes: bool, patient_clock: MockClock, records: Any
) -> None:
    async def echo(ws: WebSocket) -> None:
        async for message in ws:
            await ws.send(message)

    async with hosted(echo) as server, server.connect() as client:
        await client.send("four", b"x" * 200)
        assert [await client.receive(), await client.receive()] == ["four", b"x" * 200]
        await client.close(1001, "bye")
        assert await client.closed() == (1001, "bye")
        await wait_all_tasks_blocked()
    [record] = records.read("INFO")
    assert (record["messages_received"], record["messages_sent"]) == (2, 2)
    if hides_codes:  # and frames
        assert (record["code"], record["reason"]) == (1006, "")
        assert not {"close_received", "close_sent"} & set(record)
        assert (record["bytes_received"], record["bytes_sent"]) == (4 + 200, 4 + 200)
        return
    assert (record["code"], record["reason"]) == (1001, "bye")
    assert (record["close_received"], record["close_sent"]) == (1001, 1001)
    # Headers of 2 bytes, 2 more for a length above 125, a mask of 4 on what a client sends.
    assert record["bytes_received"] == (6 + 4) + (8 + 200) + (6 + 2 + 3)
    assert record["bytes_sent"] == (2 + 4) + (4 + 200) + (2 + 2 + 3)


async def test_a_close_frame_that_did_not_get_out_was_not_sent(
    hosted: Served, hides_codes: bool, patient_clock: MockClock, records: Any
) -> None:
    async def flood(ws: WebSocket) -> None:
        await ws.send(bytes(2**24))
        await trio.sleep_forever()

    async with hosted(flood, settings=SETTINGS) as server, server.connect(receive_buffer=4096):
        await wait_all_tasks_blocked()
        server.scope.cancel()
        await trio.sleep(4)
    [record] = records.read("INFO")
    assert record["code"] == 1012
    assert "close_sent" not in record
    assert "close_received" not in record
    assert record["bytes_sent"] < 2**24
    assert hides_codes or record["bytes_sent"] > 0  # an application only knows of whole messages
