"""URLs of logs and of keys have passwords in them, of which no error shows a part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tricorn.chat.logs import connect, postgres, redis
from tricorn.chat.logs.base import Unavailable
from tricorn.chat.settings import ChatSettings
from tricorn.service.jwt_keys import load
from tricorn.service.settings import Secret, ServiceSettings
from tricorn.settings import SettingError

QUICK = ChatSettings(log_timeout=0.02)
ENCODED = "special characters must be written as %XX in a user name, password or path: @ is %40, / is %2F"
# None of the letters is in what we or a library say of a server that is not there; 0, 1 and punctuation are.
PASSWORDS = st.text("@/:#?[]%&=,;\\ \t\n\u2100QXZJ0189", max_size=20)
PLACES = ["redis://me:{}@127.0.0.1:1/0", "unix://me:{}@/nowhere/at/all", "postgresql://me:{}@127.0.0.1:1/db"]
SAID = {ENCODED, redis.WANTED.removeprefix("log: "), postgres.WANTED.removeprefix("log: ")}
NAMES = ("Redis at 127.0.0.1:1: ", "Redis at /nowhere/at/all: ", "PostgreSQL at 127.0.0.1:1: ")


def error_of(url: str) -> str:
    async def open_log() -> None:
        async with connect(url, QUICK):
            pytest.fail("nothing is there")

    with pytest.raises((SettingError, Unavailable)) as raised:
        trio.run(open_log)
    assert raised.value.__cause__ is None
    return str(raised.value)


def pieces(text: str) -> set[str]:
    """Three characters each, with one among them that is in the password only."""
    every = {text[start : start + 3] for start in range(len(text) - 2)}
    return {piece for piece in every if set(piece) & set("QXZJ89")}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.partition(":")[0])
@given(password=PASSWORDS)
@example(password="QX@ZJ")
@example(password="QX/ZJ")
@example(password="189/ZJ")
@example(password="QX?ZJ")
@example(password="QX#ZJ")
@example(password="QX[ZJ")
@example(password="QX\u2100ZJ")
@settings(max_examples=50)
def test_an_error_shows_no_part_of_a_password(place: str, password: str) -> None:
    said = error_of(place.format(password))
    if said.removeprefix("log: ") in SAID:
        return
    assert said.startswith(NAMES)
    [problem] = [said.removeprefix(name) for name in NAMES if said.startswith(name)]
    assert not any(piece in problem for piece in pieces(password))


@given(password=PASSWORDS)
@example(password="QX/ZJ")
@example(password="189/ZJ")
@example(password="QX[ZJ")
@example(password="QX\u2100ZJ")
@pytest.mark.parametrize("place", ["https://me:{}@issuer.example/jwks", "http://me:{}@127.0.0.1:1/jwks"])
def test_a_url_of_keys_with_a_password_is_refused_in_words_that_are_always_the_same(place: str, password: str) -> None:
    with pytest.raises(SettingError) as raised:
        trio.run(partial(load, place.format(password), 300.0))
    assert raised.value.__cause__ is None
    assert str(raised.value).removeprefix("TRICORN_JWT_KEY: ") in {
        ENCODED,
        "must be a URL like https://example.org/jwks.json",
    }


@pytest.mark.parametrize(
    "url", ["https://h:QXZJ/jwks", "https://h:99999/", "https://h/\u2100QXZJ", "https://h/QX ZJ", "https://h:0"]
)
async def test_a_url_of_keys_that_cannot_be_requested(url: str) -> None:
    with pytest.raises(SettingError) as raised:
        await load(url, 300.0)
    assert str(raised.value) == "TRICORN_JWT_KEY: must be a URL like https://example.org/jwks.json"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql:///db?host=@abstract",
        "postgresql://me:p%40ss%2F@one,two:5433/db",
        "postgresql://[::1]:5433,[::2]/db",
        "redis://me:p%40ss@h:6380/1",
        "redis://h",
        "unix:///run/a@b.sock",
        "unix://me:p%40ss@/run/redis.sock?db=1",
        "memory:",
        "sqlite:///a@b.db",
    ],
)
def test_a_url_that_is_good(url: str) -> None:
    connect(url, ChatSettings())


@pytest.mark.parametrize("url", ["redis://h/0#QXZJ", "postgresql:me", "redis://h/QXZJ", "redis://h?QXZJ=1"])
def test_a_url_with_something_that_means_nothing(url: str) -> None:
    with pytest.raises(SettingError, match=r"^log: must be "):
        connect(url, ChatSettings())


@pytest.mark.parametrize("show", [repr, str, lambda value: f"{value!r:>99}"])
def test_settings_do_not_show_them(show: Callable[[object], str]) -> None:
    for url in PLACES:
        settings = ServiceSettings(log=Secret(url.format("QXZJ")), jwt_key=Secret("QXZJ" * 8), token=Secret("QXZJ"))
        assert "QX" not in show(settings)
