"""Test a handler without sockets. Run this with `pytest`, pytest-trio, and `trio_mode = true` in pytest's settings.

With the fixture `autojump_clock` waiting takes no time: the test of the limit of an hour is over in milliseconds.
"""

import pytest
import trio
from trio.testing import MockClock

import tricorn
import tricorn.testing

HOUR = 3600


async def count(ws: tricorn.WebSocket) -> None:
    """Answer each message with its number, for an hour."""
    number = 0
    with trio.move_on_after(HOUR):
        async for message in ws:
            if not isinstance(message, str):
                raise TypeError("only text counts")
            number += 1
            await ws.send(f"{number}: {message}")
    await ws.close(3000, "time is up")


async def test_messages_are_numbered() -> None:
    async with tricorn.testing.connect(count) as client:
        for number, text in enumerate(("one", "two"), 1):
            await client.send(text)
            assert await client.receive() == f"{number}: {text}"


async def test_the_handler_closes_after_an_hour(autojump_clock: MockClock) -> None:
    async with tricorn.testing.connect(count) as client:
        with pytest.raises(tricorn.Disconnected, match="3000 time is up"):
            await client.receive()
        assert trio.current_time() == HOUR


async def test_what_the_handler_raises_is_raised_by_the_block() -> None:
    with pytest.RaisesGroup(TypeError):
        async with tricorn.testing.connect(count) as client:
            await client.send(b"\0")


async def test_each_client_has_its_own_numbers(tricorn_connect: tricorn.testing.Connect) -> None:
    clients = [await tricorn_connect(count) for _ in range(3)]
    for client in clients:
        await client.send("hello")
    assert [await client.receive() for client in clients] == ["1: hello"] * 3
