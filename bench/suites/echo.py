"""What an echoed message costs: by size, by number of connections, and with many on the way."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bench.load import Clients, Meter, echoes
from bench.process import Server
from bench.servers import ECHO
from bench.suites.suite import Case, Figures, Sizes, Suite, per_message

SIZES = {"64 B": 64, "4 KiB": 4 << 10, "1 MiB": 1 << 20}
IN_FLIGHT = 16
ACTIVE = 100
ON_THE_WAY = 128 << 20  # bytes; a server may have to keep all of it


def measure(
    server: Server, *, connections: int, messages: int, size: int = 64, in_flight: int = 1, active: int | None = None
) -> Figures:
    """Have echoes on `active` of the connections at a time, or on all; each has its turn."""
    exchanges = echoes(size, in_flight)
    number = max(messages // in_flight, connections)
    at_once = min(active or connections, ON_THE_WAY // (size * in_flight))
    with Clients(server) as clients:
        clients.connect(connections)
        clients.exchange(exchanges, max(number // 5, connections), at_once)  # warm
        with Meter(server) as meter:
            clients.exchange(exchanges, number, at_once)
    return per_message(meter, number * in_flight)


def echo(sizes: Sizes) -> Iterator[Case]:
    for connections in sizes.connections:
        for name, size in SIZES.items():
            messages = max(sizes.messages * 64 // max(64, size // 4), 3)
            yield Case(
                f"{connections} × {name}",
                partial(measure, connections=connections, size=size, messages=messages),
            )


def pipelined(sizes: Sizes) -> Iterator[Case]:
    connections = sizes.clients
    yield Case(
        f"{connections} × 64 B, {IN_FLIGHT} in flight",
        partial(measure, connections=connections, messages=sizes.messages * 5, in_flight=IN_FLIGHT),
    )


def growth(sizes: Sizes) -> Iterator[Case]:
    for connections in sizes.growth:
        yield Case(
            f"{connections:,}",
            partial(measure, connections=connections, messages=sizes.messages, active=ACTIVE),
        )


SUITES = {
    "echo": Suite("CPU of the server for an echoed message, in µs", echo, tuple(ECHO)),
    "pipelined": Suite("The same, with more messages on the way", pipelined, tuple(ECHO)),
    "growth": Suite(
        f"CPU for a message of 64 bytes, in µs, by the number of connections, of which {ACTIVE} are active at a time",
        growth,
        tuple(ECHO),
    ),
}
