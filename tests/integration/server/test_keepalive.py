"""Keepalive: a silent peer is pinged and one that does not answer is given up, but nobody who is alive.

Time passes only when nothing else can happen. The server looks every 5 seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from math import inf
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.frames import Frame, Opcode

from fixtures.handlers import echo
from tricorn import Disconnected, Settings, WebSocket

Served = Callable[..., AbstractAsyncContextManager[Any]]

BIG = bytes(2**24)  # more than the kernel holds for a client that does not read
PING = Frame(Opcode.PING, b"")
SETTINGS = Settings(ping_interval=20, ping_timeout=20, stall_timeout=1000)


pytestmark = pytest.mark.not_asgi("pings are its own, and pongs are not told")


async def send_and_receive(ws: WebSocket) -> None:
    await ws.send(BIG)
    await ws.receive()


async def test_a_silent_peer_is_pinged(hosted: Served, patient_clock: MockClock) -> None:
    async with hosted(echo, settings=SETTINGS) as server, server.connect() as client:
        assert await client.frame() == PING
        assert 20 <= trio.current_time() <= 25


async def test_who_does_not_answer_is_given_up(hosted: Served, patient_clock: MockClock, records: Any) -> None:
    ends: list[Disconnected] = []

    async def handler(ws: WebSocket) -> None:
        try:
            await ws.receive()
        except Disconnected as end:
            ends.append(end)
            raise

    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        assert await client.frame(answer=False) == PING
        assert await client.closed(answer=False) == (4000, "no pong")
        assert 40 <= trio.current_time() <= 50 + SETTINGS.close_timeout
    assert [(end.code, end.reason) for end in ends] == [(4000, "no pong")]
    [record] = records.read("INFO")
    assert (record["code"], record["reason"]) == (4000, "no pong")


async def test_a_silent_peer_that_answers_stays(hosted: Served, patient_clock: MockClock) -> None:
    async with hosted(echo, settings=SETTINGS) as server, server.connect() as client:
        for _ in range(5):
            assert await client.frame() == PING
        assert trio.current_time() >= 100
        await client.send("still here")
        assert await client.receive() == "still here"


async def test_who_talks_is_not_pinged(hosted: Served, patient_clock: MockClock) -> None:
    async with hosted(echo, settings=SETTINGS) as server, server.connect() as client:
        for _ in range(10):
            await client.send("talk")
            assert await client.receive() == "talk"
            await trio.sleep(14)


async def test_without_times_there_are_no_pings(hosted: Served, patient_clock: MockClock) -> None:
    never = Settings(ping_interval=inf, ping_timeout=inf, stall_timeout=inf)
    async with hosted(echo, settings=never) as server, server.connect() as client:
        with trio.move_on_after(50):
            await client.frame()
        await client.send("still here")
        assert await client.receive() == "still here"


async def test_a_ping_waits_for_room_and_goes_out_behind_what_is_unsent(
    hosted: Served, patient_clock: MockClock
) -> None:
    async with hosted(send_and_receive, settings=SETTINGS) as server, server.connect() as client:
        await trio.sleep(31)
        assert await client.receive() == BIG
        assert await client.frame() == PING
        await client.send("still here")
        assert await client.closed() == (1000, "")


async def test_who_reads_slowly_cannot_answer_a_ping_that_it_has_not_got(
    hosted: Served, patient_clock: MockClock
) -> None:
    async with hosted(send_and_receive, settings=SETTINGS) as server, server.connect() as client:
        await trio.sleep(55)
        assert await client.receive() == BIG
        assert await client.frame() == PING
        await client.send("still here")
        assert await client.closed() == (1000, "")


async def test_who_has_got_the_ping_late_has_the_same_time_to_answer(hosted: Served, patient_clock: MockClock) -> None:
    async with hosted(send_and_receive, settings=SETTINGS) as server, server.connect() as client:
        await trio.sleep(31)
        assert await client.frame(answer=False) == Frame(Opcode.BINARY, BIG)
        await trio.sleep(15)
        assert await client.frame() == PING
        await client.send("still here")
        assert await client.closed() == (1000, "")


async def test_who_is_not_read_is_not_given_up(hosted: Served, patient_clock: MockClock) -> None:
    """Its answer to a ping may be among what is unread."""

    async def handler(ws: WebSocket) -> None:
        await resume.wait()
        await echo(ws)

    messages = [bytes(1000)] * 70  # enough for reading to pause
    resume = trio.Event()
    async with hosted(handler, settings=SETTINGS) as server, server.connect() as client:
        await client.send(*messages)
        await trio.sleep(51)
        resume.set()
        assert [await client.receive() for _ in messages] == messages


@pytest.mark.parametrize("ending", ["returns", "peer"])
async def test_nothing_comes_behind_the_close_frame(hosted: Served, patient_clock: MockClock, ending: str) -> None:
    async def handler(ws: WebSocket) -> None:
        if ending == "peer":
            await ws.receive()

    often = Settings(ping_interval=1, ping_timeout=1, close_timeout=7)
    async with hosted(handler, settings=often) as server, server.connect() as client:
        if ending == "peer":
            await client.close(4321)
        frame = await client.frame(answer=False)
        assert frame.data == (4321 if ending == "peer" else 1000).to_bytes(2, "big")
        if ending == "returns":
            await client.stream.send_all(Frame(Opcode.PING, b"").serialize(mask=True))
        assert await client.stream.receive_some() == b""
        await wait_all_tasks_blocked()
