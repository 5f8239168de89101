"""Nothing leaks and nothing is lost, whatever goes wrong at whichever step: see fixtures/checkpoints.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from random import Random
from socket import AF_INET

import pytest
import trio

from fixtures.checkpoints import Case, Handler, Scenario, every_step, play
from fixtures.faults import FAULTS, Fault
from fixtures.handlers import echo, greet_and_sleep
from tricorn import WebSocket
from tricorn.errors.report import report_error
from tricorn.protocol.close import NO_PONG, NORMAL

SEED = 20261125

TrySteps = Callable[..., None]


async def shake_hands(case: Case) -> None:
    peer = await case.dial()
    await peer.handshake(pause=1)
    await peer.read_to_end()
    refused = await case.dial()
    await refused.send_bytes(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n\r\n")
    await refused.read_to_end()


async def do_nothing(ws: WebSocket) -> None:
    pass


async def talk(case: Case) -> None:
    peer = await case.connect()
    await peer.send("one")
    assert await peer.receive() == "one"
    await peer.send("two", "three")
    assert [await peer.receive() for _ in range(2)] == ["two", "three"]
    await peer.close()


PIECES = [f"{number} ".ljust(3000, "x") for number in range(12)]


async def echo_late(ws: WebSocket) -> None:
    async for message in ws:
        await trio.sleep(0.3)
        await ws.send(message)


async def talk_ahead(case: Case) -> None:
    peer = await case.connect()
    await peer.send(*PIECES[:6])
    await peer.close()


def is_piece(payload: bytes) -> bool:
    return payload.decode() in PIECES


async def stream(ws: WebSocket) -> None:
    for piece in PIECES:
        await ws.send(piece)


async def read_slowly(case: Case) -> None:
    peer = await case.connect()
    for _ in range(sum(map(len, PIECES)) // 1500):
        await peer.receive_bytes(1500)
        await trio.sleep(0.1)
    await peer.read_to_end()


async def never_pong(case: Case) -> None:
    peer = await case.connect()
    await peer.read_to_end(answer=False)


SCENARIOS = (
    Scenario(name="handshake", handler=do_nothing, peer=shake_hands, codes=(NORMAL,)),
    Scenario(
        name="echo",
        handler=echo,
        peer=talk,
        codes=(NORMAL,),
        payload=lambda payload: payload in (b"one", b"two", b"three"),
    ),
    Scenario(
        name="busy handler", handler=echo_late, peer=talk_ahead, codes=(NORMAL,), payload=is_piece, send_buffer=4608
    ),
    Scenario(
        name="slow reader",
        handler=stream,
        peer=read_slowly,
        codes=(NORMAL,),
        payload=is_piece,
        send_buffer=4608,
    ),
    Scenario(name="ping time-out", handler=greet_and_sleep, peer=never_pong, codes=(NO_PONG,)),
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


# Handlers with a mistake, and what is said of it


async def hold_on(ws: WebSocket) -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep(3)


async def hold_on_for_ever(ws: WebSocket) -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


async def leave_a_task(ws: WebSocket) -> None:
    trio.lowlevel.spawn_system_task(trio.sleep_forever)


async def leave_a_descriptor(ws: WebSocket) -> None:
    os.dup(0)


async def send_half_a_frame(ws: WebSocket) -> None:
    ws._connection.transport._socket.send(b"\x81\x05he")  # type: ignore[attr-defined] # and the close frame comes behind it


async def report_an_error(ws: WebSocket) -> None:
    report_error(RuntimeError("nobody expects this"))


async def swallow_cancellation(ws: WebSocket) -> None:
    try:
        await trio.sleep_forever()
    except trio.Cancelled:  # noqa: ASYNC103
        ws._connection.transport._poller = None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("handler", "fault", "problem"),
    [
        (hold_on, "FIN", "seconds after"),
        (hold_on_for_ever, "FIN", "there still is"),
        (leave_a_task, None, "tasks are left"),
        (leave_a_descriptor, None, "a descriptor is left"),
        (send_half_a_frame, None, "UnicodeDecodeError"),
        (report_an_error, None, "nobody expects this"),
        (swallow_cancellation, "FIN", "AttributeError"),
    ],
)
def test_it_finds(handler: Handler, fault: str | None, problem: str) -> None:
    scenario = Scenario(name="mistake", handler=handler, peer=listen, codes=(NORMAL,))
    injected = next((each for each in FAULTS if each.name == fault), FAULTS[0])
    descriptors = set(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises(AssertionError, match=problem):
            every_step(scenario, injected)
    finally:
        for left in set(os.listdir("/proc/self/fd")) - descriptors:
            with suppress(OSError):
                os.close(int(left))


async def listen(case: Case) -> None:
    peer = await case.connect()
    await peer.read_to_end()
