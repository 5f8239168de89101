"""People who chat, on instances that are as they are on Cloud Run, while imports fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fixtures.service import Answer, Service

pytestmark = pytest.mark.any_server


class TestChatCloudRunSimulation:
    """The chat goes on while imports fail."""

    async def test_chat_functionality_during_import_failures(self, service: Service) -> None:
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

    async def test_multi_user_chat_import_failure_isolation(self, service: Service) -> None:
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


class TestWebSocketErrorRecovery:
    """After the failure everything works again."""

    async def test_chat_recovery_after_import_fix(self, service: Service) -> None:
        """What was missing is put there, and the same instance works, without a new start."""
        instance = await service.start()
        answer = await instance.ask("ann", "lazy mended_later")
        service.judge(instance, answer, "No module named 'mended_later'")
        (service.directory / "mended_later.py").write_text("ANSWER = 'mended'")
        assert (await instance.ask("ann", "lazy mended_later")).last["text"] == "lazy: mended"

    async def test_websocket_agent_events_with_import_stability(self, service: Service) -> None:
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
