"""The wire protocol over real sockets: what `docs/protocol.md` promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from tricorn.chat import Run
from tricorn.chat.agents.demo import demo
from tricorn.chat.protocol import BATCH_SUBPROTOCOL, SUBPROTOCOL

pytestmark = pytest.mark.any_server

Chatting = Callable[..., Any]


# Welcome


async def test_a_connection_begins_with_a_welcome(chatting: Chatting) -> None:
    limits = {
        "message_bytes": 5000,
        "event_bytes": 262144,
        "text_characters": 70,
        "open_conversations": 3,
        "user_runs": 20,
        "posts_per_minute": 60,
    }
    settings = {"max_message_bytes": 5000, "text_characters": 70, "open_conversations": 3, "heartbeat": 9.5}
    async with chatting(**settings) as server, server.connect() as one, server.connect() as other:
        [welcome] = one.received
        assert welcome["user"] == "local"
        assert welcome["heartbeat"] == 9.5
        assert welcome["limits"] == limits
        assert welcome["connection"] != other.received[0]["connection"]


async def test_authenticate_is_welcomed_again(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client:
        await client.send("authenticate", token="whatever")
        assert await client.receive() == client.received[0]


@pytest.mark.parametrize("subprotocol", [SUBPROTOCOL, BATCH_SUBPROTOCOL, None])
async def test_subprotocols(chatting: Chatting, subprotocol: str | None) -> None:
    async with chatting() as server, server.connect(subprotocol) as client:
        assert client.ws.subprotocol == subprotocol
        await client.send("ping")
        assert await client.receive() == {"type": "pong"}


async def test_only_one_path_is_a_websocket(chatting: Chatting) -> None:
    async with chatting() as server, await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        await stream.send_all(
            b"GET /elsewhere HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("page", ["/", "/client.js", "/healthz"])
async def test_pages_come_from_the_same_port(chatting: Chatting, page: str) -> None:
    async with chatting() as server, await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        await stream.send_all(f"GET {page} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        response = b"".join([chunk async for chunk in stream])
        assert response.startswith(b"HTTP/1.1 200 ")


# A run


async def test_a_run_from_post_to_end(chatting_anywhere: Chatting) -> None:
    async with chatting_anywhere() as server, server.connect() as client:
        await client.send("open", conversation="c")
        opened = await client.receive()
        assert opened == {"type": "opened", "conversation": "c", "epoch": opened["epoch"], "head": 0}

        id_ = await client.post("hello")
        seen = await client.until("agent_completed")
        [posted] = [each for each in seen if each["type"] == "posted"]
        assert posted == {"type": "posted", "id": id_, "conversation": "c", "seq": 1}

        events = seen.events()
        assert events.types == [
            "user_message", "agent_started", "agent_thinking", "tool_executing", "tool_completed",
            "agent_message", "agent_message", "agent_completed",
        ]  # fmt: skip
        message, started, thinking, executing, completed, *pieces, end = events
        assert events.seqs == [1, 2, 3, 4, 5, 6, 7, 8]
        assert (message["id"], message["text"]) == (id_, "hello")
        assert started["post"] == id_
        assert thinking["text"] == "about it"
        assert (executing["tool"], executing["arguments"]) == ("length", {"text": "hello"})
        assert (completed["call"], completed["result"]) == (executing["call"], 5)
        assert (end["outcome"], end["text"]) == ("success", "It is 5 long.")
        assert end["text"] == "".join(piece["text"] for piece in pieces)
        assert len({each["run"] for each in events[1:]}) == 1
        assert [each["at"] for each in events] == sorted(each["at"] for each in events)
        assert await server.recorded() == events


async def test_a_post_needs_no_open(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client:
        await client.post("wait")
        assert (await client.receive())["type"] == "posted"
        await client.send("ping")
        assert await client.receive() == {"type": "pong"}
        await client.send("open", conversation="c")
        await client.until("tool_executing")


async def test_the_agent_of_the_house(chatting: Chatting) -> None:
    async with chatting(demo) as server, server.connect() as client:
        await client.send("open", conversation="c")
        await client.post("12*(7+5)^2")
        end = await client.answer("agent_completed")
        assert end["text"] == "12*(7+5)^2 = 1728"
        await client.post("1/0")
        end = await client.answer("agent_completed")
        assert end["outcome"] == "success"
        assert "divided by zero" in end["text"]


async def test_posts_of_one_conversation_run_one_after_the_other(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client:
        await client.send("open", conversation="c")
        ids = [await client.post(f"say 2 {size}") for size in range(20)]
        seen = [each for _ in ids for each in await client.until("agent_completed")]
        assert [each["id"] for each in seen if each["type"] == "posted"] == ids
        runs = [each["run"] for each in seen if "run" in each]
        assert [run for before, run in zip([None, *runs], runs, strict=False) if run != before] == list(
            dict.fromkeys(runs)
        )
        assert [each["post"] for each in seen if each["type"] == "agent_started"] == ids


async def test_a_post_is_heard_though_its_sender_is_gone(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as watcher:
        await watcher.send("open", conversation="c")
        await watcher.answer("opened")
        async with server.connect() as client:
            for _ in range(10):
                await client.post("hello")
            await client.stream.send_eof()
            for _ in range(10):
                assert (await watcher.answer("agent_completed"))["outcome"] == "success"


async def test_a_run_goes_on_without_its_user(chatting: Chatting) -> None:
    """Nobody is attached while it ends; the answer is read afterwards, and again after it has rested."""
    go = trio.Event()
    ended = trio.Event()

    async def patient(run: Run) -> None:
        await run.say("before ")
        await go.wait()
        await run.say("after")
        ended.set()

    async with chatting(patient, linger=0.01) as server:
        async with server.connect() as client:
            await client.send("open", conversation="c")
            await client.post("hello")
            await client.until("agent_message")
        await server.session_ended.wait()
        go.set()
        await ended.wait()
        for _ in range(2):
            async with server.connect() as client:
                await client.send("open", conversation="c")
                seen = await client.until("agent_completed")
                assert seen.seqs == [1, 2, 3, 4, 5]
                assert seen[-1]["text"] == "before after"


# Many at once


async def test_leave(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client, server.connect() as other:
        for each in (client, other):
            await each.send("open", conversation="c")
            await each.answer("opened")
        await client.send("leave", conversation="c")
        await client.send("leave", conversation="never-opened")
        await client.send("ping")
        assert await client.receive() == {"type": "pong"}
        await other.post("hello")
        await other.until("agent_completed")
        await client.send("ping")
        assert await client.receive() == {"type": "pong"}
        await client.send("open", conversation="c")
        assert len((await client.until("agent_completed")).events()) == 8


async def test_several_conversations_on_one_connection(chatting: Chatting) -> None:
    """Both run at the same time: each of the two agents waits for the other."""
    names = ("a", "b")
    arrived = {name: trio.Event() for name in names}

    async def meet(run: Run) -> None:
        arrived[run.conversation].set()
        for event in arrived.values():
            await event.wait()
        await run.say(f"here is {run.conversation}")

    async with chatting(meet) as server, server.connect() as client:
        for name in names:
            await client.send("open", conversation=name)
            await client.post("come", name)
        for _ in names:
            await client.until("agent_completed")
        for name in names:
            events = client.received.events(name)
            assert events.seqs == [1, 2, 3, 4]
            assert events[-1]["text"] == f"here is {name}"


async def test_several_connections_on_one_conversation(chatting: Chatting) -> None:
    async with (
        chatting() as server,
        server.connect() as one,
        server.connect(BATCH_SUBPROTOCOL) as two,
        server.connect() as three,
    ):
        clients = (one, two, three)
        for client in clients:
            await client.send("open", conversation="c")
            await client.answer("opened")
        await one.post("say 100 10")
        views = [(await client.until("agent_completed")).events() for client in clients]
        assert views[0].seqs == list(range(1, 104))
        assert views[1] == views[2] == views[0] == await server.recorded()


async def test_too_many_open_conversations(chatting: Chatting) -> None:
    async with chatting(open_conversations=2) as server, server.connect() as client:
        for name in ("a", "b", "a"):
            await client.send("open", conversation=name)
            assert (await client.receive())["type"] == "opened"
        await client.send("open", conversation="c")
        error = await client.receive()
        assert (error["type"], error["code"], error["ref"]) == ("error", "too_many", "c")
        await client.send("leave", conversation="a")
        await client.send("open", conversation="c")
        assert (await client.receive())["type"] == "opened"


# What is refused


async def test_a_text_that_is_too_long(chatting: Chatting) -> None:
    async with chatting(text_characters=10) as server, server.connect() as client:
        await client.post("ü" * 11, id_="long")
        error = await client.receive()
        assert (error["type"], error["code"], error["ref"]) == ("error", "too_long", "long")
        await client.post("ü" * 10, id_="fits")
        assert (await client.answer("posted"))["seq"] == 1


MALFORMED = {
    "not JSON": "hello",
    "nothing": "",
    "half an object": '{"type": "ping"',
    "two objects": '{"type": "ping"}{"type": "ping"}',
    "an array": "[]",
    "a number": "1",
    "no type": "{}",
    "a type that is no text": '{"type": 1}',
    "a missing field": '{"type": "post", "id": "p", "conversation": "c"}',
    "a field of another type": '{"type": "post", "id": "p", "conversation": "c", "text": 1}',
    "an id with a space": '{"type": "open", "conversation": "a b"}',
    "an id that is too long": json.dumps({"type": "open", "conversation": "a" * 129}),
    "an id with a line end": '{"type": "open", "conversation": "a\\n"}',
    "an empty id": '{"type": "open", "conversation": ""}',
    "a negative cursor": '{"type": "open", "conversation": "c", "after": -1}',
    "a cursor that is no whole number": '{"type": "open", "conversation": "c", "after": 0.5}',
    "too deep": "[" * 100_000,
    "binary": b'{"type": "ping"}',
}


@pytest.mark.parametrize("message", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_malformed_gets_an_error_and_no_more(chatting: Chatting, message: str | bytes) -> None:
    async with chatting() as server, server.connect() as client:
        await client.ws.send_message(message)
        await client.send("ping")
        error, pong = await client.receive(), await client.receive()
        assert (error["type"], error["code"]) == ("error", "malformed")
        assert error["message"]
        assert pong == {"type": "pong"}


async def test_a_lone_surrogate_is_malformed(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client:
        await client.ws.send_message(r'{"type": "post", "id": "p", "conversation": "c", "text": "\ud800"}')
        assert (await client.receive())["type"] in ("error", "posted")
        await client.send("ping")
        assert await client.receive() == {"type": "pong"}


async def test_an_unknown_type(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client:
        await client.send("dance", conversation="c")
        error = await client.receive()
        assert (error["type"], error["code"]) == ("error", "unknown_type")
        await client.send("ping", unknown="field")
        assert await client.receive() == {"type": "pong"}


async def test_a_message_over_the_limit_closes_with_1009(chatting_anywhere: Chatting) -> None:
    async with chatting_anywhere(max_message_bytes=1000) as server, server.connect() as client:
        await client.ws.send_message(" " * 1001)
        assert await client.until_closed() == ([], 1009)


# Batches


async def test_several_objects_in_one_message(chatting: Chatting) -> None:
    async with chatting() as server, server.connect(BATCH_SUBPROTOCOL) as client:
        await client.ws.send_message(
            '{"type": "open", "conversation": "c"}\n\n'
            '{"type": "post", "id": "p", "conversation": "c", "text": "hello"}\n'
            "nonsense\n"
            '{"type": "ping"}\n'
        )
        seen = await client.until("agent_completed")
        answers = [each["type"] for each in seen if "at" not in each]
        assert answers == ["opened", "posted", "error", "pong"]
        assert seen.seqs == [1, 2, 3, 4, 5, 6, 7, 8]


async def test_without_batches_one_message_is_one_object(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client:
        await client.ws.send_message('{"type": "ping"}\n{"type": "ping"}')
        assert (await client.receive())["code"] == "malformed"
        await client.send("open", conversation="c")
        await client.post("say 50 10")
        await client.until("agent_completed")
        assert not client.pending


async def test_a_big_replay_fits_into_the_messages_that_clients_take(chatting: Chatting) -> None:
    """Libraries take 1 MiB a message by default."""
    async with chatting() as server, server.connect(BATCH_SUBPROTOCOL) as client:
        await client.send("open", conversation="c")
        for _ in range(10):
            await client.post("say 20 30000")
            await client.until("agent_completed")
        async with server.connect(BATCH_SUBPROTOCOL) as other:
            await other.send("open", conversation="c")
            for _ in range(10):
                await other.until("agent_completed")
            assert other.received.events() == await server.recorded()
