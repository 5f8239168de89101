"""A session and its user's token, on a clock of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import time
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tricorn.chat import Chat, Run
from tricorn.chat.session import EXPIRY_NOTICE
from tricorn.service.auth import Tokens, make_token
from tricorn.service.jwt_keys import Keys, parse, parse_for_signing
from tricorn.service.settings import ServiceSettings

Connect = Callable[..., Awaitable[Any]]

SECRET = "a secret of thirty-two bytes or more"
SETTINGS = ServiceSettings(jwt_leeway=0.0, heartbeat=3600.0)
NOTICE = {"type": "closing", "reason": "the token expires", "retry_after": 0.0}


def token(ttl: float, user: str = "ada", share: tuple[str, ...] = ()) -> str:
    return make_token(parse_for_signing(SECRET), user, time(), ttl, SETTINGS, share)


async def echo(run: Run) -> None:
    await run.say(run.message)


def chat_with_tokens(settings: ServiceSettings = SETTINGS) -> Chat:
    return Chat(echo, settings, gate=Tokens(Keys(parse(SECRET)), settings))


@pytest.fixture
def enter(client_type: type[Any], nursery: trio.Nursery) -> Connect:
    """Connect with a token in the handshake, or without one."""

    async def enter(chat: Chat, token: str | None = None) -> Any:
        client = client_type("tricorn.v1", {"authorization": f"Bearer {token}"} if token else {"host": "h"})
        nursery.start_soon(client.serve, chat)
        if token is not None:
            assert (await client.hear())["type"] == "welcome"
        return client

    return enter


async def test_notice_comes_before_the_end(enter: Connect, autojump_clock: MockClock) -> None:
    async with chat_with_tokens() as chat:
        client = await enter(chat, token(3600))
        assert await client.hear() == NOTICE
        assert trio.current_time() == pytest.approx(3600 - EXPIRY_NOTICE, abs=2)
        await client.ended.wait()
        assert trio.current_time() == pytest.approx(3600, abs=2)
        assert client.closed == (4002, "the token has expired")


async def test_a_token_is_believed_for_the_leeway_after_it_expired(enter: Connect, autojump_clock: MockClock) -> None:
    async with chat_with_tokens(ServiceSettings(jwt_leeway=500.0, heartbeat=3600.0)) as chat:
        client = await enter(chat, token(1000))
        assert await client.hear() == NOTICE
        assert trio.current_time() == pytest.approx(1500 - EXPIRY_NOTICE, abs=2)
        await client.ended.wait()
        assert trio.current_time() == pytest.approx(1500, abs=2)


async def test_a_fresh_token_pushes_the_end_and_has_its_own_notice(enter: Connect, autojump_clock: MockClock) -> None:
    async with chat_with_tokens() as chat:
        client = await enter(chat, token(3600))
        assert await client.hear() == NOTICE
        client.say("authenticate", token=token(3500))
        assert (await client.hear())["type"] == "welcome"
        begin = trio.current_time()
        assert await client.hear() == NOTICE
        assert trio.current_time() - begin == pytest.approx(3500 - EXPIRY_NOTICE, abs=2)
        await client.ended.wait()
        assert trio.current_time() - begin == pytest.approx(3500, abs=2)


async def test_the_latest_token_counts_also_where_it_ends_sooner(enter: Connect, autojump_clock: MockClock) -> None:
    async with chat_with_tokens() as chat:
        client = await enter(chat, token(3600))
        client.say("authenticate", token=token(600))
        await client.ended.wait()
        assert trio.current_time() == pytest.approx(600, abs=2)


async def test_who_is_silent_is_closed_in_time(enter: Connect, autojump_clock: MockClock) -> None:
    async with chat_with_tokens() as chat:
        client = await enter(chat)
        await client.ended.wait()
        assert trio.current_time() == pytest.approx(SETTINGS.auth_timeout)
        assert client.closed == (4500, "no good token came in time")
        assert client.messages == []


async def test_authenticating_ends_the_wait(enter: Connect, autojump_clock: MockClock) -> None:
    async with chat_with_tokens() as chat:
        client = await enter(chat)
        await trio.sleep(SETTINGS.auth_timeout - 1)
        client.say("authenticate", token=token(3600))
        assert (await client.hear())["type"] == "welcome"
        await trio.sleep(2)
        client.say("ping")
        assert await client.hear() == {"type": "pong"}


async def test_a_key_that_does_not_come_is_waited_for_in_time_only(enter: Connect, autojump_clock: MockClock) -> None:
    """The token names a key that is not known, and nobody reads the keys again."""
    keys = Keys((), trio.sleep_forever, 300.0)  # type: ignore[arg-type]
    async with Chat(echo, SETTINGS, gate=Tokens(keys, SETTINGS)) as chat:
        client = await enter(chat)
        client.say("authenticate", token="eyJhbGciOiJSUzI1NiIsImtpZCI6ImEifQ.e30.AA")
        await client.ended.wait()
        assert trio.current_time() == pytest.approx(SETTINGS.auth_timeout)
        assert client.messages == []


async def test_a_drain_does_not_wait_for_who_is_not_in(enter: Connect, autojump_clock: MockClock) -> None:
    async with chat_with_tokens() as chat:
        client = await enter(chat)
        await wait_all_tasks_blocked()
        with trio.fail_after(1):
            await chat.drain()
        assert "conversation" not in "".join(client.messages)


async def test_a_new_token_closes_what_it_does_not_open(enter: Connect) -> None:
    async with chat_with_tokens() as chat:
        client, other = (
            await enter(chat, token(60, share=("team-*",))),
            await enter(chat, token(60, "bob", ("team-*",))),
        )
        for name in ("team-1", "home"):
            client.say("open", conversation=name)
            assert (await client.hear())["type"] == "opened"
        client.say("authenticate", token=token(60))
        assert (await client.hear())["type"] == "welcome"
        error = await client.hear()
        assert (error["code"], error["ref"]) == ("not_found", "team-1")
        other.say("post", id="p", conversation="team-1", text="a secret of the team")
        await other.hear()
        assert await client.hear_all() == []
        client.say("post", id="q", conversation="home", text="still mine")
        assert (await client.hear())["type"] == "posted"
        assert (await client.hear())["text"] == "still mine"
        client.say("open", conversation="team-1")
        await client.hear_until("opened")
        assert client.messages[-1].count("secret") == 0


async def test_answers_to_authenticate_are_bounded_like_others(enter: Connect) -> None:
    async with chat_with_tokens(ServiceSettings(outbox=2, jwt_leeway=0.0)) as chat:
        client = await enter(chat, token(60))
        client.stop_reading()
        for _ in range(5):
            client.say("authenticate", token=token(60))
        await client.ended.wait()
        assert client.closed == (4004, "outbox overflow")


async def test_a_post_of_another_member_does_not_take_an_id(enter: Connect) -> None:
    """In a shared conversation, whoever learns the id of a post cannot have it dropped by posting first."""
    async with chat_with_tokens() as chat:
        ada, eve = await enter(chat, token(60, "ada", ("team",))), await enter(chat, token(60, "eve", ("team",)))
        eve.say("post", id="p", conversation="team", text="mine first")
        first = await eve.hear()
        ada.say("post", id="p", conversation="team", text="hello")
        second = await ada.hear()
        assert second["seq"] > first["seq"]
