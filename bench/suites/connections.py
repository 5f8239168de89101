"""What connections cost that say nothing: to open, to hold, to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from select import POLLIN, poll
from time import perf_counter

from bench.load import Clients, Failed, Meter, echoes
from bench.process import Server
from bench.servers import ECHO
from bench.suites.suite import Case, Figures, Sizes, Suite

WARM = 50  # connections
GOING = (1001, 1012)  # close codes: going away, restarting
LOOK = 0.02  # seconds between two looks at the server's descriptors


def open_many(server: Server, *, number: int) -> Figures:
    """From nothing to the answer to the handshake."""
    with Clients(server) as clients:
        clients.connect(min(WARM, number))
        with Meter(server) as meter:
            clients.connect(number)
    return {"µs CPU": meter.cpu / number * 1e6, "handshakes/s": number / meter.seconds}


def hold(server: Server, *, number: int) -> Figures:
    """Memory of a connection that has echoed one message and is silent then."""
    with Clients(server) as clients:
        clients.connect(min(WARM, number))
        clients.exchange(echoes(64), number)
        before = server.memory()
        clients.connect(number)
        clients.exchange(echoes(64), len(clients) * 2)
        grown = server.memory() - before
        clients.vanish()
    return {"KiB": grown / number / 1024}


def terminate(server: Server, *, number: int, patience: float) -> Figures:
    """SIGTERM: seconds until the process and the last connection have ended, and how many clients were told before."""
    told = 0
    with Clients(server) as clients:
        clients.connect(number)
        clients.exchange(echoes(64), number)
        process = os.pidfd_open(server.process.pid)
        ended = poll()
        ended.register(process, POLLIN)
        try:
            processes = len(server.pids())  # what the ended children of a process have spent is not to be had
            spent, began = server.cpu(), perf_counter()
            os.kill(server.process.pid, signal.SIGTERM)
            while len(clients) and (heard := clients.hear(patience)):
                told += sum(client.answer_close(data) in GOING for client, data in heard)
            if len(clients) or not ended.poll(patience * 1000):
                raise Failed(f"does not end in {patience:.0f} s; {told} of {number} told")
            took, spent = perf_counter() - began, server.cpu() - spent
        finally:
            os.close(process)
    figures = {"s": took, "told %": told / number * 100}
    return figures if processes > 1 else {**figures, "µs CPU": spent / number * 1e6}


def storm(server: Server, *, number: int, patience: float) -> Figures:
    """All clients but one are gone at once, by RST: what that costs, how long it takes, and what the one waits for."""
    exchanges = echoes(64)
    with Clients(server) as other, Clients(server) as clients:
        other.connect(1)
        other.exchange(exchanges, 100)
        held = server.descriptors()
        clients.connect(number)
        clients.exchange(exchanges, number)
        worst = 0.0
        with Meter(server) as meter:
            clients.vanish()
            began = look = perf_counter()
            while (now := perf_counter()) < look or server.descriptors() > held:
                if now - began > patience:
                    raise Failed(f"keeps descriptors for {patience:.0f} s")
                look = now + LOOK if now >= look else look
                other.exchange(exchanges, 1)
                worst = max(worst, perf_counter() - now)
    return {"µs CPU": meter.cpu / number * 1e6, "s": meter.seconds, "longest wait ms": worst * 1000}


def connect(sizes: Sizes) -> Iterator[Case]:
    yield Case("handshake", partial(open_many, number=sizes.handshakes))


def idle(sizes: Sizes) -> Iterator[Case]:
    for number in sizes.idle:
        yield Case(f"{number:,}", partial(hold, number=number), fresh=True)


def teardown(sizes: Sizes) -> Iterator[Case]:
    number = sizes.many
    yield Case("SIGTERM", partial(terminate, number=number, patience=sizes.patience), fresh=True)
    yield Case("RST", partial(storm, number=number, patience=sizes.patience), fresh=True)


SUITES = {
    "idle": Suite(
        "Memory of a connection that is silent, in KiB of RSS, by the number of connections",
        idle,
        tuple(ECHO),
        ("KiB",),
    ),
    "connect": Suite(
        "CPU for a handshake, in µs, and handshakes a second", connect, tuple(ECHO), ("µs CPU", "handshakes/s")
    ),
    "teardown": Suite(
        "Many connections ended at once: by SIGTERM, seconds until the server's exit and how many clients got a close "
        "frame that says so (1001 or 1012); by RST from the clients, CPU for each, and what another client waits for",
        teardown,
        tuple(ECHO),
        ("s", "told %", "µs CPU", "longest wait ms"),
    ),
}
