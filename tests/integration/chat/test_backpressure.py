"""Clients that read slowly or not at all, or ask a lot."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing
from trio_websocket import ConnectionClosed

from tricorn.chat.protocol import BATCH_SUBPROTOCOL, SUBPROTOCOL

pytestmark = pytest.mark.any_server

Chatting = Callable[..., Any]


async def test_a_slow_reader_loses_nothing(chatting_anywhere: Chatting) -> None:
    async with chatting_anywhere() as server, server.connect() as watcher:
        async with server.connect(receive_buffer=4096) as slow:
            await slow.send("open", conversation="c")
            await slow.answer("opened")
            await watcher.send("open", conversation="c")
            for _ in range(40):
                await watcher.post("say 100 4000")
                await watcher.until("agent_completed")
            for _ in range(40):
                await slow.until("agent_completed")
        assert slow.received.events() == await server.recorded()


async def test_who_reads_may_ask_as_much_as_he_likes(chatting: Chatting) -> None:
    asked = 5000
    async with chatting(outbox=8) as server, server.connect() as client, trio.open_nursery() as nursery:

        async def ask() -> None:
            for number in range(asked):
                await client.send("cancel", conversation=f"c{number}", run="none")

        nursery.start_soon(ask)
        for number in range(asked):
            error = await client.receive()
            assert (error["code"], error["ref"]) == ("not_found", f"c{number}")


@pytest.mark.parametrize("subprotocol", [SUBPROTOCOL, BATCH_SUBPROTOCOL])
async def test_many_requests_in_one_write_are_answered_in_order(chatting: Chatting, subprotocol: str) -> None:
    """As many as the outbox holds, written before anything is read."""
    async with chatting(posts_per_minute=256, user_runs=256) as server, server.connect(subprotocol) as client:
        requests = [
            json.dumps({"type": "post", "id": f"p{n}", "conversation": f"c{n}", "text": "hello"}) for n in range(256)
        ]
        for message in ["\n".join(requests)] if subprotocol == BATCH_SUBPROTOCOL else requests:
            await client.ws.send_message(message)
        assert [(await client.answer("posted"))["id"] for _ in requests] == [f"p{n}" for n in range(256)]


async def test_a_batch_may_hold_more_than_the_outbox(chatting: Chatting) -> None:
    async with chatting(outbox=8) as server, server.connect(BATCH_SUBPROTOCOL) as client:
        await client.ws.send_message("\n".join(['{"type": "ping"}'] * 2000))
        for _ in range(2000):
            assert await client.receive() == {"type": "pong"}


@pytest.mark.not_asyncio("the client reads when the session has ended, which in a process is seen with the connection")
async def test_who_asks_without_reading_is_closed_with_4004(chatting_anywhere: Chatting) -> None:
    settings = {"outbox": 64, "close_timeout": 20.0, "drain_timeout": 25.0}
    async with (
        chatting_anywhere(**settings) as server,
        server.connect(BATCH_SUBPROTOCOL, receive_buffer=4096) as client,
    ):
        flood = "\n".join([json.dumps({"type": "cancel", "conversation": "c" * 128, "run": "r" * 128})] * 1000)
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with suppress(ConnectionClosed):
                    while True:
                        await client.ws.send_message(flood)

            nursery.start_soon(ask)
            await server.session_ended.wait()
            _, code = await client.until_closed()
            assert code == 4004


async def test_silence_is_broken_by_heartbeats(chatting: Chatting) -> None:
    async with chatting(heartbeat=0.02) as server, server.connect() as client:
        for _ in range(3):
            assert await client.receive() == {"type": "heartbeat"}
