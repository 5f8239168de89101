"""MCP servers as tools: real processes that speak with us over their stdin and stdout."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from fixtures.chats import Refusing, log, talk
from fixtures.records import Records
from tricorn.chat import Run
from tricorn.chat import mcp as mcp_module
from tricorn.chat.mcp import mcp
from tricorn.chat.model_tools import by_name
from tricorn.chat.protocol import ToolCompleted
from tricorn.chat.testing import Result, ask

__all__ = ["log"]

SERVER = str(Path(__file__).parents[2] / "fixtures" / "mcp_server.py")


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    return Records(capfd)


@pytest.fixture
def pid_file(tmp_path: Path) -> Path:
    return tmp_path / "pid"


def is_alive(pid_file: Path) -> bool:
    with suppress(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
        return True
    return False


async def calling(*calls: tuple[str, str], **options: Any) -> tuple[list[str], Result]:
    """What a model gets for each of these calls, and the run."""
    texts: list[str] = []

    async def agent(run: Run) -> None:
        async with mcp(sys.executable, SERVER, **options) as tools:
            for name, arguments in calls:
                texts.append(await by_name(tools)[name].call(run, arguments))

    with trio.fail_after(60):
        return texts, await ask(agent, "go")


async def test_a_server_has_its_tools_with_names_that_models_take() -> None:
    async with mcp(sys.executable, SERVER) as tools:
        named = by_name(tools)
    assert list(named) == ["forecast", "numbers", "dotted_name_x", "refuse", "wait", "picture", "die"]
    assert tools[2].definition.name == "dotted.name/x"
    assert named["forecast"].description == "Return the weather in a city."
    assert named["forecast"].parameters["required"] == ["city"]
    assert named["forecast"].parameters["properties"]["days"] == {"default": 1, "title": "Days", "type": "integer"}


async def test_a_tool_is_called_with_its_arguments(records: Records) -> None:
    texts, result = await calling(("forecast", '{"city":"Oslo","days":2}'), ("numbers", '{"count":2}'), ("picture", ""))
    assert texts == ["Oslo: rain for 2 d", "0\n1", "(image/png, which is no text)"]
    shown = [event for event in result.events if isinstance(event, ToolCompleted)]
    assert [(event.tool, event.result) for event in shown] == list(
        zip(["forecast", "numbers", "picture"], texts, strict=True)
    )
    assert (result.outcome, records.read("ERROR")) == ("success", [])


async def test_the_environment_has_what_it_is_given() -> None:
    texts, _ = await calling(("dotted_name_x", ""), env={"SECRET": "a key"})
    assert texts == ["a key"]


async def test_what_a_server_says_against_a_call_is_told_to_the_model(records: Records) -> None:
    texts, result = await calling(("refuse", "{}"), ("forecast", '{"city":3}'), ("forecast", "[]"))
    assert texts[0] == "Error: Error executing tool refuse: no weather station in Atlantis"
    assert texts[1].startswith("Error: Error executing tool forecast: 1 validation error")
    assert texts[2] == "Error: the arguments must be a JSON object: Expected `object`, got `array`"
    assert (result.outcome, records.read("ERROR")) == ("success", [])


async def test_a_call_that_takes_too_long_is_cancelled_and_the_server_goes_on() -> None:
    texts, _ = await calling(("wait", '{"seconds":3600}'), ("forecast", '{"city":"Oslo"}'), seconds=1)
    assert texts == ["Error: timed out after 1 s", "Oslo: rain for 1 d"]


async def test_a_long_result_is_cut_for_the_model() -> None:
    texts, _ = await calling(("numbers", '{"count":1000}'), characters=10)
    assert texts == ["0\n1\n2\n3\n4\n… (cut: 3889 characters in all)"]


async def test_a_server_that_dies_fails_its_calls_and_not_the_run(records: Records) -> None:
    texts, result = await calling(("die", "{}"), ("forecast", '{"city":"Oslo"}'))
    reported = records.read("ERROR")
    assert texts == [f"Error: the tool failed (error id {each['error_id']})" for each in reported]
    assert [each["message"] for each in reported] == ["MCPError: Connection closed"] * 2
    assert result.outcome == "success"


async def test_several_calls_at_once_on_each_log(log: Refusing) -> None:
    texts: dict[str, str] = {}

    async def call(run: Run, tool: Any, arguments: str) -> None:
        texts[arguments] = await tool.call(run, arguments)

    async def agent(run: Run) -> None:
        async with mcp(sys.executable, SERVER) as tools, trio.open_nursery() as nursery:
            for seconds in ("0.02", "0.01"):
                nursery.start_soon(call, run, by_name(tools)["wait"], f'{{"seconds":{seconds}}}')

    async with talk(agent, log) as client:
        end = await client.run("go")
        events = await client.all_events()
    assert end["outcome"] == "success"
    assert texts == {f'{{"seconds":{each}}}': f"waited {each} s" for each in ("0.02", "0.01")}
    started = {event["call"]: event["arguments"]["seconds"] for event in events if event["type"] == "tool_executing"}
    ended = {event["call"]: event["result"] for event in events if event["type"] == "tool_completed"}
    assert ended == {call_id: f"waited {seconds:g} s" for call_id, seconds in started.items()}


@pytest.mark.parametrize("end", ["returns", "raises", "is cancelled"])
async def test_the_process_ends_with_the_block(end: str, pid_file: Path) -> None:
    async def agent(run: Run) -> None:
        async with mcp(sys.executable, SERVER, str(pid_file)) as tools:
            assert is_alive(pid_file)
            if end == "raises":
                raise LookupError(end)
            if end == "is cancelled":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(by_name(tools)["wait"].call, run, '{"seconds":3600}')
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    outer.cancel()

    with trio.CancelScope() as outer:
        result = await ask(agent, "go")
        assert result.outcome == ("failed" if end == "raises" else "success")
    assert outer.cancelled_caught == (end == "is cancelled")
    assert not is_alive(pid_file)


async def test_a_command_that_does_not_exist_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-command"):
        async with mcp("no-such-command"):
            raise AssertionError


@pytest.mark.parametrize("program", ["pass", "print('hello')", "import sys; print('{}'); sys.exit(3)"])
async def test_a_program_that_is_no_mcp_server_is_an_os_error(program: str) -> None:
    with pytest.raises(OSError, match="does not answer as an MCP server: Connection closed"):
        async with mcp(sys.executable, "-c", program):
            raise AssertionError


async def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_module, "START", 0.1)
    with pytest.raises(OSError, match=r"does not answer as an MCP server: no answer within 0\.1 s"):
        async with mcp(sys.executable, "-c", "import sys; sys.stdin.read()"):
            raise AssertionError


AGENT = """
import sys

from tricorn.chat import Run
from tricorn.chat.mcp import mcp
from tricorn.chat.model_tools import by_name


async def agent(run: Run) -> None:
    async with mcp(sys.executable, {server!r}) as tools:
        for name, arguments in (("numbers", '{{"count":2}}'), ("refuse", ""), ("die", "")):
            await run.say(await by_name(tools)[name].call(run, arguments))
"""


async def test_nothing_is_imported_late_by_a_served_agent(serving: Any, tmp_path: Path) -> None:
    """The import guard is set to deny."""
    (tmp_path / "my_agent.py").write_text(AGENT.format(server=SERVER))
    command = (sys.executable, "-m", "tricorn", "serve", "--bind", "127.0.0.1:0", "--agent", "my_agent:agent")
    async with serving(*command, cwd=tmp_path) as port:
        url = f"ws://127.0.0.1:{port}/ws"
        asking = (sys.executable, "-m", "tricorn", "chat", url, "--json", "--message", "go")
        chat = await trio.run_process(asking, capture_stdout=True, check=False)
    end = [json.loads(line) for line in chat.stdout.splitlines()][-1]
    assert (end["type"], end["outcome"]) == ("agent_completed", "success")
    assert end["text"].startswith(
        "0\n1Error: Error executing tool refuse: no weather station in AtlantisError: the tool"
    )
