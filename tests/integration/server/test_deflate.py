"""permessage-deflate over real sockets: who gets it, and what a peer can make of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

from fixtures.handlers import echo
from tricorn import Disconnected, Settings, WebSocket
from tricorn.transport.native import READ_AHEAD, READ_DEFLATED

Served = Callable[..., AbstractAsyncContextManager[Any]]

MOST = 1 << 20  # bytes of a message
MOST_PER_BYTE = 1032  # what a byte may inflate to: https://zlib.net/zlib_tech.html


def extensions(**parameters: Any) -> dict[str, Any]:
    return {"extensions": [ClientPerMessageDeflateFactory(**parameters)]}


def bomb(size: int, times: int) -> bytes:
    """Messages of zeros, each deflated by itself, and masked with zeros."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = (compressor.compress(bytes(size)) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
    return (b"\xc2\xfe" + len(data).to_bytes(2, "big") + bytes(4) + data) * times


@pytest.mark.parametrize("deflate", ["takeover", "no-takeover"])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"client_max_window_bits": True},
        {"client_max_window_bits": 9, "server_max_window_bits": 9},
        {"client_no_context_takeover": True, "server_no_context_takeover": True},
    ],
)
async def test_messages_are_echoed(served: Served, deflate: Any, parameters: dict[str, Any]) -> None:
    messages = ["", "text", "€" * 1000, b"\0" * 70_000, "text", b""] * 3
    async with served(echo, settings=Settings(deflate=deflate)) as server:
        async with server.connect(**extensions(**parameters)) as client:
            [agreed] = client.protocol.extensions
            assert agreed.remote_no_context_takeover == (
                deflate == "no-takeover" or "server_no_context_takeover" in parameters
            )
            await client.send(*messages)
            assert [await client.receive() for _ in messages] == messages
            await client.close()
            assert await client.closed() == (1000, "")
        async with server.connect() as client:
            assert client.protocol.extensions == []
            await client.send("plain")
            assert await client.receive() == "plain"


async def test_it_is_off_unless_it_is_set(served: Served) -> None:
    async with served(echo) as server, server.connect(**extensions()) as client:
        assert client.protocol.extensions == []
        await client.send("plain")
        assert await client.receive() == "plain"


async def test_a_bomb_is_too_big(served: Served) -> None:
    settings = Settings(deflate="takeover", max_message_bytes=MOST)
    async with served(echo, settings=settings) as server, server.connect(**extensions()) as client:
        await client.stream.send_all(bomb(MOST + 1, 1))
        assert await client.closed() == (1009, f"a message may have at most {MOST} bytes")


class Busy:
    """A handler that receives one message, and the others when it is told to."""

    def __init__(self) -> None:
        self.received = 0
        self.code: int | None = None
        self.most = 0
        self.free = trio.Event()

    async def __call__(self, ws: WebSocket) -> None:
        try:
            await ws.receive()
            self.received += 1
            await self.free.wait()
            self.most = sum(map(len, ws._connection.inbox))
            while True:
                await ws.receive()
                self.received += 1
        except Disconnected as error:
            self.code = error.code


async def test_many_small_bombs_are_backpressure(served: Served, patient_clock: MockClock) -> None:
    times = 100
    handler = Busy()
    settings = Settings(deflate="takeover", max_message_bytes=MOST)
    async with served(handler, settings=settings) as server, server.connect(**extensions()) as client:
        await client.stream.send_all(bomb(MOST, times))
        await trio.sleep(1)
        handler.free.set()
        await client.close()
        assert await client.closed() == (1000, "")
    assert handler.received == times
    assert handler.most <= READ_AHEAD + READ_DEFLATED * MOST_PER_BYTE + MOST


async def test_of_what_a_peer_leaves_behind_not_everything_is_inflated(
    readiness: object, served: Served, patient_clock: MockClock
) -> None:
    times = 100
    handler = Busy()
    settings = Settings(deflate="takeover", max_message_bytes=MOST, close_timeout=2)
    async with served(handler, settings=settings) as server:
        async with server.connect(**extensions()) as client:
            await client.stream.send_all(bomb(MOST, times))
            await trio.sleep(1)
        await trio.sleep(1)
        handler.free.set()
        await wait_all_tasks_blocked()
    assert handler.code == 1006
    assert 1 < handler.received <= times
    assert handler.most <= 2 * (READ_AHEAD + READ_DEFLATED * MOST_PER_BYTE) + MOST


async def test_messages_behind_the_head_are_no_larger_reads(served: Served, patient_clock: MockClock) -> None:
    handler = Busy()
    settings = Settings(deflate="takeover", max_message_bytes=MOST)
    async with served(handler, settings=settings) as server, server.open() as stream:
        client = server.client(stream, **extensions())
        await stream.send_all(client.request() + bomb(MOST, 50))
        await client.handshake()
        await trio.sleep(1)
        handler.free.set()
        await client.close()
        assert await client.closed() == (1000, "")
    assert handler.received == 50
    assert handler.most <= READ_AHEAD + READ_DEFLATED * MOST_PER_BYTE + MOST
