"""What a log costs: appending, hearing of it elsewhere, catching up, and a conversation that rests.

    python bench/log.py [URL ...] [--events 3000] [--rounds 3] [--readers 100]

Without a URL it is the log in memory and one in a file of its own. Rounds of all logs are interleaved. CPU is the user
and system time of this process, so it is what an instance spends, not what the database does; times from an append to
its return, and to another instance's hearing of it, are on the wall. PostgreSQL and Redis must be there already, and
are left with the conversations of the benchmark in them.
"""

from __future__ import annotations

import argparse
import os
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from math import inf
from platform import python_version
from secrets import token_hex
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import trio
import trio.testing

from tricorn.chat import Chat
from tricorn.chat.logs import connect
from tricorn.chat.logs.base import Append, Log
from tricorn.chat.protocol import UserMessage
from tricorn.chat.settings import ChatSettings

CONVERSATIONS = (1, 100, 10_000)
RESTING = 1000  # conversations, for what one that rests costs


def post(text: str) -> UserMessage:
    return UserMessage(conversation="c", seq=0, at=0.0, id="p", user="bench", text=text)


class Measured:
    """One log, by its URL, and what was found of it: name of a column → figures, one for each round."""

    def __init__(self, name: str, log: Log, other: Log | None) -> None:
        self.name = name
        self.found: dict[str, list[float]] = {}
        self._log = log
        self._other = other
        self._run = token_hex(4)

    def note(self, column: str, figure: float) -> None:
        self.found.setdefault(column, []).append(figure)

    @contextmanager
    def cpu(self, column: str, events: int) -> Iterator[None]:
        began = process_time()
        yield
        self.note(column, (process_time() - began) / events * 1e6)

    async def append(self, conversations: int, events: int) -> None:
        """Append from so many conversations at a time, each one after the other."""
        keys = [f"bench/{self._run}-{conversations}-{n}" for n in range(conversations)]
        epochs = {key: (await self._log.open(key)).epoch for key in keys}
        times: list[float] = []
        each = max(1, events // conversations)

        async def write(key: str) -> None:
            for _ in range(each):
                began = perf_counter()
                await self._log.append(key, epochs[key], Append(post("x" * 64)))
                times.append(perf_counter() - began)

        began = perf_counter()
        with self.cpu(f"append {conversations}: µs CPU", len(keys) * each):
            async with trio.open_nursery() as nursery:
                for key in keys:
                    nursery.start_soon(write, key)
        self.note(f"append {conversations}: events/s", len(times) / (perf_counter() - began))
        self.note(f"append {conversations}: p50 ms", median(times) * 1e3)
        self.note(f"append {conversations}: p99 ms", quantiles(times, n=100)[98] * 1e3)

    async def hear(self, events: int) -> None:
        """From an append to another instance's hearing of it, one at a time."""
        if self._other is None:
            return
        key, heard, times = f"bench/{self._run}-heard", trio.Event(), []

        def hear(head: int, _: str) -> None:
            if head >= expected:
                heard.set()

        expected = await self._head(key) + 1
        epoch = (await self._log.open(key)).epoch
        await self._other.watch(key, hear)
        for _ in range(max(2, events // 10)):
            heard = trio.Event()
            began = perf_counter()
            await self._log.append(key, epoch, Append(post("x" * 64)))
            await heard.wait()
            times.append(perf_counter() - began)
            expected += 1
        self._other.unwatch(key)
        self.note("heard: p50 ms", median(times) * 1e3)
        self.note("heard: p99 ms", quantiles(times, n=100)[98] * 1e3)

    async def _head(self, key: str) -> int:
        return (await self._log.open(key)).head

    async def catch_up(self, readers: int) -> None:
        """Read 1000 events, so many readers at a time."""
        key = f"bench/{self._run}-read"
        epoch, _, head, _ = await self._log.open(key)
        async with trio.open_nursery() as nursery:
            for _ in range(1000 - head):
                nursery.start_soon(self._log.append, key, epoch, Append(post("x" * 64)))

        async def read() -> None:
            seq = 0
            while seq < 1000:
                seq = (await self._log.read(key, seq, 256))[-1].seq

        with self.cpu("catch up: µs CPU", readers * 1000):
            async with trio.open_nursery() as nursery:
                for _ in range(readers):
                    nursery.start_soon(read)

    async def rest(self) -> None:
        """Memory of a conversation that nothing happens in."""
        async with Chat(_silent, ChatSettings(linger=inf, abandon_after=inf), self._log) as chat:
            tracemalloc.start()
            held = [chat.conversation(f"bench/{self._run}-rest-{n}") for n in range(RESTING)]
            for conversation in held:
                await conversation.view.open()
            await trio.testing.wait_all_tasks_blocked(0.01)
            self.note("at rest: KiB", tracemalloc.get_traced_memory()[0] / RESTING / 1024)
            tracemalloc.stop()


async def _silent(_: object) -> None:
    await trio.lowlevel.checkpoint()


async def measure(urls: list[str], events: int, rounds: int, readers: int) -> list[Measured]:
    async with AsyncExitStack() as stack:
        logs = []
        for url in urls:
            log = await stack.enter_async_context(connect(url, ChatSettings()))
            other = await stack.enter_async_context(connect(url, ChatSettings())) if log.shared else None
            logs.append(Measured(url.partition(":")[0], log, other))
        steps: list[Callable[[Measured], Coroutine[Any, Any, None]]] = [
            *(lambda log, n=n: log.append(n, events) for n in CONVERSATIONS),  # type: ignore[misc]
            lambda log: log.hear(events),
            lambda log: log.catch_up(readers),
        ]
        for _ in range(rounds):
            for step in steps:
                for log in logs:
                    await step(log)
        for log in logs:
            await log.rest()
        return logs


def main() -> None:
    parser = argparse.ArgumentParser(description="What a log costs.")
    parser.add_argument("urls", metavar="URL", nargs="*", help="of a log (memory: and a file)")
    parser.add_argument("--events", type=int, default=3000, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--readers", type=int, default=100)
    arguments = parser.parse_args()
    with TemporaryDirectory() as directory:
        urls = arguments.urls or ["memory:", f"sqlite:///{directory}/log.db"]
        logs = trio.run(measure, urls, arguments.events, arguments.rounds, arguments.readers)
    print(f"medians of {arguments.rounds} rounds, {os.cpu_count()} cores, Python {python_version()}\n")
    print("".join([f"{'':28}", *(f"{log.name:>12}" for log in logs)]))
    for column in dict.fromkeys(column for log in logs for column in log.found):
        figures = [f"{median(log.found[column]):12.3g}" if column in log.found else f"{'-':>12}" for log in logs]
        print(f"{column:28}{''.join(figures)}")


if __name__ == "__main__":
    main()
