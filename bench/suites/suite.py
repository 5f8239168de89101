"""What a suite is: cases, each measured against every server, and how large they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.load import Meter
from bench.process import Server
from bench.servers import CHATS, MODELS, Mode

Figures = dict[str, float]  # by name, with the unit in it; the first is the one that counts


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    rounds: int
    messages: int  # of 64 bytes; of larger ones fewer
    connections: tuple[int, ...]
    clients: int  # connections where it is not their number that counts
    growth: tuple[int, ...]
    idle: tuple[int, ...]
    many: int  # connections that are ended together
    handshakes: int
    chats: int
    readers: int
    posts: int
    tail: float  # seconds
    patience: float  # seconds after which an end counts as none
    servers: tuple[str, ...] = ()  # where none are named; none are all


FULL = Sizes(
    rounds=5,
    messages=10_000,
    connections=(1, 100, 1000),
    clients=100,
    growth=(1, 10, 100, 1000, 10_000),
    idle=(1000, 10_000),
    many=10_000,
    handshakes=2000,
    chats=100,
    readers=1000,
    posts=5,
    tail=2.0,
    patience=60.0,
)
QUICK = Sizes(
    rounds=3,
    messages=2000,
    connections=(100,),
    clients=100,
    growth=(1, 100),
    idle=(200,),
    many=200,
    handshakes=200,
    chats=20,
    readers=50,
    posts=1,
    tail=0.2,
    patience=10.0,
    servers=(
        "tricorn",
        "trio-websocket",
        "websockets-asyncio",
        "aiohttp-uvloop",
        "picows-websockets-uvloop",
        "c-epoll",
        *CHATS,
        *MODELS,
    ),
)
TINY = Sizes(
    rounds=1,
    messages=20,
    connections=(2,),
    clients=2,
    growth=(1, 4),
    idle=(4,),
    many=4,
    handshakes=4,
    chats=2,
    readers=2,
    posts=1,
    tail=0.1,
    patience=10.0,
)


@dataclass(frozen=True)
class Case:
    """One thing to measure of a server that runs in `mode`.

    Unless `fresh`, the server is one that has served other cases and will serve more. `before` is what its command
    stands behind.
    """

    name: str
    measure: Callable[[Server], Figures]
    mode: Mode = "bare"
    fresh: bool = False
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """Cases that belong together, the servers that can be compared in them, and which of the figures a table shows."""

    about: str
    cases: Callable[[Sizes], Iterable[Case]]
    servers: tuple[str, ...]
    shown: tuple[str, ...] = ("µs CPU",)


def per_message(meter: Meter, messages: int) -> Figures:
    """What a message has cost the server, and who was busy: the load must not be what is waited for."""
    return {
        "µs CPU": meter.cpu / messages * 1e6,
        "messages/s": messages / meter.seconds,
        "server busy %": meter.cpu / meter.seconds * 100,
        "load busy %": meter.load / meter.seconds * 100,
    }
