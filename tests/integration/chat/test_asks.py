"""Questions and answers on every log, and over two instances."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import Any

import pytest
import trio

import tricorn.testing
from fixtures.chats import PATIENCE, Refusing, log, log_url, talk
from tricorn.chat import Asked, Chat, NotAnswered, Run
from tricorn.chat.client import terminal
from tricorn.chat.identity import Everybody
from tricorn.chat.logs import connect
from tricorn.chat.logs.base import Unavailable
from tricorn.chat.settings import ChatSettings

__all__ = ["log"]


async def asker(run: Run) -> None:
    past = [asked for turn in await run.history() for asked in turn.asks]
    if past:
        await run.say(f"{past}")
        return
    try:
        await run.say(await run.ask("Send it?", choices=["yes", "no"], seconds=float(run.message)))
    except NotAnswered:
        await run.say("nobody")


async def test_a_question_is_answered_and_remembered(log: Refusing) -> None:
    async with talk(asker, log) as client:
        await client.post("100")
        asking = await client.until("agent_asking")
        await client.say("answer", ask=asking["ask"], text="no")
        assert (await client.until("agent_asked"))["answer"] == "no"
        assert (await client.until("agent_completed"))["text"] == "no"
        assert (await client.run())["text"] == f"{[Asked('Send it?', 'no')]}"


async def test_nobody_answers_and_that_is_remembered(log: Refusing) -> None:
    async with talk(asker, log) as client:
        assert (await client.run("0.1"))["text"] == "nobody"
        assert (await client.run())["text"] == f"{[Asked('Send it?')]}"


async def test_an_answer_that_the_log_cannot_take_can_be_given_again(log: Refusing) -> None:
    async with talk(asker, log) as client:
        await client.post("100")
        asking = await client.until("agent_asking")
        log.error, log.refused = Unavailable("not now"), {"agent_asked"}
        await client.say("answer", ask=asking["ask"], text="yes")
        error = await client.until("error")
        assert (error["code"], error["ref"]) == ("unavailable", asking["ask"])
        log.refused = set()
        await client.say("answer", ask=asking["ask"], text="yes")
        assert (await client.until("agent_completed"))["text"] == "yes"


async def test_a_question_that_the_log_refuses_fails_the_run_and_is_whole_in_the_log(log: Refusing) -> None:
    tries = 0

    def count(type: str) -> None:
        nonlocal tries
        tries += type == "agent_asking"
        log.refused = {"agent_asking"} if tries == 1 else set()

    async with talk(asker, log) as client:
        log.on_append = count
        await client.post("100")
        assert (await client.until("agent_completed"))["outcome"] == "failed"
        types = [event["type"] for event in await client.all_events()]
        assert types[2:] == ["agent_asking", "agent_asked", "agent_completed"]


@asynccontextmanager
async def instance(url: str, settings: ChatSettings) -> AsyncGenerator[tricorn.testing.Client]:
    async with (
        connect(url, settings) as log,
        Chat(asker, settings, log, Everybody()) as chat,
        tricorn.testing.connect(chat.session, settings=settings, subprotocols=["tricorn.v1"]) as client,
    ):
        yield client


async def until(client: tricorn.testing.Client, type: str) -> dict[str, Any]:
    with trio.fail_after(PATIENCE):
        async for message in client:
            told: dict[str, Any] = json.loads(message)
            if told["type"] == type:
                return told
    raise AssertionError(f"there was no {type}")


async def say(client: tricorn.testing.Client, type: str, **fields: Any) -> None:
    await client.send(json.dumps({"type": type, **fields}))


@pytest.mark.parametrize("kind", ["redis", "postgres"])
async def test_an_answer_at_one_instance_goes_to_the_agent_at_another(
    request: pytest.FixtureRequest, kind: str
) -> None:
    url, settings, id = log_url(request, kind), ChatSettings(lease=2.0), token_hex(8)
    async with instance(url, settings) as here, instance(url, settings) as there:
        for client in (here, there):
            await say(client, "open", conversation=id)
            await until(client, "opened")
        await say(here, "post", id="p", conversation=id, text="100")
        ask = (await until(there, "agent_asking"))["ask"]
        await say(there, "answer", conversation=id, ask=ask, text="yes")
        for client in (here, there):
            assert (await until(client, "agent_completed"))["text"] == "yes"
        await say(here, "answer", conversation=id, ask=ask, text="no")
        assert (await until(here, "error"))["code"] == "not_found"


# In the terminal


async def test_the_next_line_of_a_script_is_the_answer(chatting: Any, capfd: pytest.CaptureFixture[str]) -> None:
    async with chatting(asker) as server:
        status = await script(server.port, "100\nmaybe\n\nyes\n")
        recorded = await server.recorded()
    assert status == 0
    assert recorded[-1]["text"] == "yes"
    out, err = capfd.readouterr()
    assert out == "› 100\n? Send it? (yes / no)\n  yes\nyes\n"
    assert "answer with one of: yes, no\n" in err


async def test_a_script_without_an_answer_waits_for_somebody_elses(
    chatting: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    async with chatting(asker) as server:
        assert await script(server.port, "0.1\n") == 0
    assert capfd.readouterr().out == "› 0.1\n? Send it? (yes / no)\n  no answer in time\nnobody\n"


async def script(port: int, lines: str) -> int:
    """Have a script write lines, and return its exit status."""
    client = terminal.TerminalChat(f"ws://127.0.0.1:{port}/ws", "c", None, False, None)
    reader, writer = os.pipe()
    try:
        os.write(writer, lines.encode())
        os.close(writer)
        client._lines = terminal.Lines(reader)
        with trio.fail_after(PATIENCE):
            await client.run()
    finally:
        os.close(reader)
    return client.status


async def test_children_are_drawn_in_whole_lines_of_their_own(chatting: Any, capfd: pytest.CaptureFixture[str]) -> None:
    async def agent(run: Run) -> None:
        async with run.agent("one", "x") as one, one.agent("two", "y") as two:
            for text in ("a", "b\nc"):
                await one.say(text)
                await two.say(text.upper())
            await two.say(await two.ask("Which?"))
        await run.say("done")

    async with chatting(agent) as server:
        assert await script(server.port, "go\n\nyes\n") == 0
    assert capfd.readouterr().out.splitlines() == [
        "› go",
        "▾ one",
        "│ ▾ two",
        "│ ab",
        "│ │ AB",
        "│ │ C",
        "│ │ ? Which?",
        "│ │   yes",
        "│ │ yes",
        "│ c",
        "done",
    ]
