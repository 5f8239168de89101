"""What goes wrong inside stays inside: clients get an id, and records are one line of JSON each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from tricorn.chat import Run, ToolError
from tricorn.chat.logs.memory import MemoryLog

Chatting = Callable[..., AbstractAsyncContextManager[Any]]

INTERNAL = "password=hunter2 in /srv/secrets"
EVIL = f'\n{{"severity":"INFO"}}\n\x1b[2J\x9b31m\x00 {INTERNAL}'


def records(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    written = capfd.readouterr().err
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", written) is None
    return [json.loads(line) for line in written.removesuffix("\n").split("\n")]


def check_sees_nothing(seen: Any) -> None:
    text = json.dumps(seen)
    for word in ("hunter2", "secrets", "Traceback", "RuntimeError", "OSError", ".py", "\\u001b", "\\u009b"):
        assert word not in text


async def test_an_agent_that_fails(chatting: Chatting, capfd: pytest.CaptureFixture[str]) -> None:
    async def agent(run: Run) -> None:
        async with run.tool("open"):
            raise OSError(EVIL)

    async with chatting(agent) as server, server.connect() as client:
        await client.send("open", conversation="c")
        await client.post("go")
        seen = await client.until("agent_completed")
    check_sees_nothing(seen)
    assert seen[-1]["outcome"] == "failed"
    error = next(record for record in records(capfd) if record["severity"] == "ERROR")
    assert error["error_id"] == seen[-1]["error_id"]
    assert INTERNAL in error["message"]


async def test_a_tool_says_what_it_means_to_say(chatting: Chatting, capfd: pytest.CaptureFixture[str]) -> None:
    async def agent(run: Run) -> None:
        async with run.tool("open"):
            raise ToolError("there is no such file") from OSError(EVIL)

    async with chatting(agent) as server, server.connect() as client:
        await client.send("open", conversation="c")
        await client.post("go")
        seen = await client.until("agent_completed")
    check_sees_nothing(seen)
    assert seen.events()[3]["error"] == "there is no such file"


@pytest.mark.parametrize("method", ["open", "append_nowait", "find"])
async def test_a_log_that_fails(
    chatting: Chatting, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(EVIL)

    async with chatting(user_runs=1) as server, server.connect() as client:
        if method == "find":  # asked where there is no room
            await client.post("wait", "another")
            await client.answer("posted")
        monkeypatch.setattr(MemoryLog, method, fail)
        post = await client.post("hello")
        error = await client.answer("error")
        monkeypatch.undo()
    assert (error["code"], error["ref"], error["message"]) == ("internal", post, "internal server error")
    check_sees_nothing(error)
    assert error["error_id"] in [record.get("error_id") for record in records(capfd)]


@pytest.mark.parametrize(
    "line",
    [
        '{"type": "\\u001b[2J\\u009b31m"}',
        '{"type": "open", "conversation": "c\\n{}"}',
        '{"type": "post", "id": "\\u001b[2J", "conversation": "c", "text": "x"}',
        '{"type": "cancel", "conversation": "c", "run": "\\u0000"}',
        "\x1b[2J",
    ],
)
async def test_ids_and_types_are_no_way_into_a_record(
    chatting: Chatting, capfd: pytest.CaptureFixture[str], line: str
) -> None:
    async with chatting() as server, server.connect() as client:
        await client.ws.send_message(line)
        assert (await client.receive())["type"] == "error"
    assert [record["message"] for record in records(capfd)] == ["connection closed"]
