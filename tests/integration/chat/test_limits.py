"""Every limit of the chat over real sockets: what the client is told, and that it is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from time import time
from typing import Any
from unittest.mock import ANY

import pytest
import trio

from tricorn.chat import Run
from tricorn.chat.protocol import ENVELOPE
from tricorn.service.auth import Tokens, make_token
from tricorn.service.jwt_keys import Keys, parse
from tricorn.service.settings import ServiceSettings

pytestmark = pytest.mark.any_server

Chatting = Callable[..., AbstractAsyncContextManager[Any]]

EVENT_BYTES = 5000
ROOM = EVENT_BYTES - ENVELOPE
KEYS = parse("a secret of at least thirty-two bytes")


def token(user: str) -> str:
    return make_token(KEYS[0], user, time(), 600, ServiceSettings())


@pytest.fixture
def gate() -> Tokens:
    return Tokens(Keys(KEYS), ServiceSettings())


async def test_posts_that_come_too_fast_are_refused_and_then_the_connection(chatting: Chatting) -> None:
    async with chatting(posts_per_minute=2) as server, server.connect() as client:
        for _ in range(2):
            await client.post("hello")
            await client.answer("posted")
        for _ in range(2):
            await client.post("hello")
            refused = await client.answer("error")
            assert refused["code"] == "too_fast"
            assert "post again in" in refused["message"]
            assert 0 < refused["retry_after"] <= 30.0
        await client.post("hello")
        assert await client.until_closed() == ([], 4003)
    assert server.hits() == {"posts_per_minute": 3}


async def test_a_repeated_post_gets_its_first_answer_again_also_at_the_limit(chatting: Chatting) -> None:
    async with chatting(posts_per_minute=1) as server, server.connect() as client:
        first = await client.post("hello")
        posted = await client.answer("posted")
        for _ in range(5):  # more than may be refused
            await client.post("hello", id_=first)
            assert await client.answer("posted") == posted
        assert "error" not in client.received.types
    assert server.hits() == {}


async def test_connections_of_one_user_share_how_fast_they_may_post(chatting: Chatting, gate: Tokens) -> None:
    async with (
        chatting(gate=gate, posts_per_minute=1) as server,
        server.connect(token=token("ann")) as one,
        server.connect(token=token("ann")) as two,
        server.connect(token=token("bob")) as other,
    ):
        await one.post("hello")
        await one.answer("posted")
        await two.post("hello")
        assert (await two.answer("error"))["code"] == "too_fast"
        await other.post("hello")
        await other.answer("posted")


async def test_coming_back_does_not_help_who_was_too_fast(chatting: Chatting, gate: Tokens) -> None:
    async with chatting(gate=gate, posts_per_minute=1) as server:
        for answer in ["posted", "error"]:
            async with server.connect(token=token("ann")) as client:
                await client.post("hello")
                await client.answer(answer)


async def test_a_user_has_only_so_many_connections(chatting: Chatting, gate: Tokens) -> None:
    async with chatting(gate=gate, user_connections=2) as server, server.connect(token=token("ann")):
        async with server.connect(token=token("ann")):
            async with server.connect(token=token("ann"), welcome=False) as third:
                assert await third.until_closed() == ([], 4503)
            async with server.connect(welcome=False) as fourth:
                await fourth.send("authenticate", token=token("ann"))
                assert await fourth.until_closed() == ([], 4503)
            async with server.connect(token=token("bob")):
                pass
        assert server.hits() == {"user_connections": 2}
        with trio.fail_after(5):
            while not await welcomed(server):
                await trio.lowlevel.checkpoint()


async def welcomed(server: Any) -> bool:
    async with server.connect(token=token("ann"), welcome=False) as client:
        try:
            return bool((await client.receive())["type"] == "welcome")
        except Exception:
            return False


async def test_where_nobody_says_who_they_are_connections_share_nothing(chatting: Chatting) -> None:
    async with chatting(user_connections=1, posts_per_minute=1) as server, AsyncExitStack() as stack:
        for _ in range(3):
            client = await stack.enter_async_context(server.connect())
            await client.post("hello")
            await client.answer("posted")
    assert server.hits() == {}


async def test_posts_of_a_user_that_wait_for_answers_are_bounded(chatting: Chatting) -> None:
    """In all conversations together; and one that is in the log already gets its first answer all the same."""
    async with chatting(user_runs=2) as server, server.connect() as client:
        first = await client.post("wait", "c1")
        posted = await client.answer("posted")
        await client.post("wait", "c1")
        await client.answer("posted")
        third = await client.post("hello", "c2")
        error = await client.answer("error")
        assert (error["code"], error["ref"], error["retry_after"]) == ("too_many", third, 5.0)
        await client.post("wait", "c1", first)
        assert await client.answer("posted") == posted
        await client.send("open", conversation="c1")
        started = await client.answer("agent_started")
        await client.send("cancel", conversation="c1", run=started["run"])
        await client.answer("agent_completed")
        await client.post("hello", "c2", third)
        assert (await client.answer("posted"))["id"] == third
    assert server.hits() == {"user_runs": 1}


async def test_posts_that_wait_in_a_conversation_are_bounded(chatting: Chatting) -> None:
    async with chatting(waiting_posts=1) as server, server.connect() as one, server.connect() as two:
        await one.send("open", conversation="c")
        await one.post("wait")
        await one.answer("agent_started")
        await one.post("wait")
        await one.answer("posted")
        await two.post("hello")
        assert (await two.answer("error"))["code"] == "too_many"
        await two.post("hello", "another")
        await two.answer("posted")
    assert server.hits() == {"waiting_posts": 1}


async def test_open_conversations_and_texts_are_counted(chatting: Chatting) -> None:
    async def silent(run: Run) -> None:
        await trio.lowlevel.checkpoint()

    settings = {"open_conversations": 1, "text_characters": 4000, "event_bytes": EVENT_BYTES}
    async with chatting(silent, **settings) as server, server.connect() as client:
        await client.send("open", conversation="c1")
        await client.send("open", conversation="c2")
        assert (await client.answer("error"))["code"] == "too_many"
        await client.post("x" * 4001)
        assert (await client.answer("error"))["code"] == "too_long"
        await client.post("\1" * (ROOM // 6 + 1))  # six bytes each
        assert (await client.answer("error"))["code"] == "too_long"
        await client.send("leave", conversation="c1")
        await client.send("open", conversation="c")
        await client.post("\1" * (ROOM // 6 - 1))
        assert len(json.dumps(await client.answer("user_message"))) <= EVENT_BYTES
    assert server.hits() == {"open_conversations": 1, "text_characters": 1, "event_bytes": 1}


async def test_no_event_is_longer_than_it_may_be(chatting: Chatting) -> None:
    async def agent(run: Run) -> None:
        for say in (run.say, run.think):
            await say("x" * (ROOM - 2))
            with pytest.raises(
                ValueError, match=f"^the text has {ROOM + 1} bytes in JSON; an event has room for {ROOM}$"
            ):
                await say("x" * (ROOM - 1))
        async with run.tool("tool", text="x" * ROOM) as tool:
            tool.result = "\n" * ROOM
        await run.say("y")

    async with chatting(agent, event_bytes=EVENT_BYTES) as server, server.connect() as client:
        await client.send("open", conversation="c")
        await client.post("go")
        seen = await client.until("agent_completed")
        sizes = [len(entry.json) for entry in await server.log.read("local/c", 0, 100)]
    assert max(sizes) <= EVENT_BYTES
    assert seen.events().types[2:] == [
        "agent_message",
        "agent_thinking",
        "tool_executing",
        "tool_completed",
        "agent_message",
        "agent_completed",
    ]
    (executing,) = [each for each in seen if each["type"] == "tool_executing"]
    assert executing["arguments"] == {"cut": ANY}
    assert executing["arguments"]["cut"].startswith('{"text":"xxx')
    assert executing["arguments"]["cut"].endswith(
        f"… (cut: {ROOM + len(json.dumps({'text': ''})) - 1} characters in all)"
    )
    (completed,) = [each for each in seen if each["type"] == "tool_completed"]
    assert completed["result"].strip("\n") == f"… (cut: {ROOM} characters in all)"
    assert "error" not in completed
    assert seen[-1]["outcome"] == "success"
    assert "text" not in seen[-1]  # it would not fit
    assert server.hits() == {"event_bytes": 4}


async def test_who_asks_without_reading_is_counted(chatting: Chatting) -> None:
    request = json.dumps({"type": "nothing", "id": "x" * 10_000}).encode()  # the answer names the id
    asking = b"\x81\xfe" + len(request).to_bytes(2) + bytes(4) + request
    async with chatting(outbox=8) as server, server.connect(receive_buffer=4096) as client:
        with suppress(trio.BrokenResourceError):
            while not server.session_ended.is_set():
                await client.stream.send_all(asking)
    assert server.hits() == {"outbox": 1}
