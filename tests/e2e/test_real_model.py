"""The chat with a real language model in llama.cpp's server: five events, what it remembers, and that Stop stops it."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fixtures.model_chat import Instance, run_of, serving
from fixtures.model_server import ModelServer
from fixtures.real_services import RedisServer
from tricorn.chat.agents.model import Model
from tricorn.chat.testing import ask

pytestmark = [pytest.mark.real_llm, pytest.mark.xdist_group("real_llm")]  # one model is enough for two processors

SHORT = "Say hello."
LONG = "Write a very long story about a dragon, with many chapters."
AT_ONCE = 1.0  # seconds until a slot is free: the promise
TRIES = 3  # of which one must keep it: other tests run meanwhile

Serve = Callable[..., AbstractAsyncContextManager[Instance]]


@pytest.fixture
def served(model_server: ModelServer, tmp_path: Path) -> Serve:
    @asynccontextmanager
    async def serve(**environ: str) -> AsyncGenerator[Instance]:
        options = ("--model", "smollm2", "--base-url", model_server.base_url)
        async with serving(tmp_path, *options, **environ) as instance:
            yield instance

    return serve


async def test_five_events_in_order_and_tokens_counted(served: Serve) -> None:
    async with served() as instance:
        events = await instance.ask(SHORT)
    started, *pieces, completed = events
    assert (started["type"], started["agent"]) == ("agent_started", "smollm2")
    assert pieces
    assert {each["type"] for each in pieces} == {"agent_message"}
    assert completed["outcome"] == "success"
    assert completed["text"] == "".join(each["text"] for each in pieces) != ""
    assert completed["usage"]["input"] > 0
    assert completed["usage"]["output"] > 0


async def test_it_is_told_the_earlier_turn(served: Serve) -> None:
    async with served() as instance:
        first = (await instance.ask("My name is Zebulon. Say hello."))[-1]
        second = (await instance.ask(SHORT))[-1]
        alone = (await instance.ask(SHORT, "another"))[-1]
    assert second["usage"]["input"] > first["usage"]["input"] + first["usage"]["output"]
    assert alone["usage"]["input"] < first["usage"]["input"]


ENVIRON = {
    "timeout": {"TRICORN_RUN_TIMEOUT": "3"},
    # At SIGTERM runs may finish for most of `drain_timeout`; here that is next to nothing.
    "SIGTERM": {"TRICORN_DRAIN_TIMEOUT": "0.4", "TRICORN_CLOSE_TIMEOUT": "0.2"},
}


async def stopped(served: Serve, model_server: ModelServer, how: str) -> float:
    """Have the model begin a long answer, end the run, and return the seconds until its slot is free."""
    async with served(**ENVIRON.get(how, {})) as instance, instance.connect() as client:
        await client.post(LONG, "c")
        run = (await client.until("agent_message")).last["run"]
        await model_server.until_busy(1)
        if how == "cancel":
            await client.send("cancel", conversation="c", run=run)
        elif how == "timeout":
            assert (await client.until("agent_completed")).last["outcome"] == "timeout"
        else:
            instance.process.send_signal(signal.Signals[how])
        return await model_server.until_busy(0)


@pytest.mark.parametrize("how", ["cancel", "timeout", "SIGTERM", "SIGKILL"])
async def test_the_slot_is_free_at_once_however_the_run_ends(
    served: Serve, model_server: ModelServer, how: str
) -> None:
    seconds = []
    while not seconds or (min(seconds) > AT_ONCE and len(seconds) < TRIES):
        seconds.append(await stopped(served, model_server, how))
    assert min(seconds) <= AT_ONCE, seconds


async def test_it_is_resumed_after_a_cut_on_another_instance(served: Serve, redis_server: RedisServer) -> None:
    log = {"TRICORN_LOG": f"unix://{redis_server.path}"}
    conversation = "resumed"
    async with served(**log) as one, served(**log) as other:
        async with one.connect(conversation) as client:
            await client.post("Count from one to ten.", conversation)
            seen = [(await client.until("agent_message")).last]
            await client.break_off()
        async with other.connect(conversation, after=seen[-1]["seq"]) as client:
            events = [each for each in (await client.until("agent_completed")).objects if "run" in each]
            assert [each["seq"] for each in events] == list(range(seen[-1]["seq"] + 1, events[-1]["seq"] + 1))
            assert events[-1]["outcome"] == "success"
            before = len((await other_replay(one, conversation))["text"])
            assert before == len(events[-1]["text"])
            again = await run_of(client, SHORT, conversation)
    assert again[-1]["outcome"] == "success"
    assert again[-1]["usage"]["input"] > events[-1]["usage"]["input"] + events[-1]["usage"]["output"]


async def other_replay(instance: Instance, conversation: str) -> dict[str, Any]:
    """The end of the first run, as an instance replays it."""
    async with instance.connect(conversation) as client:
        return (await client.until("agent_completed")).last


async def test_a_conversation_that_is_too_long_is_refused_clearly(served: Serve) -> None:
    async with served() as instance:
        events = await instance.ask("dragon " * 3000)
    assert events[-1]["outcome"] == "failed"
    assert events[-1]["error"] == "this is too long for the model: shorten it, or begin a new conversation"


async def test_it_answers_by_a_schema_if_the_request_says_so(model_server: ModelServer) -> None:
    cities = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Cairo"]}}, "required": ["city"]}
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": cities}}
    model = Model("smollm2", base_url=model_server.base_url, options={"response_format": schema})
    with trio.fail_after(60):
        result = await ask(model, "Which city is in Norway?")
    assert result.outcome == "success"
    assert json.loads(result.answer)["city"] in ("Oslo", "Cairo")
