"""What `run.history()` finds, on every log."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from fixtures.chats import Refusing, Talk, log, log_url, talk
from tricorn.chat import AgentError, Run, ToolCall, ToolError, Turn
from tricorn.chat.logs import connect
from tricorn.chat.logs.base import Unavailable
from tricorn.chat.settings import ChatSettings

__all__ = ["log"]

Seen = list[list[Turn]]


def briefly(turns: list[Turn]) -> list[tuple[str, str, str]]:
    return [(turn.text, turn.answer, turn.outcome) for turn in turns]


class Agent:
    """Does what it is told, and looks at the history first."""

    def __init__(self, **bounds: int) -> None:
        self.seen: Seen = []
        self.calls: list[tuple[int, int]] = []
        self._bounds: Any = bounds
        self.gate = trio.Event()

    async def __call__(self, run: Run) -> None:
        self.seen.append(await run.history(**self._bounds))
        match run.message.split():
            case ["fail"]:
                await run.say("so far")
                raise AgentError("as it had to")
            case ["stall"]:
                await run.say("so ")
                await run.say("far")
                await trio.sleep_forever()
            case ["gate"]:
                await self.gate.wait()
            case ["tools"]:
                async with run.tool("weather", city="Oslo") as tool:
                    tool.result = {"rain": True}
                with pytest.raises(ToolError):
                    async with run.tool("weather", city="Bergen"):
                        raise ToolError("no station")
                await run.say("rain")
            case ["long", number]:
                for index in range(int(number)):
                    await run.think("hm")
                    await run.say(f"{index % 10}")
            case ["wide"]:
                for _ in range(10):
                    await run.say("0123456789" * 30)
            case _:
                await run.say(f"{run.message}?")


async def test_earlier_turns_have_their_texts_tools_and_outcomes(log: Refusing) -> None:
    agent = Agent()
    async with talk(agent, log, run_timeout=1.0) as client:
        for text in ("hello", "tools", "fail", "stall"):
            await client.run(text)
        await client.post("stall")
        await client.until("agent_message")
        await client.say("cancel", run=(await client.until("agent_message"))["run"])
        await client.until("agent_completed")
        await client.run("last")
    assert agent.seen[:2] == [[], [Turn("local", "hello", agent.seen[1][0].at, "hello?", "success")]]
    assert briefly(agent.seen[-1]) == [
        ("hello", "hello?", "success"),
        ("tools", "rain", "success"),
        ("fail", "so far", "failed"),
        ("stall", "so far", "timeout"),
        ("stall", "so far", "cancelled"),
    ]
    assert agent.seen[-1][1].tools == (
        ToolCall("weather", {"city": "Oslo"}, {"rain": True}),
        ToolCall("weather", {"city": "Bergen"}, None, "no station"),
    )
    assert agent.seen[-1][2].error == "as it had to"
    assert [turn.at for turn in agent.seen[-1]] == sorted(turn.at for turn in agent.seen[-1])


async def test_posts_that_wait_are_not_part_of_it(log: Refusing) -> None:
    agent = Agent()
    async with talk(agent, log) as client:
        for text in ("gate", "one", "two"):
            await client.post(text)
            await client.until("posted")
        agent.gate.set()
        for _ in range(3):
            await client.until("agent_completed")
    assert [[turn.text for turn in seen] for seen in agent.seen] == [[], ["gate"], ["gate", "one"]]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"turns": 2}, [("two", "two?", "success"), ("three", "three?", "success")]),
        ({"turns": 0}, []),
        ({"characters": 18}, [("two", "two?", "success"), ("three", "three?", "success")]),
        ({"characters": 17}, [("three", "three?", "success")]),
        ({"characters": 8}, [("three", "ee?", "success")]),
        ({"characters": 3}, [("thr", "", "success")]),
        ({"characters": 0}, []),
    ],
)
async def test_it_is_bounded(log: Refusing, bounds: dict[str, int], expected: list[Any]) -> None:
    agent = Agent(**bounds)
    async with talk(agent, log) as client:
        for text in ("one", "two", "three", "last"):
            await client.run(text)
    assert briefly(agent.seen[-1]) == expected


async def test_a_last_turn_that_is_too_long_comes_without_its_tools(log: Refusing) -> None:
    agent = Agent(characters=20)
    async with talk(agent, log) as client:
        for text in ("one", "tools", "last"):
            await client.run(text)
    assert briefly(agent.seen[-1]) == [("tools", "rain", "success")]
    assert agent.seen[-1][0].tools == ()


async def test_an_answer_too_long_for_the_last_event_is_joined_from_its_pieces(log: Refusing) -> None:
    agent = Agent()
    async with talk(agent, log, event_bytes=4096) as client:
        end = await client.run("wide")
        assert "text" not in end
        await client.run("last")
    assert agent.seen[-1][0].answer == "0123456789" * 300


@asynccontextmanager
async def served(agent: Agent, request: pytest.FixtureRequest, kind: str, **settings: Any) -> AsyncGenerator[Talk]:
    store = connect(log_url(request, kind), ChatSettings(lease=2.0, **settings))
    async with talk(agent, store, **settings) as client:
        yield client


@pytest.mark.parametrize("kind", ["sqlite", "redis", "postgres"])
async def test_it_is_the_same_after_a_restart(request: pytest.FixtureRequest, kind: str) -> None:
    agent = Agent()
    async with served(agent, request, kind) as client:
        await client.run("tools")
        await client.post("stall")
        await client.until("agent_message")
        await client.until("agent_message")
        conversation = client._conversation
    async with served(agent, request, kind) as client:
        client._conversation, client._posts = conversation, 2
        await client.say("open")
        await client.post("after")
        while (await client.until("agent_completed")).get("text") != "after?":
            pass
    assert briefly(agent.seen[-1]) == [("tools", "rain", "success"), ("stall", "so far", "interrupted")]
    assert len(agent.seen[-1][0].tools) == 2


@pytest.mark.parametrize("kind", ["memory", "sqlite", "redis", "postgres"])
async def test_it_begins_where_the_log_begins(request: pytest.FixtureRequest, kind: str) -> None:
    agent = Agent()
    async with served(agent, request, kind, retention_events=30) as client:
        for text in ("one", "two", "long 50", "three", "four"):
            await client.run(text)
        await client.run("last")
    for seen in agent.seen[3:]:
        assert [turn.text for turn in seen] in (["three"], ["three", "four"], ["long 50"], ["long 50", "three"], [])
        assert all(turn.answer for turn in seen)
    assert ("four", "four?", "success") in briefly(agent.seen[-1])
    assert "one" not in [turn.text for turn in agent.seen[-1]]


async def test_a_log_that_does_not_answer_is_unavailable(log: Refusing) -> None:
    raised: list[str] = []

    async def refuse(*_: Any) -> Any:
        raise Unavailable("no answer")

    async def agent(run: Run) -> None:
        log.find = refuse  # type: ignore[attr-defined]
        try:
            await run.history()
        except Unavailable as error:
            raised.append(str(error))

    async with talk(agent, log) as client:
        assert (await client.run())["outcome"] == "success"
    assert raised == ["no answer"]


class Counting:
    """A log that counts how many entries are read."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self.entries = 0
        self.largest = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    async def __aenter__(self) -> Counting:
        await self._log.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> Any:
        return await self._log.__aexit__(*error)

    async def read(self, conversation: str, after: int, limit: int) -> Any:
        entries = await self._log.read(conversation, after, limit)
        self.entries += len(entries)
        self.largest = max(self.largest, len(entries))
        return entries


async def test_of_a_long_conversation_only_what_is_needed_is_read() -> None:
    agent = Agent(turns=3)
    counting = Counting(connect("memory:", ChatSettings()))
    async with talk(agent, counting) as client:
        for text in ("one", "long 5000", "two", "three", "long 500", "four"):
            await client.run(text)
        counting.entries = 0
        await client.run("last")
    assert [turn.text for turn in agent.seen[-1]] == ["three", "long 500", "four"]
    assert 0 < counting.entries < 2000
    assert counting.largest <= 256


async def test_a_run_too_long_to_be_read_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tricorn.chat.history.ENTRIES", 600)
    agent = Agent()
    async with talk(agent, connect("memory:", ChatSettings())) as client:
        for text in ("long 500", "two", "last"):
            await client.run(text)
    assert [turn.text for turn in agent.seen[-1]] == ["two"]


async def test_there_is_none_after_the_end_of_the_run() -> None:
    runs: list[Run] = []

    async def agent(run: Run) -> None:
        runs.append(run)

    async with talk(agent, connect("memory:", ChatSettings())) as client:
        await client.run()
        with pytest.raises(RuntimeError, match="the run is over"):
            await runs[0].history()
        with pytest.raises(RuntimeError, match="the run is over"):
            runs[0].used(input=1, output=1)
