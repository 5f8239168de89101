"""The environment of an instance, simulated: little memory, instances that come and go, staging and development."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from signal import SIGTERM
from typing import TYPE_CHECKING

import pytest
import trio

from fixtures.service import AGENT, DEVELOPMENT, STAGING, Tricorn, first_line, numbers

if TYPE_CHECKING:
    from fixtures.service import Answer, Instance, Service

pytestmark = pytest.mark.any_server

HEADROOM = 32 * 2**20  # bytes
LARGE = 4 * HEADROOM

USERS = ("ann", "bob", "cyd", "dan", "eve", "fay")
ROUNDS = 2

NEVER_READY = """
import signal
print("importing", flush=True)
signal.pause()
"""
MOVING = """
import os
os.environ["K_SERVICE"] = "chat"
from incident.faults import agent
"""


class TestResourcePressureSimulation:
    """Memory runs out, and instances come and go under load."""

    async def test_memory_pressure_import_failures(self, service: Service) -> None:
        """The process may not grow: the user's import fails for want of memory, and works when there is some again."""
        (service.directory / "large.py").write_text(f"ANSWER = len(bytearray({LARGE}))")
        instance = await service.start()
        async with instance.connect("bob") as bob:
            with instance.squeezed(resource.RLIMIT_AS, instance.address_space() + HEADROOM):
                answer = await instance.ask("ann", "lazy large")
                service.judge(instance, answer, "MemoryError")
                assert (await bob.ask("succeed all the same")).last["text"] == "succeed: all the same"
        assert (await instance.ask("ann", "lazy large")).last["text"] == f"lazy: {LARGE}"

    async def test_container_scaling_import_disruption(self, service: Service) -> None:
        """Instances come and go under load; one is stopped in the middle of its imports.

        From an instance that stops everybody hears all there is, to the end of the run that goes on; then the next one
        serves them. If they share a log, it goes on there; else it starts over, and says so by its epoch.
        """
        (service.directory / "never_ready.py").write_text(NEVER_READY)
        instance = await service.start()
        for _ in range(ROUNDS):
            heard: dict[str, Answer] = {}
            async with trio.open_nursery() as nursery:
                for user in USERS:
                    await nursery.start(stream, instance, user, heard)
                following = await service.start()
                await stop_while_importing(service)
                assert await instance.stop() == 0
            for user, answer in heard.items():
                if service.name == "replica":
                    service.judge(instance, answer, "ConnectionClosed")
                else:
                    check_heard(answer)
                    await check_goes_on(following, user, answer)
                    service.note("verdict", "ends every run, tells all of it, goes on elsewhere")
            instance = following


class TestEnvironmentDetection:
    """Whether this is staging, found out at start-up or while an import runs."""

    async def test_staging_environment_detection_during_imports(self, service: Service) -> None:
        """Both work in development. The replica fails in staging, also if it learns of it only during an import."""
        (service.directory / "moving.py").write_text(MOVING)
        error = "name 'not_bound' is not defined"
        development = await service.start(DEVELOPMENT)
        await development.ask("ann", "unbound not_bound")
        assert error in development.log
        for environ, agent in ((STAGING, AGENT), (DEVELOPMENT, "moving:agent")):
            instance = await service.start(environ, agent)
            service.judge(instance, await instance.ask("ann", "unbound not_bound"), error)


async def stream(
    instance: Instance,
    user: str,
    heard: dict[str, Answer],
    task_status: trio.TaskStatus[None],
) -> None:
    """Have a run that does not end and a post that waits for it, until the instance closes the connection."""
    conversation = f"{user}-{next(numbers)}"
    async with instance.connect(user) as client:
        await client.open(conversation)
        await client.post("stream", conversation)
        await client.post("succeed next", conversation)
        before = await client.until("agent_message")
        task_status.started()
        rest = await client.until()
    heard[user] = replace(rest, objects=before.objects + rest.objects)


def check_heard(answer: Answer) -> None:
    """Everything to the last event of the last run, each once and in order, and a word before the end."""
    ends = [each["outcome"] for each in answer.objects if each["type"] == "agent_completed"]
    assert ends == ["interrupted"]  # what waits is left to whoever has the log next: tests/e2e/test_instances.py
    assert answer.seqs == [*range(1, len(answer.seqs) + 1)]
    assert answer.last["type"] == "agent_completed"
    assert "closing" in answer.types
    assert answer.close_code == 1012


async def check_goes_on(instance: Instance, user: str, answer: Answer) -> None:
    [opened] = [each for each in answer.objects if each["type"] == "opened"]
    conversation, epoch = opened["conversation"], opened["epoch"]
    async with instance.connect(user) as client:
        await client.open(conversation, after=answer.seqs[-1], epoch=epoch)
        found = (await client.until("opened")).last["epoch"]
        if isinstance(instance.service, Tricorn) and instance.service.shared:
            assert found == epoch
            if "succeed next" in [each.get("text") for each in answer.objects if each["type"] == "user_message"]:
                rest = await client.until("agent_completed")
                assert rest.last["text"] == "succeed: next"
                assert rest.seqs[0] == answer.seqs[-1] + 1
        else:
            assert found != epoch
        assert (await client.ask("succeed again", conversation)).last["text"] == "succeed: again"


async def stop_while_importing(service: Service) -> None:
    process, stderr = await service.launch(agent="never_ready:agent")
    assert await first_line(process) == "importing\n"
    os.kill(service.serving(process), SIGTERM)  # Hypercorn's own process would wait for its worker
    assert await process.wait() == (0 if isinstance(service, Tricorn) and service.way == "hypercorn" else -SIGTERM)
    assert stderr.read_text() == ""
