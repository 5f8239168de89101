"""A log whose driver fails as no driver should: its callers get Unavailable, and it goes on."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from secrets import token_hex
from typing import Any, NoReturn

import pytest
import trio

from fixtures.chats import Refusing, log, log_url, talk
from fixtures.records import Records
from tricorn.chat import Run
from tricorn.chat.logs import base, connect, postgres, redis
from tricorn.chat.logs.conformance import post
from tricorn.chat.logs.sqlite_file import File
from tricorn.chat.settings import ChatSettings

__all__ = ["log"]


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    return Records(capfd)


async def echo(run: Run) -> None:
    await run.say(run.message)


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise ImportError("imports are refused")


async def test_a_chat_goes_on_when_imports_are_refused(log: Refusing, monkeypatch: pytest.MonkeyPatch) -> None:
    async with talk(echo, log) as client:
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "__import__", refuse)
            await client.post("while they are refused")
            first = await client.first("agent_completed", "error")
        assert first.get("code", "unavailable") == "unavailable"
        assert (await client.run("afterwards"))["text"] == "afterwards"


def break_postgres(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(postgres, "_fetch", refuse)


def break_redis(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(redis, "_request", refuse)


def break_sqlite(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(File, "append", refuse)


def break_threads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(File, "serve", refuse)


@pytest.mark.parametrize(
    ("kind", "break_it"),
    [
        ("postgres", break_postgres),
        ("redis", break_redis),
        ("sqlite", break_sqlite),
        ("sqlite", break_threads),
    ],
)
async def test_whatever_a_driver_raises_is_unavailable_with_its_cause(
    kind: str,
    break_it: Callable[[pytest.MonkeyPatch], None],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    records: Records,
) -> None:
    async with connect(log_url(request, kind), ChatSettings()) as store:
        conversation = token_hex(8)
        epoch = (await store.open(conversation)).epoch
        with monkeypatch.context() as patch:
            break_it(patch)
            with pytest.raises(base.Unavailable, match="ImportError: imports are refused") as caught:
                await store.append(conversation, epoch, base.Append(post("p")))
        assert isinstance(caught.value.__cause__, ImportError)
        assert records.read("ERROR")[0]["message"] == "ImportError: imports are refused"
        with trio.fail_after(30):
            entry, _ = await store.append(conversation, epoch, base.Append(post("q")))
        assert entry.seq == 1
