"""The order of a client's posts while the log is away: a real Redis behind a proxy, and a client of another library."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from secrets import token_hex
from typing import Any

import pytest
import trio
from websockets.sync.client import ClientConnection, connect

import tricorn
from fixtures.cutting_proxy import CuttingProxy, cutting_proxy
from fixtures.real_services import RedisServer
from tricorn.chat import SUBPROTOCOLS, Chat, Run
from tricorn.chat.identity import Everybody
from tricorn.chat.logs import connect as connect_log
from tricorn.chat.settings import ChatSettings

CONVERSATION = token_hex(8)  # in a Redis that other tests use too
PATIENCE = 30  # seconds, for what takes a few


async def echo(run: Run) -> None:
    await run.say(run.message)


@pytest.fixture
async def proxy(another_redis_server: RedisServer) -> AsyncIterator[CuttingProxy]:
    """A proxy before a Redis in which other tests' agents do not find posts that are left unanswered."""
    path = another_redis_server.path
    async with cutting_proxy(f"{path}.ordered", path) as proxy:
        yield proxy


def post(ws: ClientConnection, number: int) -> None:
    ws.send(json.dumps({"type": "post", "id": f"p{number}", "conversation": CONVERSATION, "text": str(number)}))


def answer(ws: ClientConnection) -> tuple[str, int]:
    """Return the next answer to a post: its type, and the number of the post."""
    while True:
        told = json.loads(ws.recv(PATIENCE))
        if told["type"] == "posted":
            return "posted", int(told["id"][1:])
        if told["type"] == "error":
            assert (told["code"], told["retry_after"]) == ("unavailable", 1.0)
            return "error", int(told["ref"][1:])


def texts(ws: ClientConnection, number: int) -> list[str]:
    """Return the texts of so many posts, as they are in the log, when all of them are answered."""
    ws.send(json.dumps({"type": "open", "conversation": CONVERSATION}))
    found: list[str] = []
    answered = 0
    while answered < number:
        told = json.loads(ws.recv(PATIENCE))
        answered += told["type"] == "agent_completed"
        if told["type"] == "user_message":
            found.append(told["text"])
    return found


async def test_posts_that_are_refused_while_redis_is_away_are_logged_in_the_order_in_which_they_were_sent(
    proxy: CuttingProxy,
) -> None:
    assert isinstance(proxy.address, str)
    settings = ChatSettings(log_timeout=0.5, lease=3.0)
    log = connect_log(f"unix://{proxy.address}", settings)

    def stall() -> None:
        proxy.stalled = True

    def go_on() -> None:
        proxy.stalled = False
        proxy.cut()  # what it had taken is lost

    def talk(port: int) -> list[str]:
        with connect(f"ws://127.0.0.1:{port}/ws", subprotocols=[SUBPROTOCOLS[0]]) as ws:  # type: ignore[list-item]
            post(ws, 1)
            assert answer(ws) == ("posted", 1)
            trio.from_thread.run_sync(stall)
            for number in (2, 3, 4):
                post(ws, number)
            assert answer(ws) == ("error", 2)
            trio.from_thread.run_sync(go_on)
            assert [answer(ws), answer(ws)] == [("error", 3), ("error", 4)]
            waiting = {2, 3, 4}
            while waiting:
                for number in sorted(waiting, reverse=True):  # the worst order
                    post(ws, number)
                waiting -= {number for type, number in [answer(ws) for _ in range(len(waiting))] if type == "posted"}
            post(ws, 5)
            assert answer(ws) == ("posted", 5)
            return texts(ws, 5)

    with trio.fail_after(PATIENCE):
        async with log, Chat(echo, settings, log, Everybody()) as chat, trio.open_nursery() as nursery:
            start: Any = partial(tricorn.serve, {"/ws": chat.session}, 0, subprotocols=SUBPROTOCOLS)
            server = await nursery.start(start)
            assert await trio.to_thread.run_sync(talk, server.addresses[0][1]) == ["1", "2", "3", "4", "5"]
            nursery.cancel_scope.cancel()
