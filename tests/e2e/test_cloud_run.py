"""Cloud Run, simulated: small instances that come and go under people who chat, and connections that are cut."""

from __future__ import annotations

import os
import resource
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, HandshakeError

from fixtures.service import AGENT, KEY, STAGING, Client, Instance, Tricorn

PATIENCE = 120  # seconds, for what takes ten
MEMORY = 512 * 2**20  # bytes of address space, which is more than what is in memory
KILLED_AFTER = 10  # seconds from SIGTERM
CUT_AFTER = 9  # events that one connection brings: an answer takes three
PEOPLE = ("ann", "bob", "cyd", "dan")

TALKING = """
from trio import sleep

async def agent(run):
    async with run.tool("count") as tool:
        tool.result = 20
    for number in range(20):
        await run.say(f"{number} ")
        await sleep(0.005)
"""


class SmallInstances(Tricorn):
    """One processor each, and little memory."""

    processors = cycle(sorted(os.sched_getaffinity(0)))

    async def launch(self, environ: Mapping[str, str] = STAGING, agent: str = AGENT) -> Any:
        process, stderr = await super().launch(environ, agent)
        resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.sched_setaffinity(process.pid, {next(self.processors)})
        return process, stderr


@dataclass
class Cloud:
    """Two instances, and who is sent to which.

    Where they share their log, somebody who comes back gets to the other one, else to the same or what replaced it.
    """

    service: SmallInstances
    shared: bool
    instances: list[Instance] = field(default_factory=list)
    done: list[Instance] = field(default_factory=list)

    def instance(self, place: int, visit: int) -> Instance:
        return self.instances[(place + visit * self.shared) % 2]

    async def replace(self, place: int) -> None:
        """Have a new instance take over, and end the old one."""
        old, self.instances[place] = self.instances[place], await self.service.start(agent="talking:agent")
        with trio.move_on_after(KILLED_AFTER) as scope:
            assert await old.stop() == 0
        assert not scope.cancelled_caught, "Cloud Run would have killed it"
        self.done.append(old)


@dataclass
class Person:
    """Posts one thing after the other in one conversation, and comes back until each is answered to the end."""

    cloud: Cloud
    name: str
    place: int
    epoch: str | None = None
    heard: list[dict[str, Any]] = field(default_factory=list)
    pasts: list[list[dict[str, Any]]] = field(default_factory=list)  # what was heard of logs that are gone
    visits: int = 0
    resumed: int = 0  # how often it went on with the same log
    listening: trio.Event = field(default_factory=trio.Event)
    enough: bool = False

    async def chat(self) -> None:
        for number in count():
            if self.enough:
                break
            await self.ask(f"{self.name}-{number}")

    async def ask(self, post: str) -> None:
        while not self.answered(post):
            self.visits += 1
            try:
                async with self.cloud.instance(self.place, self.visits).connect(self.name) as client:
                    await client.open("home", after=len(self.heard), epoch=self.epoch or "none yet")
                    await client.send("post", id=post, conversation="home", text="count")
                    await self.listen(client, post)
            except* (OSError, HandshakeError, ConnectionClosed):
                pass  # it has just gone; another one has taken its place

    async def listen(self, client: Client, post: str) -> None:
        """Hear everything up to the end of the answer, or of the connection."""
        known = len(self.heard)
        with suppress(ConnectionClosed):
            while not self.answered(post):
                said = await client.receive()
                if said["type"] == "opened" and self.epoch != said["epoch"]:
                    if self.epoch is not None:
                        self.pasts.append(self.heard)
                    self.epoch, self.heard, known = said["epoch"], [], 0
                elif said["type"] == "opened":
                    self.resumed += 1
                elif "at" in said:
                    assert said["seq"] == len(self.heard) + 1, "lost, or heard twice"
                    self.heard.append(said)
                    self.listening.set()
                if len(self.heard) - known == CUT_AFTER:
                    await client.break_off()
                    break

    def answered(self, post: str) -> bool:
        runs = [each["run"] for each in self.heard if each.get("post") == post]
        return any(each["type"] == "agent_completed" and each["run"] in runs for each in self.heard)

    async def in_the_middle(self) -> None:
        """Wait until it hears something."""
        self.listening = trio.Event()
        await self.listening.wait()

    async def check(self) -> None:
        """Each thing said is there once and was answered once, and whoever reads it all now reads just that."""
        for past in (*self.pasts, self.heard):
            posts = [each["id"] for each in past if each["type"] == "user_message"]
            assert len(set(posts)) == len(posts)
            started = [each["post"] for each in past if each["type"] == "agent_started"]
            assert started == posts[: len(started)]
            ended = [each["run"] for each in past if each["type"] == "agent_completed"]
            assert len(set(ended)) == len(ended) >= len(started) - 1
        assert self.heard[-1]["type"] == "agent_completed"
        async with self.cloud.instance(self.place, self.visits).connect(self.name) as client:
            await client.open("home")
            again = [await client.receive() for _ in range(len(self.heard) + 1)]
        assert again[1:] == self.heard


@pytest.fixture(params=["memory", "redis"])
async def cloud(request: pytest.FixtureRequest, tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Cloud]:
    (tmp_path / "talking.py").write_text(TALKING)
    shared = request.param != "memory"
    log = f"unix://{request.getfixturevalue('redis')}" if shared else "memory:"
    service = SmallInstances(tmp_path, nursery, lambda *_: None)
    service.environ = {**KEY, "TRICORN_LOG": log, "TRICORN_POSTS_PER_MINUTE": "100000"}
    with trio.fail_after(PATIENCE):
        yield Cloud(service, shared, [await service.start(agent="talking:agent") for _ in range(2)])
    nursery.cancel_scope.cancel()


async def test_a_rolling_restart_under_load_loses_nothing_and_says_nothing_twice(cloud: Cloud) -> None:
    people = [Person(cloud, name, place=number % 2) for number, name in enumerate(PEOPLE)]
    async with trio.open_nursery() as nursery:
        for person in people:
            nursery.start_soon(person.chat)
        for place in (0, 1):
            for person in people:
                await person.in_the_middle()
            await cloud.replace(place)
        for person in people:
            await person.in_the_middle()
            person.enough = True
    for person in people:
        await person.check()
        assert person.resumed, "nobody was cut"
        assert len(person.pasts) == (0 if cloud.shared else 1)
    for instance in (*cloud.instances, *cloud.done):
        assert not [record for record in instance.records if record["severity"] not in ("INFO", "NOTICE")]
