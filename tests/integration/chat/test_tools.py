"""Tools that a model calls, on each log: what clients see of them, also if the log refuses or the user cancels."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from fixtures.chats import Refusing, errors, log, talk
from fixtures.records import Records
from tricorn.chat import Run, ToolError, tool
from tricorn.chat.logs.base import Unavailable
from tricorn.chat.model_tools import by_name

__all__ = ["log"]


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    return Records(capfd)


@tool
async def forecast(city: str) -> dict[str, float]:
    await trio.lowlevel.checkpoint()
    if city == "Atlantis":
        raise ToolError("no weather station in Atlantis")
    return {"rain": float("nan") if city == "Cairo" else 0.5}


@tool
def numbers(count: int) -> list[int]:
    return list(range(count))


@tool(seconds=0.05)
async def wait(seconds: float) -> None:
    await trio.sleep(seconds)


@tool
async def hold() -> None:
    await trio.sleep_forever()


TOOLS = by_name([forecast, numbers, wait, hold])


async def agent(run: Run) -> None:
    """Do each line of the message at once: the name of a tool, and its arguments. Say what the model would get."""
    texts: dict[str, str] = {}

    async def call(line: str) -> None:
        name, _, arguments = line.partition(" ")
        texts[line] = await TOOLS[name].call(run, arguments)

    lines = run.message.split("\n")
    async with trio.open_nursery() as nursery:
        for line in lines:
            nursery.start_soon(call, line)
    await run.say("\n".join(texts[line] for line in lines))


def ends(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Result or error of each call, by its tool and arguments."""
    started = {event["call"]: event for event in events if event["type"] == "tool_executing"}
    ended = {event["call"]: event for event in events if event["type"] == "tool_completed"}
    assert started.keys() == ended.keys()
    return {f"{each['tool']} {each['arguments']}": ended[call_id] for call_id, each in started.items()}


async def test_calls_at_once_have_their_own_events_and_answers(log: Refusing, records: Records) -> None:
    lines = ['forecast {"city":"Oslo"}', 'forecast {"city":"Cairo"}', 'forecast {"city":"Atlantis"}']
    lines += ['numbers {"count":3}', 'wait {"seconds":3600}', "numbers {}"]
    async with talk(agent, log) as client:
        end = await client.run("\n".join(lines))
        seen = ends(await client.all_events())
    assert end["outcome"] == "success"
    assert end["text"].split("\n") == [
        '{"rain":0.5}',
        '{"rain":"NaN"}',
        "Error: no weather station in Atlantis",
        "[0,1,2]",
        "Error: timed out after 0.05 s",
        "Error: wrong arguments: Object missing required field `count`",
    ]
    assert {key: each.get("result", each.get("error")) for key, each in seen.items()} == {
        "forecast {'city': 'Oslo'}": {"rain": 0.5},
        "forecast {'city': 'Cairo'}": {"rain": "NaN"},
        "forecast {'city': 'Atlantis'}": "no weather station in Atlantis",
        "numbers {'count': 3}": [0, 1, 2],
        "wait {'seconds': 3600}": "timed out after 0.05 s",
        "numbers {}": "wrong arguments: Object missing required field `count`",
    }
    assert records.read("ERROR") == []


async def test_a_result_that_is_too_long_is_cut_in_the_log_and_the_model_gets_it(log: Refusing) -> None:
    counting = tool(characters=100)(numbers.function)

    async def agent(run: Run) -> None:
        await run.say(await counting.call(run, '{"count":1000}'))

    async with talk(agent, log, event_bytes=4096) as client:
        end = await client.run()
        [completed] = ends(await client.all_events()).values()
    assert end["text"] == "[" + ",".join(map(str, range(1000)))[:99] + "… (cut: 3891 characters in all)"
    assert completed["result"].startswith("[0,1,2,3")
    assert completed["result"].endswith("… (cut: 3891 characters in all)")


async def test_a_user_who_cancels_ends_the_tool(log: Refusing, records: Records) -> None:
    async with talk(agent, log) as client:
        await client.post("hold {}")
        run = (await client.until("tool_executing"))["run"]
        await client.say("cancel", run=run)
        completed = await client.until("tool_completed")
        end = await client.until("agent_completed")
    assert (completed["error"], end["outcome"]) == ("cancelled", "cancelled")
    assert records.read("ERROR") == []


@pytest.mark.parametrize("city", ["Oslo", "Atlantis"])
async def test_a_log_that_refuses_the_start_of_a_tool_fails_the_run(log: Refusing, city: str, records: Records) -> None:
    log.error = Unavailable("full")
    async with talk(agent, log) as client:
        log.refused = {"tool_executing"}
        await client.post(f'forecast {{"city":"{city}"}}')
        found = await errors(records)
        log.refused = set()
        end = await client.until("agent_completed")
    assert found[0]["message"] == "Unavailable: full"
    assert end["outcome"] in ("failed", "interrupted")  # the latter if another lease had to say so


async def test_a_log_that_refuses_the_end_of_a_failed_tool_has_it_before_the_end_of_the_run(log: Refusing) -> None:
    log.error = Unavailable("full")
    log.on_append = lambda type: type == "agent_message" and log.refused.clear()
    async with talk(agent, log) as client:
        log.refused = {"tool_completed"}
        await client.post('forecast {"city":"Atlantis"}')
        end = await client.until("agent_completed")
        seen = ends(await client.all_events())
    assert (end["outcome"], end["text"]) == ("success", "Error: no weather station in Atlantis")
    assert [each["error"] for each in seen.values()] == ["no weather station in Atlantis"]
