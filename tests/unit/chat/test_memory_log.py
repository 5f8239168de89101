"""The memory log keeps what every log promises, beside others too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tricorn.chat.logs import conformance
from tricorn.chat.logs.base import KEEP_EVERYTHING, Append, Log, Retention
from tricorn.chat.logs.conformance import LEASE, post
from tricorn.chat.logs.memory import MemoryLog


class Stores:
    def __init__(self) -> None:
        self.first = MemoryLog()

    @asynccontextmanager
    async def connect(self, retention: Retention = KEEP_EVERYTHING) -> AsyncIterator[Log]:
        async with MemoryLog(retention=retention, lease=LEASE, beside=self.first) as log:
            yield log

    async def vanish(self, log: Log) -> None:
        assert isinstance(log, MemoryLog)
        log.vanish()


@pytest.mark.parametrize("case", conformance.CASES + conformance.SHARED_CASES, ids=lambda case: case.__name__)
async def test_conformance(case: conformance.Case, autojump_clock: trio.testing.MockClock) -> None:
    await case(Stores())


async def test_every_method_is_a_checkpoint() -> None:
    async with MemoryLog() as log:
        epoch = (await log.open("c")).epoch
        for method, *arguments in (
            (log.check,),
            (log.open, "c"),
            (log.append, "c", epoch, Append(post())),
            (log.find, "c", "k"),
            (log.read, "c", 0, 1),
            (log.watch, "c", print),
            (log.claim, "c"),
            (log.cancel, "c", "r"),
            (log.attend, "c", True),
            (log.attended, "c"),
            (log.unanswered, 1),
        ):
            with trio.testing.assert_checkpoints():
                await method(*arguments)
