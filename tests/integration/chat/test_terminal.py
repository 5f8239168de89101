"""`tricorn chat` over a connection that breaks."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from trio_websocket import ConnectionClosed, WebSocketRequest, serve_websocket

from fixtures.cutting_proxy import CuttingProxy, cutting_proxy
from tricorn.chat import Run
from tricorn.chat.client import connect, terminal
from tricorn.chat.protocol import (
    AgentAsked,
    AgentAsking,
    AgentCompleted,
    AgentStarted,
    Closing,
    Error,
    Open,
    Opened,
    UserMessage,
    Welcome,
)

PATIENCE = 30  # seconds, for a whole test

Chatting = Callable[..., AbstractAsyncContextManager[Any]]


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "FIRST_BACKOFF", 0.0)
    monkeypatch.setattr(terminal, "SEND_AGAIN", 0.0)


async def talkative(run: Run) -> None:
    for n in range(6):
        await run.say(f"{n} ")
        await trio.testing.wait_all_tasks_blocked()  # so that each piece is sent alone


@asynccontextmanager
async def through_proxy(server: Any) -> AsyncIterator[CuttingProxy]:
    async with cutting_proxy(0, server.port) as proxy:
        yield proxy


async def talk(proxy: CuttingProxy, message: str = "hello", **options: Any) -> int:
    url = f"ws://127.0.0.1:{proxy.address}/ws"
    with trio.fail_after(PATIENCE):
        return await terminal.chat(url, conversation="c", message=message, raw=True, **options)


@pytest.mark.parametrize("answers", range(12))
async def test_a_script_sees_its_run_once_wherever_the_connection_breaks(
    chatting: Chatting, capfd: pytest.CaptureFixture[str], answers: int
) -> None:
    async with chatting(talkative) as server, through_proxy(server) as proxy:
        # The first answers are the handshake's, `welcome` and `opened`: without those there is nothing to come back to.
        proxy.answers_left = 3 + answers
        assert await talk(proxy) == 0
        recorded = await server.recorded()
    out, err = capfd.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == recorded
    assert [event["type"] for event in recorded].count("agent_completed") == 1
    told = [line for line in err.splitlines() if line.startswith("tricorn: ")]
    assert len(told) == proxy.connections - 1
    assert all(line.endswith("; trying again in 0 s") for line in told)


async def test_it_comes_back_after_a_restart_of_the_server_with_its_post(
    chatting: Chatting, capfd: pytest.CaptureFixture[str]
) -> None:
    """The log has another epoch: what had been asked is asked again."""
    started = trio.Event()

    async def stuck(run: Run) -> None:
        started.set()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery, chatting(stuck) as server, cutting_proxy(0, server.port) as proxy:
        statuses: list[int] = []

        async def script() -> None:
            statuses.append(await talk(proxy))

        nursery.start_soon(script)
        await started.wait()
        async with chatting(talkative) as other:
            proxy.target = other.port
            proxy.cut()
            while not statuses:
                await trio.testing.wait_all_tasks_blocked(0.01)
            recorded = await other.recorded()
    assert statuses == [0]
    out, err = capfd.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[-len(recorded) :] == recorded
    assert "the server has lost what was said here before" in err


async def test_pauses_start_over_after_a_connection_that_opened_the_conversation(
    chatting: Chatting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(connect, "random", lambda: 1.0)
    pauses: list[float] = []

    async def on_message(message: connect.ServerMessage, text: str) -> None:
        match message:
            case Welcome():
                await client.send(Open(conversation="c"))
            case Opened() if len(pauses) < 3:
                proxy.cut()
            case Opened():
                client.leave()

    async with chatting() as server, through_proxy(server) as proxy:
        client = connect.ReconnectingClient(f"ws://127.0.0.1:{proxy.address}/ws", None, PATIENCE)
        with trio.fail_after(PATIENCE):
            assert await client.run(on_message, lambda problem, pause: pauses.append(pause)) is None
    assert pauses == [0.01, 0.01, 0.01]


async def test_a_server_that_is_gone_is_waited_for_only_so_long(
    chatting: Chatting, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0.05)

    async def gone(run: Run) -> None:
        proxy.target = 1  # nobody is there
        proxy.cut()
        await trio.sleep_forever()

    async with chatting(gone) as server, through_proxy(server) as proxy:
        assert await talk(proxy) == 1
        address = proxy.address
    *tries, last = capfd.readouterr().err.splitlines()
    assert last.startswith(f"tricorn: ws://127.0.0.1:{address}/ws: ")
    assert "trying again" not in last
    assert all("trying again" in line for line in tries if line.startswith("tricorn: "))


@pytest.mark.parametrize(("code", "tries"), [(1012, 3), (4000, 3), (4500, 1), (4501, 1)])
async def test_it_does_not_come_back_where_that_would_change_nothing(
    code: int, tries: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = 0

    async def server(request: WebSocketRequest) -> None:
        nonlocal connections
        connections += 1
        ws = await request.accept(subprotocol="tricorn.v1")
        limits = dict.fromkeys(
            ["message_bytes", "event_bytes", "text_characters", "open_conversations", "user_runs", "posts_per_minute"],
            9,
        )
        for said in (
            Welcome(connection="x", user="u", heartbeat=9.0, limits=limits),
            Opened(conversation="c", epoch="e", head=0),
            Closing(reason="busy", retry_after=0.0),
        ):
            await ws.send_message(msgspec.json.encode(said).decode())
        await ws.aclose(code if connections < 3 else 4500, "because")

    async with trio.open_nursery() as nursery:
        serving = await nursery.start(partial(serve_websocket, server, "127.0.0.1", 0, None))
        status = await terminal.chat(
            f"ws://127.0.0.1:{serving.port}/ws", conversation="c", message="x", raw=True, token=None
        )
        nursery.cancel_scope.cancel()
    assert status == 1
    assert connections == tries
    *told, last = capfd.readouterr().err.splitlines()
    assert last.endswith(f"{code if tries == 1 else 4500} because")
    assert [line.partition(": busy; ")[2] for line in told] == ["trying again in 0 s"] * (tries - 1)


Tell = Callable[..., Awaitable[None]]
LIMITS = dict.fromkeys(
    ["message_bytes", "event_bytes", "text_characters", "open_conversations", "user_runs", "posts_per_minute"], 9
)


@asynccontextmanager
async def scripted(respond: Callable[[dict[str, Any], Tell], Awaitable[None]]) -> AsyncIterator[str]:
    """A server that answers requests as `respond` has it. Yields its address."""

    async def server(request: WebSocketRequest) -> None:
        ws = await request.accept(subprotocol="tricorn.v1")

        async def say(*told: Any) -> None:
            for each in told:
                await ws.send_message(msgspec.json.encode(each).decode())

        await say(
            Welcome(connection="x", user="u", heartbeat=9.0, limits=LIMITS), Opened(conversation="c", epoch="e", head=0)
        )
        with suppress(ConnectionClosed):
            while True:
                await respond(json.loads(await ws.get_message()), say)

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            serving = await nursery.start(partial(serve_websocket, server, "127.0.0.1", 0, None))
            yield f"ws://127.0.0.1:{serving.port}/ws"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("code", ["too_fast", "too_many", "unavailable"])
async def test_a_post_that_is_refused_for_now_is_posted_again(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    posts: list[dict[str, Any]] = []

    async def respond(request: dict[str, Any], say: Tell) -> None:
        if request["type"] != "post":
            return
        posts.append(request)
        if len(posts) == 1:
            await say(Error(code=code, message="not now", ref=request["id"], retry_after=0.01))  # type: ignore[arg-type]
            return
        about = {"conversation": "c", "at": 0.0}
        await say(
            UserMessage(**about, seq=1, id=request["id"], user="u", text="x"),
            AgentStarted(**about, seq=2, run="r", agent="a", post=request["id"], post_seq=1),
            AgentCompleted(**about, seq=3, run="r", outcome="success", seconds=0.0),
        )

    async with scripted(respond) as url:
        status = await terminal.chat(url, conversation="c", message="x", raw=True, token=None)
    assert status == 0
    assert posts[0] == posts[1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("refusal", [{"retry_after": 0.01}, {}], ids=["the server says when", "it does not"])
async def test_an_answer_that_is_refused_for_now_is_sent_again(
    refusal: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "SEND_AGAIN", 2 * PATIENCE if refusal else 0.0)  # not what is waited for
    ours, theirs = os.pipe()
    os.write(theirs, b"x\nyes\n")
    monkeypatch.setattr(terminal, "STDIN", ours)
    answers: list[dict[str, Any]] = []

    async def respond(request: dict[str, Any], say: Tell) -> None:
        about = {"conversation": "c", "at": 0.0, "run": "r"}
        if request["type"] == "post":
            await say(
                UserMessage(conversation="c", at=0.0, seq=1, id=request["id"], user="u", text="x"),
                AgentStarted(**about, seq=2, agent="a", post=request["id"], post_seq=1),
                AgentAsking(**about, seq=3, ask="q", text="Send it?", until=0.0),
            )
        elif request["type"] == "answer":
            answers.append(request)
            if len(answers) == 1:
                await say(Error(code="unavailable", message="not now", ref="q", **refusal))
                return
            await say(
                AgentAsked(**about, seq=4, ask="q", outcome="answered", answer="yes", user="u"),
                AgentCompleted(**about, seq=5, outcome="success", seconds=0.0),
            )
            os.close(theirs)

    async with scripted(respond) as url:
        status = await terminal.chat(url, conversation="c", message=None, raw=True, token=None)
    os.close(ours)
    assert status == 0
    assert answers[0] == answers[1]
    assert capsys.readouterr().err == ""


async def test_what_was_being_cancelled_is_cancelled_on_the_next_connection(chatting: Chatting) -> None:
    """The person had pressed Ctrl-C, and the connection was lost with it."""
    async with chatting(stuck) as server, through_proxy(server) as proxy:
        client = terminal.TerminalChat(f"ws://127.0.0.1:{proxy.address}/ws", "c", "hello", True, None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            with trio.fail_after(PATIENCE):
                while client._turn is None or client._turn.run is None:
                    await trio.testing.wait_all_tasks_blocked(0.005)
                client._turn.cancelled = True
                proxy.cut()
        recorded = await server.recorded()
    assert client.status == 1
    assert recorded[-1]["outcome"] == "cancelled"


async def stuck(run: Run) -> None:
    await trio.sleep_forever()
