"""How long an answer takes at half the load that the server can take, while other clients misbehave."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from statistics import quantiles
from time import perf_counter

from bench.load import PATIENCE, Client, Clients, Failed, echoes, text
from bench.process import Server
from bench.servers import ECHO, SERVERS
from bench.suites.suite import Case, Figures, Sizes, Suite

LOAD = 0.5  # of what the server answers when every client asks as soon as it was answered
CRASHES = 0.02  # seconds between two handlers that crash
STALLED = 8 << 20  # bytes, at most, that the stalled client sends and does not read the echo of


def measure(server: Server, *, connections: int, messages: int, seconds: float, misbehaviour: str) -> Figures:
    exchanges = echoes(64)
    if misbehaviour == "crash" and not SERVERS[server.name].crashes:
        raise Failed("has no handlers that could crash")
    with Clients(server) as clients, Clients(server) as stalled, Clients(server) as others:
        clients.connect(connections)
        clients.exchange(exchanges, messages)
        began = perf_counter()
        clients.exchange(exchanges, messages)
        rate = LOAD * messages / (perf_counter() - began)
        if misbehaviour == "stall":
            stalled.connect(1)
            stall(next(iter(stalled)))
        elif misbehaviour == "crash":
            others.connect(int(seconds / CRASHES), "/crash")
        times = ask(clients, rate, int(rate * seconds), others)
        stalled.vanish()
        others.vanish()
    percentiles = quantiles(times, n=1000)
    return {"p50 µs": percentiles[499] * 1e6, "p99 µs": percentiles[989] * 1e6, "p99.9 µs": percentiles[998] * 1e6}


def stall(client: Client) -> None:
    """Send and do not read, until the server does not read either."""
    message = text(b"x" * 65536)
    client.sock.setblocking(False)
    sent = 0
    while sent < STALLED:
        try:
            sent += client.sock.send(message[sent % len(message) :])
        except BlockingIOError:
            return


def ask(clients: Clients, rate: float, number: int, others: Clients) -> list[float]:
    """Send so many messages, at random times `rate` a second, whether or not others were answered; how long each took.

    A message counts from when it was due, so whatever holds the load up counts too. Meanwhile each of the others makes
    its handler crash.
    """
    more, turn = cycle(echoes(64)), cycle(list(clients))
    waiting: dict[Client, deque[tuple[bytes, float]]] = {client: deque() for client in clients}
    times: list[float] = []
    crashing = list(others)
    due = crash = heard_last = perf_counter()
    sent = 0
    while len(times) < number:
        now = perf_counter()
        while due <= now and sent < number:
            client = next(turn)
            request, answer = next(more)
            waiting[client].append((answer, due))
            client.sock.sendall(request)
            sent += 1
            due += random.expovariate(rate)
        if crash <= now:
            for client, data in others.hear(0):
                client.answer_close(data)
            if crashing:
                crashing.pop().sock.sendall(text(b"hello"))
            crash += CRASHES
        heard = clients.hear(0)
        now = perf_counter()
        for client, data in heard:
            times += (now - asked for asked in answered(client, data, waiting[client]))
            heard_last = now
        if now - heard_last > PATIENCE:
            raise Failed(f"does not answer in {PATIENCE} s")
    return times


def answered(client: Client, data: bytes, waiting: deque[tuple[bytes, float]]) -> Iterator[float]:
    """When what is answered now was due. Raises `Failed` where it is not what was sent."""
    if not data:
        raise Failed("closes a connection")
    client.heard += data
    while client.heard:
        if not waiting:
            raise Failed("answers what was not sent")
        answer, asked = waiting[0]
        if len(client.heard) < len(answer):
            return
        if not client.heard.startswith(answer):
            raise Failed("answers something else than it was sent")
        del client.heard[: len(answer)]
        waiting.popleft()
        yield asked


def tail(sizes: Sizes) -> Iterator[Case]:
    for name, misbehaviour in {"plain": "", "a stalled client": "stall", "handlers that crash": "crash"}.items():
        yield Case(
            name,
            partial(
                measure,
                connections=sizes.clients,
                messages=sizes.messages,
                seconds=sizes.tail,
                misbehaviour=misbehaviour,
            ),
        )


SUITES = {
    "tail": Suite(
        f"What a client waits for at {LOAD:.0%} of the load that each server can take, in µs, also with a client that "
        f"sends and does not read, and with a handler that raises every {CRASHES * 1000:.0f} ms",
        tail,
        tuple(ECHO),
        ("p50 µs", "p99 µs", "p99.9 µs"),
    )
}
