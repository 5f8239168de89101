"""`tricorn serve` with nothing left: no memory, no descriptors, nobody who takes its records.

The client whose agent fails still gets the error's id, everybody else is served, and SIGTERM ends the server.
"""

from __future__ import annotations

import os
import pty
import re
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from fixtures.service import LOGS, Answer, Client, Instance, Tricorn, empty_log

PATIENCE = 120  # seconds, for a whole test
HOARDING = "hoarding:agent"
USERS = [f"user-{number}" for number in range(20)]
ROUNDS = 3
FIVE = ["agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed"]

HOARDER = """
from incident.faults import FAULTS, agent

def hoard(detail):
    kept = []
    while True:
        kept.append(bytearray(2**16))

FAULTS["hoard"] = hoard
"""
HEADROOM = 32 * 2**20  # bytes
LEFT = 3 * 2**19  # bytes


@pytest.fixture
async def service(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Tricorn]:
    """Tricorn with a log in a file, as it is by default."""
    (tmp_path / "hoarding.py").write_text(HOARDER)
    service = Tricorn(tmp_path, nursery, lambda *_: None)
    service.in_files = True
    with trio.fail_after(PATIENCE):
        yield service
    nursery.cancel_scope.cancel()


@contextmanager
def closed(service: Tricorn) -> Iterator[Callable[[], None]]:
    service.by = ["sh", "-c", 'exec "$@" 2>&-', "sh"]
    yield lambda: None


@contextmanager
def full_pipe(service: Tricorn) -> Iterator[Callable[[], None]]:
    ours, service.stderr = os.pipe()
    yield partial(fill, service.stderr)
    os.close(ours)
    os.close(service.stderr)


def fill(pipe: int) -> None:
    """Write until no byte more fits."""
    nonblocking = os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK)
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while True:
                os.write(nonblocking, b"." * size)
    os.close(nonblocking)


@contextmanager
def gone_terminal(service: Tricorn) -> Iterator[Callable[[], None]]:
    terminal, service.stderr = pty.openpty()
    yield lambda: os.close(terminal)
    os.close(service.stderr)


@pytest.mark.parametrize("stderr", [closed, full_pipe, gone_terminal], ids=lambda case: case.__name__)
async def test_nobody_takes_the_records(service: Tricorn, stderr: Callable[..., object]) -> None:
    with stderr(service) as take_away:  # type: ignore[attr-defined]
        instance = await service.start()
        async with instance.connect("bob") as bob:
            take_away()
            ids = [id_of(await instance.ask("ann", f"lazy missing_{number}")) for number in range(ROUNDS)]
            assert len(set(ids)) == ROUNDS
            assert (await bob.ask("succeed all the same")).last["text"] == "succeed: all the same"
        assert (await instance.ask("cyd", "succeed as well")).last["text"] == "succeed: as well"
        assert await instance.stop() == 0


@pytest.mark.parametrize("log", LOGS)
async def test_memory_is_exhausted_and_stays_so(service: Tricorn, log: str, request: pytest.FixtureRequest) -> None:
    service.in_files = log == "sqlite"
    service.kept_in = empty_log(request, log)
    instance = await service.start(agent=HOARDING)
    async with instance.connect("ann") as ann, instance.connect("bob") as bob:
        assert (await bob.ask("succeed first")).last["text"] == "succeed: first"
        limit = instance.address_space() + LEFT
        resource.prlimit(instance.pid, resource.RLIMIT_AS, (limit, limit))
        id_of(await ann.ask("hoard"))
        for number in range(ROUNDS):
            assert (await bob.ask(f"succeed {number}")).last["text"] == f"succeed: {number}"
            id_of(await ann.ask("hoard"))
    assert await instance.stop() == 0
    assert "MemoryError" in {record["message"] for record in instance.records}


@pytest.mark.parametrize("log", LOGS)
async def test_connections_keep_coming_with_little_memory_left(
    service: Tricorn, log: str, request: pytest.FixtureRequest
) -> None:
    """They wait until there is room; whoever is there is served."""
    service.in_files = log == "sqlite"
    service.kept_in = empty_log(request, log)
    instance = await service.start()

    async def come(user: str) -> None:
        async with instance.connect(user) as client:
            assert (await client.ask("succeed too")).last["text"] == "succeed: too"
            await trio.sleep_forever()

    async with instance.connect("bob") as bob:
        limit = instance.address_space() + 2**24
        resource.prlimit(instance.pid, resource.RLIMIT_AS, (limit, limit))
        async with trio.open_nursery() as others:
            for number in range(600):
                others.start_soon(come, f"other-{number}")
                if number % 100 == 99:
                    assert (await bob.ask(f"succeed {number}")).last["text"] == f"succeed: {number}"
            while not any("cannot accept" in record["message"] for record in instance.records):
                assert (await bob.ask("succeed again")).last["text"] == "succeed: again"
            others.cancel_scope.cancel()
    assert await instance.stop() == 0
    assert {record["severity"] for record in instance.records} <= {"INFO", "WARNING"}


def id_of(answer: Answer) -> str:
    """The id of the error that a run failed with, on a connection that goes on."""
    assert answer.close_code is None
    assert answer.last["outcome"] == "failed", answer.last
    assert re.fullmatch("[0-9a-f]{8}", answer.last["error_id"])
    return str(answer.last["error_id"])


@contextmanager
def little_memory(instance: Instance) -> Iterator[None]:
    with instance.squeezed(resource.RLIMIT_AS, instance.address_space() + HEADROOM):
        yield


@contextmanager
def no_descriptors(instance: Instance) -> Iterator[None]:
    with instance.squeezed(resource.RLIMIT_NOFILE, 3):
        yield


@contextmanager
def collections(instance: Instance) -> Iterator[None]:
    """An agent had every allocation set one off."""
    assert "UpstreamGone" in instance.log
    yield


@pytest.mark.parametrize("stress", [little_memory, no_descriptors, collections], ids=lambda case: case.__name__)
async def test_the_five_events_of_many_users_under_stress(service: Tricorn, stress: Callable[..., object]) -> None:
    instance = await service.start()
    if stress is collections:
        id_of(await instance.ask("ann", "collected once"))
    answers: dict[str, list[Answer]] = {}
    async with AsyncExitStack() as stack:
        clients = {user: await stack.enter_async_context(instance.connect(user)) for user in USERS}
        with stress(instance):  # type: ignore[attr-defined]
            async with trio.open_nursery() as nursery:
                for user, client in clients.items():
                    nursery.start_soon(talk, user, client, answers)
    for user in USERS:
        events = [each for answer in answers[user] for each in answer.objects if "at" in each]
        assert [each["seq"] for each in events] == [*range(1, len(events) + 1)]
        for number, answer in enumerate(answers[user]):
            types = [each for each in answer.types if each.startswith(("agent_", "tool_")) and each != "agent_message"]
            assert types == FIVE
            assert answer.last["outcome"] == "success"
            assert answer.last["text"] == f"succeed: {user} {number}"
    assert not [record for record in instance.records if record["severity"] == "ERROR" and stress is not collections]
    assert await instance.stop() == 0


async def talk(user: str, client: Client, answers: dict[str, list[Answer]]) -> None:
    await client.open(user)
    await client.until("opened")
    answers[user] = [await client.ask(f"succeed {user} {number}", user) for number in range(ROUNDS)]
