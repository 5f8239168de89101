"""What the error path needs while it runs: it must be nothing that can be missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grimp
import pytest

from fixtures.service import DEVELOPMENT

if TYPE_CHECKING:
    from fixtures.service import Client, Service

POSTS = 5


class TestImportChainValidation:
    """What imports do while an error is handled."""

    async def test_dynamic_import_under_gc_pressure(self, service: Service) -> None:
        instance = await service.start()
        for number in range(POSTS):
            answer = await instance.ask("ann", f"collected of-{number}-")
            service.judge(instance, answer, f"UpstreamGone: of-{number}-")
            answer = await instance.ask("ann", f"lazy missing_{number}_")
            service.judge(instance, answer, f"No module named 'missing_{number}_'")

    async def test_time_module_availability_in_nested_calls(self, service: Service) -> None:
        instance = await service.start()
        answer = await instance.ask("ann", "without_time deep-down")
        service.judge(instance, answer, "UpstreamGone: deep-down", "in nested")

    @pytest.mark.reads_source
    async def test_circular_import_detection_websocket_utils(self, service: Service) -> None:
        found = cycles(service.package)
        service.note("verdict", f"finds {', '.join(' ↔ '.join(cycle) for cycle in found) or 'none'}")
        assert (
            found
            == {
                "replica": [("incident.state_machine", "incident.utils")],
                "tricorn": [],
            }[service.name]
        )


def cycles(package: str) -> list[tuple[str, str]]:
    """The pairs of modules of which one imports the other and is imported by it, over however many others.

    Imports inside of functions count: that is how a cycle is hidden from the interpreter.
    """
    graph = grimp.build_graph(package, cache_dir=None, exclude_type_checking_imports=True)
    found = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if graph.chain_exists(importer=imported, imported=module):
                found.add((min(module, imported), max(module, imported)))
    return sorted(found)


class TestExceptionHandlerImports:
    """What an exception handler imports itself."""

    async def test_exception_handler_import_failures(self, service: Service) -> None:
        instance = await service.start()
        for post, *error in (
            ("lazy not_there", "ModuleNotFoundError", "No module named 'not_there'"),
            ("unbound not_bound", "NameError", "name 'not_bound' is not defined"),
            ("poisoned colorsys", "ModuleNotFoundError", "import of colorsys halted"),
            ("without_modules first", "UpstreamGone: first"),
        ):
            service.judge(instance, await instance.ask("ann", post), *error)
        async with instance.connect("bob") as bob:
            # From here on nothing in the process can import, not even what is loaded: the name alone must be told.
            answer = await instance.ask("ann", "without_imports second")
            service.judge(instance, answer, "UpstreamGone", masked_by="imports are refused")
            service.judge(instance, await bob.ask("unbound neither"), "NameError", masked_by="imports are refused")

    async def test_is_websocket_connected_import_chain(self, service: Service) -> None:
        """In development the replica's error path works, by loading modules. In staging its chain has one more."""
        staging = await service.start()
        service.judge(staging, await staging.ask("ann", "unbound not_bound"), "name 'not_bound' is not defined")
        development = await service.start(DEVELOPMENT)
        async with development.connect("ann") as ann:
            before = await loaded(ann)
            await ann.ask("unbound not_bound")
            chain = await loaded(ann) - before
        assert "name 'not_bound' is not defined" in development.log
        assert ("incident.environment" in chain) if service.name == "replica" else not chain
        service.note("verdict", f"loads {len(chain)} modules to say what happened")


async def loaded(client: Client) -> set[str]:
    answer = await client.ask("modules")
    [result] = [each["result"] for each in answer.objects if each["type"] == "tool_completed"]
    return set(result)
