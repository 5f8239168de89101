"""People who chat, on instances that are as they are on Cloud Run, while imports fail."""

from __future__ import annotations

from dataclasses import replace
from signal import SIGTERM
from typing import TYPE_CHECKING

import pytest
import trio

from fixtures.service import AGENT, DEVELOPMENT, KEY, STAGING, first_line, numbers

if TYPE_CHECKING:
    from fixtures.service import Answer, Instance, Service

pytestmark = pytest.mark.any_server

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


@pytest.fixture
async def service(service: Service) -> Service:
    """The service with a key: who comes in needs a token of `tricorn token`."""
    service.environ = KEY
    return service


async def test_chat_functionality_during_import_failures(service: Service) -> None:
    """On one connection, what can be answered is, after each post that cannot be."""
    instance = await service.start()
    async with instance.connect("ann") as ann:
        assert (await ann.ask("succeed first")).last["text"] == "succeed: first"
        answer = await ann.ask("lazy not_there")
        service.judge(instance, answer, "No module named 'not_there'")
        if service.name == "tricorn":
            assert (await ann.ask("succeed second")).last["text"] == "succeed: second"
            answer = await ann.ask("poisoned colorsys")
            service.judge(instance, answer, "import of colorsys halted")
            assert (await ann.ask("succeed third")).last["text"] == "succeed: third"


async def test_multi_user_chat_import_failure_isolation(service: Service) -> None:
    """One user's failure is that user's: whoever is in the middle of a run hears on, and of nobody else.

    All three call their conversation by the same name.
    """
    instance = await service.start()
    async with instance.connect("ann") as ann, instance.connect("bob") as bob, instance.connect("cyd") as cyd:
        for client in (ann, bob, cyd):
            await client.open("home")
            await client.until("opened")
        await bob.post("stream", "home")
        heard = (await bob.until("agent_message")).objects
        answer = await ann.ask("lazy only_anns", "home")
        service.judge(instance, answer, "No module named 'only_anns'")
        assert (await cyd.ask("succeed as before", "home")).last["text"] == "succeed: as before"
        heard += (await bob.until("agent_message")).objects
        if service.name == "tricorn":
            assert [ann.user, bob.user, cyd.user] == ["ann", "bob", "cyd"]
    assert heard[-1]["type"] == "agent_message"
    assert [each["text"] for each in heard if each["type"] == "user_message"] == ["stream"]


async def test_chat_recovery_after_import_fix(service: Service) -> None:
    """What was missing is put there, and the same instance works, without a new start."""
    instance = await service.start()
    answer = await instance.ask("ann", "lazy mended_later")
    service.judge(instance, answer, "No module named 'mended_later'")
    (service.directory / "mended_later.py").write_text("ANSWER = 'mended'")
    assert (await instance.ask("ann", "lazy mended_later")).last["text"] == "lazy: mended"


async def test_websocket_agent_events_with_import_stability(service: Service) -> None:
    """All five kinds of events come, in order, of a run that works and of one that fails in its tool."""
    five = ["agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed"]
    instance = await service.start()
    assert events(await instance.ask("ann", "succeed hello")) == five
    answer = await instance.ask("ann", "lazy not_there")
    service.judge(instance, answer, "No module named 'not_there'")
    if service.name == "replica":
        assert events(answer) == five[:3]
        service.note("verdict", "tells three events of five")
    else:
        assert events(answer) == five
        assert answer.seqs == [*range(1, 7)]
        service.note("verdict", "tells all five events")


def events(answer: Answer) -> list[str]:
    """Those of the run, but for the pieces of what it says."""
    return [each for each in answer.types if each.startswith(("agent_", "tool_")) and each != "agent_message"]


async def test_staging_environment_detection_during_imports(service: Service) -> None:
    """Both work in development. The replica fails in staging, and where an import finds out late that it is there."""
    (service.directory / "moving.py").write_text(MOVING)
    error = "name 'not_bound' is not defined"
    development = await service.start(DEVELOPMENT)
    await development.ask("ann", "unbound not_bound")
    assert error in development.log
    for environ, agent in ((STAGING, AGENT), (DEVELOPMENT, "moving:agent")):
        instance = await service.start(environ, agent)
        service.judge(instance, await instance.ask("ann", "unbound not_bound"), error)


async def test_container_scaling_import_disruption(service: Service) -> None:
    """Instances come and go under load; one is stopped in the middle of its imports.

    From an instance that stops everybody hears all there is, to the end of the run that goes on; then the next one
    serves them. Its log is its own, so it starts over, and says so by its epoch.
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
        assert (await client.until("opened")).last["epoch"] != epoch
        assert (await client.ask("succeed again", conversation)).last["text"] == "succeed: again"


async def stop_while_importing(service: Service) -> None:
    process, stderr = await service.launch(agent="never_ready:agent")
    assert await first_line(process) == "importing\n"
    process.terminate()
    assert await process.wait() == -SIGTERM
    assert stderr.read_text() == ""
