"""Real pressure on a real process, over real sockets: what an error path gets to feel on a small instance."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import pytest
import trio

from fixtures.service import DEVELOPMENT, STAGING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fixtures.real_services import PostgresServer
    from fixtures.service import Answer, Instance, Service

NO_DESCRIPTORS = 3  # as many as every process has
CLIENTS = 20
BACKENDS = "incident.backends:agent"


class TestCloudRunImportFailures:
    """An import fails while a connection is served or cleaned up."""

    async def test_websocket_error_handling_under_resource_pressure(self, service: Service) -> None:
        """No descriptor is left: the user's import fails, and whatever an error path would have to open."""
        (service.directory / "late.py").write_text("ANSWER = 42")
        instance = await service.start()
        async with instance.connect("ann") as ann, instance.connect("bob") as bob:
            with instance.squeezed(resource.RLIMIT_NOFILE, NO_DESCRIPTORS):
                answer = await ann.ask("lazy late")
                service.judge(
                    instance,
                    answer,
                    f"Too many open files: '{service.directory}",
                    masked_by="[Errno 24] Too many open files",
                )
                assert (await bob.ask("succeed all the same")).last["text"] == "succeed: all the same"
        assert (await instance.ask("ann", "lazy late")).last["text"] == "lazy: 42"

    async def test_dynamic_import_failure_during_websocket_cleanup(self, service: Service) -> None:
        """The client breaks off, the run fails, then its clean-up fails: both are recorded, the first one first."""
        instance = await service.start()
        async with instance.connect("ann") as ann:
            await ann.open("home")
            await ann.post("cleanup first-error", "home")
            await ann.until("agent_started")
            await ann.break_off()
        answer = await comes_back(service, instance, "home")
        service.judge(instance, answer, "UpstreamGone: first-error", "No module named 'a_cleanup_that_is_missing'")


class TestSessionAndDatabaseFailures:
    """What else the report's log had: no session to find the user in, and a database that does not answer."""

    async def test_session_and_auth_context_failure(self, service: Service) -> None:
        instance = await service.start(agent=BACKENDS)
        answer = await instance.ask("ann", "session")
        service.judge(instance, answer, "AssertionError: SessionMiddleware must be installed to access request.session")
        assert (await instance.ask("bob", "succeed all the same")).last["text"] == "succeed: all the same"

    async def test_database_connectivity_failure(self, service: Service, postgres_server: PostgresServer) -> None:
        instance = await service.start(agent=BACKENDS)
        answer = await instance.ask("ann", f"database {service.directory}")
        failed = "DatabaseFailed: database: Failed (session factory and connectivity)"
        service.judge(instance, answer, "OperationalError: ", f"{service.directory}/.s.PGSQL.5432", failed)
        assert (await instance.ask("ann", f"database {postgres_server.directory}")).last["text"] == "database: 42"


async def comes_back(service: Service, instance: Instance, conversation: str) -> Answer:
    """What a client finds that comes back. To the replica's nobody can: it ends, so that it has logged all it will."""
    async with instance.connect("ann") as ann:
        await ann.open(conversation)
        if service.name == "replica":
            instance.process.terminate()
        return await ann.until("agent_completed")


class TestExceptionHandlerStress:
    """Many errors at once, and the collector at work."""

    async def test_concurrent_websocket_exceptions_import_stability(self, service: Service) -> None:
        """Many connections fail at once: each for its own reason, and with an id of its own."""
        instance = await service.start()
        answers: dict[int, Answer] = {}

        async def fail(number: int) -> None:
            answers[number] = await instance.ask(f"user-{number}", f"lazy missing_{number}_")

        async with trio.open_nursery() as nursery:
            for number in range(CLIENTS):
                nursery.start_soon(fail, number)
        for number, answer in answers.items():
            service.judge(instance, answer, f"No module named 'missing_{number}_'")
        if service.name == "tricorn":
            assert len({answer.last["error_id"] for answer in answers.values()}) == CLIENTS

    @pytest.mark.parametrize("environ", [DEVELOPMENT, STAGING], ids=["development", "staging"])
    async def test_garbage_collection_import_interference(self, service: Service, environ: Mapping[str, str]) -> None:
        """The collector is not to blame: with all its pressure the replica works where its imports do."""
        instance = await service.start(environ)
        async with instance.connect("ann") as ann:
            await ann.ask("collected once")
        answer = await instance.ask("ann", "collected twice")
        if service.name == "replica" and environ is DEVELOPMENT:
            assert answer.last["type"] == "error"
            assert "UpstreamGone: twice" in instance.log
            service.note("verdict", "reports it, as it always did in development")
        else:
            service.judge(instance, answer, "UpstreamGone: twice")
