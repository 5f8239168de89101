"""Three instances on one log, two hundred clients that come and go, and somebody who kills instances and the log.

One of the three is plain Hypercorn.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection, wrap_client_stream

from fixtures.ports import port_that_stays_free
from fixtures.real_services import PostgresServer, RedisServer

SEED = 20261125
CONVERSATIONS = 40
AT_ONCE = 3  # posts that a client says without waiting for answers
PATIENCE = 240  # seconds for all of it
LEASE = "3"

AGENT = """
import trio

async def talk(run):
    async with run.tool("look", at=run.message) as tool:
        await trio.sleep(0.02)
        tool.result = run.message
    for word in ("one ", "two ", "three "):
        await run.say(word)
"""


NATIVE = ("tricorn", "serve", "--audit", "off", "--bind")
HYPERCORN = ("hypercorn", "-k", "trio", "tricorn.asgi:app", "--bind")


class Instance:
    """A server that is killed and started again, with all its processes."""

    def __init__(self, directory: Path, log: str, kind: tuple[str, ...]) -> None:
        self.port = port_that_stays_free()
        self._directory = directory
        self._log = log
        self._kind = kind
        self._process: trio.Process
        self._ended = trio.Event()

    async def start(self, nursery: trio.Nursery) -> None:
        environ = {
            "TRICORN_LOG": self._log,
            "TRICORN_AGENT": "talkative:talk",
            "TRICORN_LEASE": LEASE,
            "TRICORN_POSTS_PER_MINUTE": "1000",
        }
        self._process = await trio.lowlevel.open_process(
            [sys.executable, "-m", *self._kind, f"127.0.0.1:{self.port}"],
            cwd=self._directory,
            env=os.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._ended = trio.Event()
        self.port = await nursery.start(self._read)

    async def _read(self, task_status: trio.TaskStatus[int]) -> None:
        """Keep what it says in a file, until all its processes have ended. The started value is its port."""
        try:
            await self._keep_what_it_says(task_status)
            self._ended.set()
        finally:
            if not self._ended.is_set():
                self._kill_now()

    async def _keep_what_it_says(self, task_status: trio.TaskStatus[int]) -> None:
        assert self._process.stdout is not None
        said, listens = b"", None
        with (self._directory / f"said-{id(self)}").open("ab") as file:
            async for data in self._process.stdout:
                file.write(data)
                if listens is None:
                    said += data
                    listens = re.search(rb"(?:listening|Running) on http://[\d.]+:(\d+)\s", said)
                    if listens is not None:
                        task_status.started(int(listens[1]))
        assert listens, said

    async def kill(self, by: signal.Signals) -> None:
        if by is signal.SIGKILL:
            self._kill_now()
        else:
            self._process.send_signal(by)
        await self._process.wait()
        await self._ended.wait()

    def _kill_now(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def end(self) -> int:
        await self.kill(signal.SIGTERM)
        assert self._process.returncode is not None
        return self._process.returncode


class Client:
    """Posts, drops its connection now and then, comes back anywhere, and says again what has no answer."""

    def __init__(self, number: int, posts: int, instances: list[Instance], chance: random.Random) -> None:
        self.conversation = f"c{number % CONVERSATIONS}"
        self.unanswered = [f"post-{number}-{n}" for n in range(posts)]
        self.acknowledged: dict[str, int] = {}
        self.events: list[dict[str, Any]] = []  # as they came, over all connections
        self.epochs: set[str] = set()
        self._instances = instances
        self._chance = chance

    @property
    def seq(self) -> int:
        return self.events[-1]["seq"] if self.events else 0

    async def run(self) -> None:
        while self.unanswered or not self._all_ended():
            try:
                await self._connect_once()
            except* (ConnectionClosed, HandshakeError, OSError, trio.TooSlowError, trio.BrokenResourceError):
                pass  # lost: it comes back
            await trio.sleep(self._chance.random() / 10)

    def _all_ended(self) -> bool:
        posts = {event["seq"] for event in self.events if event["type"] == "user_message"}
        ended = {event["run"] for event in self.events if event["type"] == "agent_completed"}
        answered = {event["post_seq"] for event in self.events if event.get("run") in ended and "post_seq" in event}
        return posts <= answered and set(self.acknowledged.values()) <= posts

    async def _connect_once(self) -> None:
        instance = self._chance.choice(self._instances)
        with trio.fail_after(5):
            stream = await trio.open_tcp_stream("127.0.0.1", instance.port)
        async with stream, trio.open_nursery() as nursery:
            with trio.fail_after(5):
                ws = await wrap_client_stream(nursery, stream, "localhost", "/ws", subprotocols=["tricorn.v1"])
            try:
                await self._talk(ws, drop_after=self._chance.randrange(5, 60))
            finally:
                nursery.cancel_scope.cancel()

    async def _talk(self, ws: WebSocketConnection, drop_after: int) -> None:
        await self._say(ws, type="open", conversation=self.conversation, after=self.seq)
        for post in self.unanswered[:AT_ONCE]:
            await self._say(ws, type="post", id=post, conversation=self.conversation, text=post)
        for _ in range(drop_after):
            if not self.unanswered and self._all_ended():
                return
            with trio.fail_after(5):
                self._hear(json.loads(await ws.get_message()))

    async def _say(self, ws: WebSocketConnection, **request: Any) -> None:
        await ws.send_message(json.dumps(request))

    def _hear(self, said: dict[str, Any]) -> None:
        if said["type"] == "opened":
            self.epochs.add(said["epoch"])
        elif said["type"] == "posted":
            self.acknowledged.setdefault(said["id"], said["seq"])
            assert self.acknowledged[said["id"]] == said["seq"], "a repeated post had another answer"
            if said["id"] in self.unanswered:
                self.unanswered.remove(said["id"])
        elif "at" in said:
            assert said["seq"] == self.seq + 1, f"{self.seq} was followed by {said['seq']}"
            self.events.append(said)


def check(clients: list[Client], posts_of_each: int) -> None:
    """Nothing is lost, nothing comes twice: from what the clients saw."""
    for conversation in {client.conversation for client in clients}:
        those = [client for client in clients if client.conversation == conversation]
        longest = max((client.events for client in those), key=len)
        for client in those:
            assert client.events == longest[: len(client.events)]
            assert len(client.epochs) == 1
            for post, seq in client.acknowledged.items():
                assert longest[seq - 1]["type"] == "user_message"
                assert longest[seq - 1]["id"] == post
        posts = [event["seq"] for event in longest if event["type"] == "user_message"]
        assert Counter(event["post_seq"] for event in longest if event["type"] == "agent_started") == Counter(posts)
        runs = [event["run"] for event in longest if event["type"] == "agent_started"]
        assert Counter(event["run"] for event in longest if event["type"] == "agent_completed") == Counter(runs)
        assert len({event["id"] for event in longest if event["type"] == "user_message"}) == len(posts)
        assert len(posts) == posts_of_each * len(those)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with the agent in it."""
    (tmp_path / "talkative.py").write_text(AGENT)
    return tmp_path


@asynccontextmanager
async def instances_on(
    log: str, place: Path, kinds: Sequence[tuple[str, ...]]
) -> AsyncIterator[tuple[list[Instance], trio.Nursery]]:
    async with trio.open_nursery() as nursery:
        instances = [Instance(place, log, kind) for kind in kinds]
        for instance in instances:
            await instance.start(nursery)
        yield instances, nursery
        nursery.cancel_scope.cancel()


async def trouble(
    instances: list[Instance],
    nursery: trio.Nursery,
    chance: random.Random,
    kills: int,
    pause: float,
    restart_log: Callable[[], None] | None,
) -> None:
    for kill in range(kills):
        await trio.sleep(pause * (0.5 + chance.random()))
        if restart_log is not None and kill == kills // 2:
            await trio.to_thread.run_sync(restart_log)
        instance = instances[kill % len(instances)]
        await instance.kill(chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        await instance.start(nursery)


async def play(
    log: str,
    place: Path,
    restart_log: Callable[[], None] | None = None,
    *,
    instances: Sequence[tuple[str, ...]] = (NATIVE, NATIVE, HYPERCORN),
    clients: int = 200,
    posts: int = 3,
    kills: int = 6,
    pause: float = 1.0,
) -> None:
    chance = random.Random(SEED)
    with trio.fail_after(PATIENCE):
        async with instances_on(log, place, instances) as (serving, nursery):
            talkers = [Client(number, posts, serving, random.Random(chance.random())) for number in range(clients)]
            async with trio.open_nursery() as talking:
                talking.start_soon(trouble, serving, nursery, chance, kills, pause, restart_log)
                for client in talkers:
                    talking.start_soon(client.run)
            check(talkers, posts)
            assert [await instance.end() for instance in serving] == [0] * len(instances)


async def test_a_busy_server_on_sqlite_that_is_killed_fifty_times(place: Path) -> None:
    log = f"sqlite:///{place}/log.db"
    await play(log, place, instances=[NATIVE], clients=CONVERSATIONS, posts=40, kills=50, pause=0.15)


async def test_redis(pytestconfig: pytest.Config, place: Path) -> None:
    with TemporaryDirectory(prefix="redis-") as directory:
        server = RedisServer(pytestconfig, directory)
        server.start()

        def restart() -> None:
            server.kill()
            server.start()

        try:
            await play(f"unix://{server.path}", place, restart)
        finally:
            server.kill()


async def test_postgresql(postgres_server: PostgresServer, place: Path) -> None:
    def restart() -> None:
        postgres_server.stop()
        postgres_server.start()

    await play(postgres_server.url, place, restart)
