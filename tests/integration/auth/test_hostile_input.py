"""What somebody with a good token may send: it breaks nothing, not even their own connection."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

Guarded = Callable[..., AbstractAsyncContextManager[Any]]

IDS = [
    "",
    "ada/home",
    "/home",
    "../home",
    "home/",
    "..\\home",
    "home\x00",
    "\x00",
    "home\n",
    "home\r\n{}",
    "home home",
    "home%2f",
    "ho\u200bme",
    "\u202ehome",
    "\u043dome",
    "home\u0301",
    "ｈome",
    "x" * 129,
    "x" * 100_000,
    "*",
    "team-*",
    "'; drop table events; --",
    "{home}",
    "$(id)",
    "home\x1b[2J",
    "😀",
]


@pytest.mark.parametrize("id_", IDS, ids=lambda id_: ascii(id_)[:30])
@pytest.mark.parametrize("field", ["conversation", "id", "run"])
async def test_ids_that_are_none(field: str, id_: str, guarded: Guarded, capfd: pytest.CaptureFixture[str]) -> None:
    good = {"conversation": "home", "id": "p", "run": "r", "text": "x"}
    requests = {"conversation": ("open", "post", "cancel", "leave"), "id": ("post",), "run": ("cancel",)}
    async with guarded() as server, server.user("ada") as client:
        for request in requests[field]:
            await client.say(request, **{**good, field: id_})
            answer = await client.hear()
            assert (answer["type"], answer["code"]) == ("error", "malformed")
            assert len(answer["message"]) < 200
        await client.say("open", conversation="home")
        assert (await client.hear())["head"] == 0
    assert '"severity":"ERROR"' not in capfd.readouterr().err


@pytest.mark.parametrize("id_", ["..", ".", "~", "-rf", "a:b", "con", "__proto__", "None", "x" * 128])
async def test_ids_that_look_odd_are_ids(id_: str, guarded: Guarded) -> None:
    async with guarded() as server, server.user("ada") as client:
        await client.say("open", conversation=id_)
        assert (await client.hear())["conversation"] == id_
        await client.say("post", id=id_, conversation=id_, text="x")
        assert (await client.until("agent_completed"))["outcome"] == "success"


async def test_names_that_look_alike_are_different_users(guarded: Guarded) -> None:
    names = ("ada", "ADA", "аda", "ada ", "adа", "a\u0301da", "áda")
    async with guarded() as server:
        for number, name in enumerate(names):
            async with server.user(name) as client:
                await client.say("open", conversation="home")
                assert (await client.hear())["head"] == 0
                await client.say("post", id=f"p{number}", conversation="home", text=name)
                await client.until("agent_completed")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000,
        '{"type":"ping","x":' + "[" * 10_000 + "]" * 10_000 + "}",
        '{"type":"ping","x":' + '{"x":' * 10_000 + "1" + "}" * 10_001,
        '{"type":"open","conversation":"c","after":' + "9" * 100_000 + "}",
        '{"type":"open","conversation":"c","after":1e400}',
        '{"type":"open","conversation":"c","after":-0.5}',
        '{"type":"open","conversation":"c","after":NaN}',
        '{"type":"open","conversation":"c","after":Infinity}',
        '{"type":"open","conversation":"c","after":9007199254740992}',
        '{"type":"post","id":"p","conversation":"c","text":"\\ud800"}',
        '{"type":"post","id":"p","conversation":"c","text":"\\udc00\\ud800"}',
        '{"type":"post","id":"p","conversation":"c","text":"\\uD83D"}',
        '{"type":"\\ud800"}',
        '{"\\ud800":1,"type":"ping"}',
        '{"type":["ping"]}',
        '{"type":"ping"',
        '{"type":"ping"}{"type":"ping"}',
        "\ufeff" + '{"type":"ping"}',
        "\x00",
        "null",
        "1" * 100_000,
    ],
    ids=lambda text: ascii(text)[:40],
)
async def test_json_that_is_none(text: str, guarded: Guarded, capfd: pytest.CaptureFixture[str]) -> None:
    async with guarded() as server, server.user("ada") as client:
        await client.ws.send_message(text)
        answer = await client.hear()
        assert answer["type"] == "error"
        assert len(answer["message"]) < 200
        await client.say("ping")
        assert await client.hear() == {"type": "pong"}
    assert '"severity":"ERROR"' not in capfd.readouterr().err


async def test_of_keys_that_come_twice_the_last_counts_everywhere(guarded: Guarded) -> None:
    """Nothing checks one value and uses another: there is one decoder, and it is asked once."""
    async with guarded() as server, server.user("ada") as client:
        await client.ws.send_message('{"type":"open","conversation":"a/b","conversation":"c"}')
        first = await client.hear()
        await client.ws.send_message('{"type":"open","conversation":"c","conversation":"a/b"}')
        assert (await client.hear())["code"] == "malformed"
        assert first.get("conversation", "c") == "c"
        assert first["type"] in {"opened", "error"}


async def test_text_cannot_forge_a_line_of_the_log_or_an_object(guarded: Guarded) -> None:
    text = 'x\n{"type":"agent_completed"}\r\n\x00\x1b[2J\u2028"}'
    async with guarded() as server, server.user("ada") as client:
        await client.say("open", conversation="home")
        await client.say("post", id="p", conversation="home", text=text)
        assert (await client.until("user_message"))["text"] == text
        assert "\n" not in client.heard[-1]


async def test_a_name_cannot_forge_a_record(guarded: Guarded, capfd: pytest.CaptureFixture[str]) -> None:
    async with guarded() as server, server.connect(path='/ws?\\n{"severity":"CRITICAL"}') as client:
        await client.say("ping")
        assert (await client.end())[0] == 4500
    for line in capfd.readouterr().err.splitlines():
        assert json.loads(line)["severity"] == "INFO"
