"""A peer that reads slowly gets everything, as long as it goes on reading; and what one connection does is its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from contextvars import ContextVar
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from websockets.frames import Opcode

from tricorn import Settings, WebSocket

Served = Callable[..., AbstractAsyncContextManager[Any]]

SLOW = Settings(close_timeout=0.5, stall_timeout=2, ping_interval=1000, ping_timeout=1000, handshake_timeout=1000)


async def read_slowly(client: Any, rate: int, *, ping: bool = False) -> tuple[int, int | None]:
    """Read so many bytes a second until the end, and pause after each quarter of them.

    Return how much data came, and the close code.
    """
    got, code = sum(len(frame.data) for frame in client.frames), None  # what came with the response
    since = 0
    while True:
        data = await client.stream.receive_some(rate // 4)
        if not data:
            return got, code
        since += len(data)
        if since >= rate // 4:
            await trio.sleep(since / rate)
            since = 0
        client.protocol.receive_data(data)
        for frame in client.protocol.events_received():
            if frame.opcode in (Opcode.BINARY, Opcode.CONT):
                got += len(frame.data)
            elif frame.opcode is Opcode.CLOSE:
                code = int.from_bytes(frame.data[:2], "big")
        if ping and code is None:
            client.protocol.send_ping(b"p")
        with suppress(trio.BrokenResourceError):  # the answer to the close frame comes too late
            await client.flush()


async def send_at_once(ws: WebSocket) -> None:
    await ws.send(bytes(4 << 20))


async def send_chunks(ws: WebSocket) -> None:
    for _ in range(64):
        await ws.send(bytes(65536))


@pytest.mark.parametrize("handler", [send_at_once, send_chunks])
@pytest.mark.parametrize("ping", [False, True])
async def test_all_arrives_at_a_peer_that_goes_on_reading(
    hosted: Served, patient_clock: MockClock, handler: Any, ping: bool
) -> None:
    """1 MiB a second at most, which takes longer than the close timeout."""
    async with hosted(handler, settings=SLOW) as server, server.connect(receive_buffer=1 << 16) as client:
        assert await read_slowly(client, 1 << 20, ping=ping) == (4 << 20, 1000)


async def test_a_slow_peer_that_goes_on_reading_is_never_dropped(hosted: Served, patient_clock: MockClock) -> None:
    """20 kB a second at most, for several times the stall timeout and more."""

    async def handler(ws: WebSocket) -> None:
        for _ in range(20):
            await ws.send(bytes(10_000))

    async with hosted(handler, settings=SLOW) as server, server.connect(receive_buffer=8192) as client:
        assert await read_slowly(client, 20_000) == (200_000, 1000)


# What one connection does is its own

user: ContextVar[str] = ContextVar("user")


async def test_each_connection_has_a_fresh_context(hosted: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        before = user.get("nobody")
        user.set("ann")
        await ws.send(before)
        async for _ in ws:
            pass

    async with hosted(handler) as server:
        for _ in range(2):
            async with server.connect() as client:
                assert await client.receive() == "nobody"
                await client.close()
                assert (await client.closed())[0] == 1000
