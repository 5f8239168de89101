"""How runs end, and how the server does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from tricorn.chat import Run

pytestmark = pytest.mark.any_server

Chatting = Callable[..., Any]


# The ends of a run


@pytest.mark.parametrize(("message", "tools", "text"), [("wait", 1, "Waiting. "), ("wait twice", 2, None)])
async def test_cancel(chatting_anywhere: Chatting, message: str, tools: int, text: str | None) -> None:
    async with chatting_anywhere() as server, server.connect() as client, server.connect() as other:
        await client.send("open", conversation="c")
        await client.post(message)
        for _ in range(tools):
            executing = await client.answer("tool_executing")
        await other.send("cancel", conversation="c", run=executing["run"])
        await client.until("agent_completed")
        events = client.received.events()
        events.check_end("cancelled", tool_error="cancelled", tools=tools)
        assert events[-1].get("text") == text
        await client.post("hello")
        assert (await client.answer("agent_completed"))["outcome"] == "success"


async def test_nothing_to_cancel(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client:
        await client.send("cancel", conversation="c", run="none")
        assert (await client.receive())["code"] == "not_found"
        await client.send("open", conversation="c")
        await client.post("hello")
        run = (await client.answer("agent_completed"))["run"]
        await client.send("cancel", conversation="c", run=run)
        error = await client.receive()
        assert error["code"] == "not_found"
        assert len(await server.recorded()) == 8


async def test_cancelling_one_run_leaves_the_next(chatting: Chatting) -> None:
    async with chatting() as server, server.connect() as client:
        await client.send("open", conversation="c")
        await client.post("wait")
        await client.post("hello")
        run = (await client.answer("tool_executing"))["run"]
        await client.send("cancel", conversation="c", run="another")
        assert (await client.answer("error"))["code"] == "not_found"  # maybe behind `posted` of what waits
        await client.send("cancel", conversation="c", run=run)
        assert (await client.answer("agent_completed"))["outcome"] == "cancelled"
        assert (await client.answer("agent_completed"))["outcome"] == "success"


async def test_run_timeout(chatting: Chatting) -> None:
    async with chatting(run_timeout=0.1) as server, server.connect() as client:
        await client.send("open", conversation="c")
        await client.post("wait")
        await client.until("agent_completed")
        events = client.received.events()
        events.check_end("timeout", tool_error="timed out", tools=1)
        assert events[-1]["seconds"] > 0.099  # uvloop's deadlines are in whole milliseconds
        await client.post("hello")
        assert (await client.answer("agent_completed"))["outcome"] == "success"


async def test_a_failing_agent_disturbs_nobody(chatting: Chatting, capfd: pytest.CaptureFixture[str]) -> None:
    async with chatting() as server, server.connect() as client, server.connect() as neighbour:
        await neighbour.send("open", conversation="n")
        await neighbour.post("wait", "n")
        run = (await neighbour.answer("tool_executing"))["run"]

        await client.send("open", conversation="c")
        await client.post("fail")
        end = await client.answer("agent_completed")
        assert end["outcome"] == "failed"
        await client.post("hello")
        assert (await client.answer("agent_completed"))["outcome"] == "success"

        await neighbour.send("cancel", conversation="n", run=run)
        assert (await neighbour.until("agent_completed")).types == ["tool_completed", "agent_completed"]
        assert "secret" not in json.dumps(client.received)
    reported = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    [report] = [each for each in reported if end["error_id"] in each.values()]
    assert "a secret of the agent's" in json.dumps(report)


async def test_what_a_tool_refuses_is_told(chatting: Chatting, capfd: pytest.CaptureFixture[str]) -> None:
    async with chatting() as server, server.connect() as client:
        await client.send("open", conversation="c")
        await client.post("refuse")
        seen = await client.until("agent_completed")
        seen.events().check_end("failed", tool_error="The door is shut.", tools=1)
    capfd.readouterr()


# The end of the server


async def test_drain(chatting_anywhere: Chatting) -> None:
    """`closing`, the end of every run in the log and on the wire, 1012: in the same block for everybody."""
    settings = {"drain_timeout": 2.0, "close_timeout": 0.5}  # after a second the run is interrupted
    async with chatting_anywhere(**settings) as server, server.connect() as busy, server.connect() as idle:
        await busy.send("open", conversation="c")
        await busy.post("wait")
        await busy.until("tool_executing")
        server.scope.cancel()
        seen, code = await busy.until_closed()
        assert code == 1012
        assert sorted(seen.types) == ["agent_completed", "closing", "tool_completed"]
        [closing] = [each for each in seen if each["type"] == "closing"]
        assert closing["reason"]
        assert closing["retry_after"] >= 0
        busy.received.events().check_end("interrupted", tool_error="interrupted", tools=1)
        assert await server.recorded() == busy.received.events()

        seen, code = await idle.until_closed()
        assert seen.types == ["closing"]
        assert code == 1012


async def test_a_run_may_finish_while_the_server_drains(chatting_anywhere: Chatting) -> None:
    go = trio.Event()

    async def patient(run: Run) -> None:
        await go.wait()
        await run.say("done")

    async with chatting_anywhere(patient) as server, server.connect() as client:
        await client.send("open", conversation="c")
        await client.post("hello")
        await client.until("agent_started")
        server.scope.cancel()
        await client.until("closing")
        go.set()
        seen, code = await client.until_closed()
        assert seen.types == ["agent_message", "agent_completed"]
        assert seen[-1]["outcome"] == "success"
        assert code == 1012


async def test_drain_ends_runs_that_nobody_watches(chatting: Chatting) -> None:
    async with chatting(drain_timeout=1.0, close_timeout=0.2) as server:
        async with server.connect() as client:
            await client.send("open", conversation="c")
            await client.post("wait twice")
            for _ in range(2):
                await client.until("tool_executing")
        await server.session_ended.wait()
        server.scope.cancel()
    events = await server.recorded()
    events.check_end("interrupted", tool_error="interrupted", tools=2)


async def test_drain_ends_though_a_client_does_not_read(chatting_anywhere: Chatting) -> None:
    settings = {"drain_timeout": 2.0, "close_timeout": 0.2}  # Hypercorn has half a second of it for itself
    async with (
        chatting_anywhere(**settings) as server,
        server.connect() as watcher,
        server.connect(receive_buffer=4096) as stuck,
    ):
        await stuck.send("open", conversation="c")
        await watcher.send("open", conversation="c")
        for _ in range(40):
            await watcher.post("say 100 4000")
            await watcher.until("agent_completed")
        await watcher.post("wait")
        await watcher.until("tool_executing")
        server.scope.cancel()
        seen, code = await watcher.until_closed()
        assert code == 1012
        assert seen[-1]["type"] in ("agent_completed", "closing")
        await stuck.break_off()
    assert (await server.recorded())[-1]["outcome"] == "interrupted"


async def test_nothing_begins_while_the_server_drains(chatting: Chatting) -> None:
    """An agent that cleans up holds the drain; until it has, posts and connections are refused.

    Who asks on a connection that was there before hears that this server is well, and why it is not ready.
    """

    async def tidy(run: Run) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(5, shield=True):
                await release.wait()
                await run.say("tidied")

    async def ask(path: str) -> bytes:
        await probe.send_all(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b"}"):
            answer += await probe.receive_some()
        return answer

    release = trio.Event()
    async with (
        chatting(tidy, drain_timeout=4.0, close_timeout=1.0) as server,
        server.connect() as client,
        await trio.open_tcp_stream("127.0.0.1", server.port) as probe,
    ):
        await client.send("open", conversation="c")
        await client.post("hello")
        await client.until("agent_started")
        assert (await ask("/readyz")).startswith(b"HTTP/1.1 200 ")
        server.scope.cancel()
        assert (await client.receive())["type"] == "closing"
        await client.post("again", id_="late")
        refusal = await client.receive()
        assert (refusal["code"], refusal["ref"]) == ("closing", "late")
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", server.port)
        assert (await ask("/healthz")).startswith(b"HTTP/1.1 200 ")
        not_ready = await ask("/readyz")
        assert not_ready.startswith(b"HTTP/1.1 503 ")
        assert not_ready.endswith(b'{"status":"draining"}')
        release.set()
        seen, code = await client.until_closed()
        assert seen.types == ["agent_message", "agent_completed"]
        assert seen[-1]["outcome"] == "interrupted"
        assert code == 1012


async def test_drain_ends_though_an_agent_will_not(chatting: Chatting) -> None:
    """One that shields itself is not waited for longer than `drain_timeout` by those who are connected."""

    async def stubborn(run: Run) -> None:
        with trio.move_on_after(10, shield=True):
            await release.wait()

    release = trio.Event()
    async with chatting(stubborn, drain_timeout=0.4, close_timeout=0.2) as server, server.connect() as client:
        await client.send("open", conversation="c")
        await client.post("hello")
        await client.until("agent_started")
        server.scope.cancel()
        seen, code = await client.until_closed()
        assert "closing" in seen.types
        assert code == 1012
        release.set()
    assert (await server.recorded())[-1]["type"] == "agent_completed"
