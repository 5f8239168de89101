"""Agents that wait for every piece of their answer, as one does that asks a model, on Trio and on asyncio.

`waiting` waits for a turn of the loop and no longer: what a socket or a timer costs is not the chat's. `pulse` waits
for a ticker that all share, so that many conversations go on in the same turn, as after a read of many sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

import trio
from sniffio import current_async_library
from trio.lowlevel import checkpoint, spawn_system_task

from tricorn.chat.agents.demo import PIECE

PERIOD = 0.004  # seconds


async def waiting(run: Any) -> None:
    """Turn the text of `reverse TEXT` around."""
    await _answer(run, checkpoint if _on_trio() else _turn)


async def pulse(run: Any) -> None:
    """Turn the text of `reverse TEXT` around, a piece at each pulse."""
    await _answer(run, _ticker().wait)


async def _answer(run: Any, wait: Callable[[], Awaitable[Any]]) -> None:
    text = run.message.removeprefix("reverse ")
    await run.think("I turn the text around.")
    async with run.tool("reverse", text=text) as tool:
        tool.result = text[::-1]
    for piece in PIECE.findall(tool.result):
        await wait()
        await run.say(piece)


async def _turn() -> None:
    await asyncio.sleep(0)


def _on_trio() -> bool:
    return current_async_library() == "trio"


class _Ticker:
    """Wakes all who wait, every PERIOD seconds, until the loop ends."""

    def __init__(self, event: type[trio.Event | asyncio.Event], sleep: Callable[[float], Awaitable[None]]) -> None:
        self._new = event
        self._sleep = sleep
        self._next = event()
        self.task: object = None  # asyncio keeps none by itself

    async def wait(self) -> None:
        await self._next.wait()

    async def run(self) -> None:
        while True:
            await self._sleep(PERIOD)
            self._next.set()
            self._next = self._new()


@cache
def _ticker() -> _Ticker:
    on_trio = _on_trio()
    ticker = _Ticker(trio.Event, trio.sleep) if on_trio else _Ticker(asyncio.Event, asyncio.sleep)
    ticker.task = spawn_system_task(ticker.run) if on_trio else asyncio.create_task(ticker.run())
    return ticker
