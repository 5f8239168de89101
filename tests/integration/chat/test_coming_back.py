"""Nothing is lost and nothing comes twice: cursors, epochs, repeated posts, users who leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf
from typing import Any

import pytest
import trio
import trio.testing

from tricorn.chat import Run

pytestmark = pytest.mark.any_server

Chatting = Callable[..., Any]


# Replay


async def test_an_open_replays_the_log(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as one, server.connect() as other:
        await one.send("open", conversation="c")
        await one.post("hello")
        events = (await one.until("agent_completed")).events()
        await other.send("open", conversation="c")
        opened = await other.answer("opened")
        assert opened["head"] == len(events)
        assert await other.until("agent_completed") == events


@pytest.mark.parametrize("after", range(9))
async def test_a_cursor_gets_the_rest(chatting: Chatting, after: int) -> None:
    async with chatting() as server, server.connect() as client:
        await client.send("open", conversation="c")
        epoch = (await client.answer("opened"))["epoch"]
        await client.post("hello")
        events = (await client.until("agent_completed")).events()
        assert len(events) == 8

        async with server.connect() as back:
            await back.send("open", conversation="c", after=after, epoch=epoch)
            await back.send("ping")
            opened = await back.answer("opened")
            assert opened["head"] == 8
            await back.post("again")
            seen = (await back.until("user_message", text="again")).events()
            assert seen[:-1] == events[after:]


async def test_coming_back_in_the_middle_of_a_run(chatting_anywhere: Chatting) -> None:
    """Take in one event, break off, come back with the cursor, while the run goes on: all of them, once, in order."""
    next_step, steps = trio.open_memory_channel[None](inf)

    async def stepwise(run: Run) -> None:
        for number in range(30):
            await run.say(f"{number} ")
            await steps.receive()

    seen: list[dict[str, Any]] = []
    async with chatting_anywhere(stepwise) as server:
        async with server.connect() as client:
            await client.post("go")
            await client.send("open", conversation="c")
            epoch = (await client.answer("opened"))["epoch"]
        while not seen or seen[-1]["type"] != "agent_completed":
            async with server.connect() as client:
                await client.send("open", conversation="c", after=len(seen), epoch=epoch)
                await client.answer("opened")
                seen.append(await client.receive())
                await client.break_off()
            next_step.send_nowait(None)
        recorded = await server.recorded()
    assert recorded.seqs == [*range(1, 34)]
    assert seen == recorded


@pytest.mark.parametrize("after", [0, 3, 2000])
async def test_a_cursor_of_another_epoch_starts_over(chatting: Chatting, after: int) -> None:
    async with chatting() as server, server.connect() as client:
        await client.send("open", conversation="c")
        await client.post("hello")
        events = (await client.until("agent_completed")).events()
        async with server.connect() as back:
            await back.send("open", conversation="c", after=after, epoch="foreign")
            assert (await back.answer("opened"))["epoch"] != "foreign"
            assert await back.until("agent_completed") == events


async def test_a_cursor_ahead_of_its_own_log_is_refused(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client:
        await client.send("open", conversation="c")
        epoch = (await client.answer("opened"))["epoch"]
        await client.send("open", conversation="c", after=7, epoch=epoch)
        error = await client.receive()
        assert error["type"] == "error"
        assert error["ref"] == "c"


async def test_opening_again_moves_the_cursor(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client:
        await client.send("open", conversation="c")
        await client.post("hello")
        events = (await client.until("agent_completed")).events()
        await client.send("open", conversation="c")
        assert (await client.receive())["type"] == "opened"
        assert await client.until("agent_completed") == events
        await client.post("again")
        assert (await client.until("agent_completed")).seqs == [*range(9, 17)]


# Posts are idempotent


async def test_a_repeated_post_gets_the_first_answer_and_one_run(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client, server.connect() as other:
        for _ in range(3):
            await client.post("hello", id_="p")
        assert [(await client.answer("posted"))["seq"] for _ in range(3)] == [1, 1, 1]
        await other.post("hello", id_="p")
        assert (await other.answer("posted"))["seq"] == 1
        await other.post("last", id_="q")
        await other.send("open", conversation="c")
        seen = await other.until("user_message", id="q")
        assert [each["id"] for each in seen if each["type"] == "user_message"] == ["p", "q"]
        await other.answer("agent_completed", text="It is 4 long.")
        assert Counter((await server.recorded()).types)["agent_started"] == 2


async def test_one_id_from_many_connections_at_once(chatting: Chatting) -> None:
    async with chatting() as server:
        answers: list[dict[str, Any]] = []

        async def post_and_leave() -> None:
            async with server.connect() as client:
                await client.post("hello", id_="p")
                answers.append(await client.answer("posted"))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(post_and_leave)
        assert answers == [{"type": "posted", "id": "p", "conversation": "c", "seq": 1}] * 10
        async with server.connect() as client:
            await client.send("open", conversation="c")
            await client.until("agent_completed")
        assert len(await server.recorded()) == 8


async def test_ids_belong_to_their_conversation(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client:
        for conversation in ("a", "b"):
            await client.post("hello", conversation, id_="p")
            await client.send("open", conversation=conversation)
            seen = await client.until("agent_completed", conversation=conversation)
            assert seen.events(conversation).seqs == [*range(1, 9)]
