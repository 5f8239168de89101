"""The incident must not come back.

    python tests/mission_critical/test_websocket_import_stability.py

runs these tests, and exits with 0 if all of them passed, else with 1. Options of pytest may follow.
"""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fixtures.service import Service


pytestmark = pytest.mark.any_server


@pytest.mark.always
async def test_websocket_basic_connectivity(service: Service) -> None:
    """Where nothing fails both work, in staging too: it is the error path that is broken."""
    instance = await service.start()
    answer = await instance.ask("ann", "succeed hello")
    assert answer.last["outcome"] == "success"
    assert answer.last["text"] == "succeed: hello"
    service.note("verdict", "connects and answers")


async def test_the_log_of_the_incident(service: Service) -> None:
    """Somebody comes and goes, and nothing is wrong."""
    instance = await service.start()
    async with instance.connect("ann"):
        pass
    assert await instance.stop() == 0
    if service.name == "replica":
        assert "Failed to transition state machine to ACCEPTED\n" in instance.log
        assert f"WebSocket error: {service.as_reported}\n" in instance.log
        service.note("verdict", "logs errors that nobody made")
    else:
        assert {each["severity"] for each in instance.records} == {"INFO"}
        messages = [each["message"] for each in instance.records if each["message"] != "an instance has started"]
        assert messages == ["connection closed"]
        service.note("verdict", "logs that a connection ended")


FAULTS = (
    ("lazy not_there", "No module named 'not_there'"),
    ("unbound not_bound", "name 'not_bound' is not defined"),
    ("poisoned colorsys", "import of colorsys halted"),
    ("cleanup first-error", "UpstreamGone: first-error", "a_cleanup_that_is_missing"),
    ("without_time second-error", "UpstreamGone: second-error"),
    ("without_modules third-error", "UpstreamGone: third-error"),
    ("collected fourth-error", "UpstreamGone: fourth-error"),
)


@pytest.mark.not_asyncio("websockets imports in every handshake: where imports are refused, nobody comes in any more")
async def test_one_fault_after_the_other(service: Service) -> None:
    """In one process, which serves on when all that can be broken of it is broken."""
    instance = await service.start()
    async with AsyncExitStack() as connections:
        # Beforehand: what the faults break, the replica cannot take a connection without.
        names = ["ann", "bob", *("cyd" for _ in FAULTS)]
        ann, bob, *others = [await connections.enter_async_context(instance.connect(name)) for name in names]
        for cyd, (fault, *error) in zip(others, FAULTS, strict=True):
            service.judge(instance, await cyd.ask(fault), *error)
            assert (await bob.ask("succeed")).last["outcome"] == "success"
        answer = await ann.ask("without_imports")
        service.judge(instance, answer, "UpstreamGone", masked_by="imports are refused")
        assert (await bob.ask("succeed")).last["outcome"] == "success"
    if service.name == "tricorn":
        assert (await instance.ask("dan", "succeed")).last["outcome"] == "success"


async def test_an_error_while_the_service_stops(service: Service) -> None:
    """A run is interrupted, and its clean-up imports what is not there."""
    instance = await service.start()
    async with instance.connect("ann") as ann:
        await ann.open("home")
        await ann.post("wait a_cleanup_that_is_missing", "home")
        await ann.until("tool_executing")
        instance.process.terminate()
        answer = await ann.until("agent_completed")
        assert await instance.process.wait() == 0
        service.judge(instance, answer, "No module named 'a_cleanup_that_is_missing'")


def main(*options: str) -> int:
    """Run the tests of this file from the root of the repository. Return the exit status."""
    root = Path(__file__).parents[2]
    status = pytest.main([f"--config-file={root / 'pyproject.toml'}", f"--rootdir={root}", *options, __file__])
    return 0 if status == pytest.ExitCode.OK else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
