"""Compression: bytes on the wire against CPU."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import cycle

from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode

from bench.load import Client, Clients, Failed, Meter, exchange, frames
from bench.process import Server
from bench.servers import ECHO
from bench.suites.suite import Case, Figures, Sizes, Suite, per_message

# The client compresses each message by itself, so that what it sends can be made before the clock starts.
OFFER = "Sec-WebSocket-Extensions: permessage-deflate; client_no_context_takeover\r\n"
COMPRESSED = 0x40  # RSV1, RFC 7692 §6
WORDS = (
    "agent",
    "answer",
    "city",
    "cloud",
    "forecast",
    "message",
    "north",
    "rain",
    "result",
    "sun",
    "time",
    "tool",
    "wind",
)
SIZE = 2048  # some leave alone what is shorter than 1 KiB
MESSAGES = 64  # that are different


def texts() -> list[bytes]:
    """Events as a chat has them: JSON, words, a number."""
    made = []
    for seq in range(MESSAGES):
        words = " ".join(random.choices(WORDS, k=SIZE // 6))
        made.append(
            f'{{"type":"agent_message","conversation":"home","seq":{seq},"text":"{words[: SIZE - 70]}"}}'.encode()
        )
    return made


def plain(server: Server, *, connections: int, messages: int) -> Figures:
    exchanges = [exchange([payload]) for payload in texts()]
    with Clients(server) as clients:
        clients.connect(connections)
        clients.exchange(exchanges, max(messages // 5, connections))
        with Meter(server) as meter:
            clients.exchange(exchanges, messages)
    size = sum(len(each.answer) for each in exchanges) / len(exchanges)
    return {**per_message(meter, messages), "bytes": size}


def compressed(server: Server, *, connections: int, messages: int) -> Figures:
    payloads = texts()
    deflate = PerMessageDeflate(True, True, 15, 15)
    requests = [Frame(Opcode.TEXT, payload).serialize(mask=True, extensions=[deflate]) for payload in payloads]
    with Clients(server) as clients:
        clients.connect(connections, headers=OFFER)
        ears = {client: Ear(client.head) for client in clients}
        echo(clients, ears, payloads, requests, max(messages // 5, connections))
        before = sum(ear.bytes for ear in ears.values())
        with Meter(server) as meter:
            echo(clients, ears, payloads, requests, messages)
        size = (sum(ear.bytes for ear in ears.values()) - before) / messages
    return {**per_message(meter, messages), "bytes": size}


class Ear:
    """What one client hears, decompressed. Raises `Failed` where the server agreed to no compression."""

    def __init__(self, head: bytes) -> None:
        agreed = head.lower()
        if b"permessage-deflate" not in agreed:
            raise Failed("does not compress")
        self.bytes = 0
        self.expected: deque[bytes] = deque()
        self._deflate = PerMessageDeflate(b"server_no_context_takeover" in agreed, True, 15, 15)

    def hear(self, client: Client, data: bytes) -> int:
        """How many messages have come; raises `Failed` where one is not what was expected."""
        self.bytes += len(data)
        client.heard += data
        messages = frames(client.heard)
        for first, payload in messages:
            frame = Frame(Opcode(first & 15), payload, rsv1=bool(first & COMPRESSED))
            if self._deflate.decode(frame).data != self.expected.popleft():
                raise Failed("answers something else than it was sent")
        return len(messages)


def echo(clients: Clients, ears: dict[Client, Ear], payloads: list[bytes], requests: list[bytes], number: int) -> None:
    """Have so many messages echoed, one at a time on each connection."""
    more = cycle(zip(payloads, requests, strict=True))

    def send(client: Client) -> None:
        payload, request = next(more)
        ears[client].expected.append(payload)
        client.sock.sendall(request)

    left = number
    for client in clients:
        send(client)
        left -= 1
    going = number - left
    while going:
        heard = clients.hear()
        if not heard:
            raise Failed("does not answer")
        for client, data in heard:
            if not data:
                raise Failed("closes a connection")
            for _ in range(ears[client].hear(client, data)):
                if left:
                    send(client)
                    left -= 1
                else:
                    going -= 1


def deflate(sizes: Sizes) -> Iterator[Case]:
    connections = sizes.clients
    messages = max(sizes.messages // 2, connections)
    yield Case("plain", partial(plain, connections=connections, messages=messages))
    yield Case("deflate", partial(compressed, connections=connections, messages=messages), mode="deflate")


SUITES = {
    "deflate": Suite(
        "CPU for an echoed message of 2 KiB, in µs, and bytes on the wire, without and with compression, by those that "
        "have it",
        deflate,
        tuple(name for name, program in ECHO.items() if program.deflates),
        ("µs CPU", "bytes"),
    )
}
