"""pydantic-ai, which needs asyncio, as an agent: it streams, uses our tools, and is stopped with its run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import trio
from pydantic_ai import Agent as Framework
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel

from fixtures.chats import Refusing, log, talk
from tricorn.chat import Run, tool
from tricorn.chat.asyncio_bridge import from_asyncio, to_asyncio

__all__ = ["log"]


@tool
async def forecast(city: str) -> str:
    """Return the weather."""
    await trio.lowlevel.checkpoint()
    return f"rain in {city}"


async def model(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
    """A model that asks for the forecast, and then answers with it in two pieces."""
    assert [each.name for each in info.function_tools] == ["forecast"]
    if len(messages) == 1:
        yield {0: DeltaToolCall(name="forecast", json_args='{"city":"Oslo"}', tool_call_id="1")}
    else:
        for piece in ("There is ", str(messages[-1].parts[0].content)):  # type: ignore[union-attr]
            await asyncio.sleep(0)
            yield piece


async def agent(run: Run) -> None:
    async def answer() -> None:
        framework = Framework(FunctionModel(stream_function=model))

        @framework.tool_plain(name="forecast")
        async def _(city: str) -> str:
            return await from_asyncio(forecast.call, run, f'{{"city":"{city}"}}')

        async with framework.run_stream(run.message) as result:
            async for piece in result.stream_text(delta=True, debounce_by=None):
                await from_asyncio(run.say, piece)

    await to_asyncio(answer)


async def test_it_streams_and_uses_our_tools(log: Refusing) -> None:
    async with talk(agent, log) as client:
        end = await client.run("go")
        events = await client.all_events()
    assert (end["outcome"], end["text"]) == ("success", "There is rain in Oslo")
    assert [event["type"] for event in events] == [
        "user_message",
        "agent_started",
        "tool_executing",
        "tool_completed",
        "agent_message",
        "agent_message",
        "agent_completed",
    ]


async def test_a_cancelled_run_cancels_it_in_its_loop(log: Refusing) -> None:
    cancelled = threading.Event()

    async def endless(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        try:
            yield "one"
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    async def agent(run: Run) -> None:
        async def answer() -> None:
            framework = Framework(FunctionModel(stream_function=endless))
            async with framework.run_stream("go") as result:
                async for piece in result.stream_text(delta=True, debounce_by=None):
                    await from_asyncio(run.say, piece)

        await to_asyncio(answer)

    async with talk(agent, log) as client:
        await client.post()
        said = await client.until("agent_message")
        await client.say("cancel", run=said["run"])
        end = await client.until("agent_completed")
    assert (end["outcome"], cancelled.is_set()) == ("cancelled", True)


@pytest.fixture(autouse=True)
def no_model_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydantic_ai.models.ALLOW_MODEL_REQUESTS", False)
