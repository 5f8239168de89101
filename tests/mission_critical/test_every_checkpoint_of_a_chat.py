"""Nothing leaks and nothing is lost in a chat, whatever goes wrong at whichever step: see fixtures/checkpoints.py."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from socket import AF_INET
from typing import Any

import pytest
import trio
from websockets.frames import DATA_OPCODES

from fixtures.checkpoints import Case, Scenario, Service, play
from fixtures.faults import FAULTS, Fault, explosion
from fixtures.wire import Peer, parse
from tricorn import WebSocket
from tricorn.chat import SUBPROTOCOLS, Chat, Run
from tricorn.chat.chat import Chat as _Chat
from tricorn.chat.logs.memory import MemoryLog
from tricorn.chat.protocol import SUBPROTOCOL
from tricorn.chat.settings import ChatSettings
from tricorn.listening.accept import Acceptor
from tricorn.protocol.close import ABNORMAL, NORMAL, SERVICE_RESTART

SEED = 20261125

TrySteps = Callable[..., None]


async def do_nothing(ws: WebSocket) -> None:
    pass


@dataclass
class Talk:
    """What a scenario of the chat has to know of its service."""

    log: MemoryLog
    chat: Chat
    run: Run | None = None

    def cancel(self) -> None:
        """Cancel the run in progress, at once."""
        assert self.run is not None
        assert self.chat.conversation("local/c")._responder.cancel(self.run.id)


class ChatScenario(Scenario):
    @asynccontextmanager
    async def service(self, case: Case) -> AsyncGenerator[Service]:
        async def agent(run: Run) -> None:
            case.subject.run = run
            try:
                await worker(run, case)
            finally:
                case.subject.run = None

        log = MemoryLog()
        async with Chat(case.explosive("agent", agent), self.settings, log) as chat:
            case.subject = Talk(log, chat)
            options = {"drain": chat.drain, "subprotocols": SUBPROTOCOLS}
            yield case.explosive("handler", chat.session), options

    async def judge(self, case: Case) -> None:
        talk: Talk = case.subject
        case.expect(not talk.chat._sessions, "a session is left")
        case.expect(not talk.chat._conversations, "a conversation is left")
        case.expect(not talk.log._watchers, "a subscription to the log is left")
        counted = talk.chat.metrics
        for gauge in (counted.conversations, counted.runs, counted.waiting):
            case.expect(not gauge.values[""], f"{gauge.name} are counted that are over")
        await self._let_the_next_answer(talk.log)
        logged = [json.loads(entry.json) for entry in await talk.log.read("local/c", 0, 1000)]
        for post in (event["id"] for event in logged if event["type"] == "user_message"):
            started = [event["run"] for event in logged if event.get("post") == post]
            case.expect(len(started) == 1, f"the post {post} was answered by {len(started)} runs")
        for run in dict.fromkeys(event["run"] for event in logged if "run" in event):
            _judge_run(case, [event for event in logged if event.get("run") == run])
        for connection in case.connections:
            seqs = [event["seq"] for event in _events(bytes(connection.wire.stream))]
            case.expect(seqs == list(range(seqs[0], seqs[0] + len(seqs))) if seqs else True, f"the client saw {seqs}")

    async def _let_the_next_answer(self, log: MemoryLog) -> None:
        """What an instance could not answer any more is left to whoever opens the log next."""

        async def answer(run: Run) -> None:
            await run.say("late")

        past = log.store.find("local/c")
        if past.is_unanswered:
            async with Chat(answer, self.settings, log):
                with trio.move_on_after(self.settings.lease):
                    while past.is_unanswered:  # noqa: ASYNC110 (nothing tells)
                        await trio.sleep(0.1)


def _judge_run(case: Case, events: list[dict[str, Any]]) -> None:
    types = [event["type"] for event in events]
    case.expect(types[0] == "agent_started", f"a run begins with {types[0]}")
    case.expect(types[-1] == "agent_completed" and Counter(types)["agent_completed"] == 1, f"a run is {types}")
    calls = [
        [event["call"] for event in events if event["type"] == f"tool_{end}"] for end in ("executing", "completed")
    ]
    case.expect(calls[0] == calls[1], f"tools began and ended: {calls}")


def _events(stream: bytes) -> list[dict[str, Any]]:
    objects = [json.loads(frame.data) for _, frame in parse(stream) if frame.opcode in DATA_OPCODES]
    return [each for each in objects if "at" in each]


async def worker(run: Run, case: Case) -> None:
    async def measure() -> None:
        await trio.sleep(0.1)
        tool.result = len(run.message)

    async with run.tool("length") as tool:
        await case.explosive("tool", measure)()
        if run.message == "wait":
            await trio.sleep_forever()
    for piece in ("It is ", f"{tool.result}"):
        await run.say(piece)


async def hear(peer: Peer, type_: str) -> dict[str, Any]:
    """The next object of this type, which must come."""
    while True:
        heard: dict[str, Any] = json.loads(await peer.receive())
        if heard["type"] == type_:
            return heard


async def say(peer: Peer, type_: str, **fields: Any) -> None:
    await peer.send(json.dumps({"type": type_, "conversation": "c", **fields}))


async def ask(case: Case, text: str) -> tuple[Peer, str]:
    """A peer that has asked something, and the epoch."""
    peer = await case.connect()
    await say(peer, "open")
    epoch = (await hear(peer, "opened"))["epoch"]
    await say(peer, "post", id="1", text=text)
    return peer, epoch


async def chat(case: Case) -> None:
    peer, _ = await ask(case, "hello")
    completed = await hear(peer, "agent_completed")
    assert completed["outcome"] == "success" or case.injected_at is not None
    await peer.close()


async def cancel(case: Case) -> None:
    peer, _ = await ask(case, "wait")
    run = (await hear(peer, "tool_executing"))["run"]
    await say(peer, "cancel", run=run)
    completed = await hear(peer, "agent_completed")
    assert completed["outcome"] == "cancelled" or case.injected_at is not None
    await peer.close()


async def come_back(case: Case) -> None:
    peer, epoch = await ask(case, "hello")
    last = (await hear(peer, "tool_executing"))["seq"]
    peer.leave_now()
    peer = await case.connect()
    await say(peer, "open", after=last, epoch=epoch)
    await hear(peer, "agent_completed")
    await peer.close()


async def be_drained(case: Case) -> None:
    peer, _ = await ask(case, "wait")
    await hear(peer, "tool_executing")
    case.server_scope.cancel()
    completed = await hear(peer, "agent_completed")
    assert completed["outcome"] == "interrupted" or case.injected_at is not None
    await peer.read_to_end()


RUN_CANCELLED = Fault(
    "run cancelled", lambda case: case.subject.cancel(), lambda case: getattr(case.subject, "run", None)
)

CHAT: dict[str, Any] = {
    "settings": ChatSettings(linger=1.0, abandon_after=1.0, run_timeout=60.0),
    "handler": do_nothing,  # the session of the chat is
    "subprotocol": SUBPROTOCOL,
    "payload": json.loads,
    "faults": (*FAULTS, RUN_CANCELLED, explosion("agent"), explosion("tool")),
    "roots": (Acceptor.serve, _Chat._live),
}

SCENARIOS = (
    ChatScenario(name="chat with a tool", peer=chat, codes=(NORMAL,), **CHAT),
    ChatScenario(name="cancel", peer=cancel, codes=(NORMAL,), **CHAT),
    ChatScenario(name="replay", peer=come_back, codes=(ABNORMAL, NORMAL), **CHAT),
    ChatScenario(name="drain", peer=be_drained, codes=(SERVICE_RESTART,), **CHAT),
)

EACH = [(scenario, fault) for scenario in SCENARIOS for fault in scenario.faults]


@pytest.mark.parametrize(("scenario", "fault"), EACH, ids=str)
def test_at_every_step(scenario: Scenario, fault: Fault, try_steps: TrySteps) -> None:
    try_steps(scenario, fault)


@pytest.mark.parametrize(("scenario", "fault"), EACH, ids=str)
def test_on_real_sockets_at_some_steps(scenario: Scenario, fault: Fault, try_steps: TrySteps) -> None:
    sample = Random(f"{SEED} {scenario} {fault}").sample
    try_steps(scenario, fault, family=AF_INET, steps=lambda possible: sample(possible, min(2, len(possible))))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_a_case_is_the_same_each_time(scenario: Scenario) -> None:
    first = play(scenario, FAULTS[0], seed=SEED)
    step = first.possible[len(first.possible) // 2]
    assert play(scenario, FAULTS[0], step, seed=SEED).trace == play(scenario, FAULTS[0], step, seed=SEED).trace
    assert play(scenario, FAULTS[0], seed=SEED).trace == first.trace
