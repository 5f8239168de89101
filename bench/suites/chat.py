"""What an event of the chat costs, from the log to a client: one client in each conversation, or very many in one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from secrets import token_hex

import msgspec

from bench.load import Client, Clients, Failed, Meter, frames, text
from bench.process import Server
from bench.servers import CHATS
from bench.suites.suite import Case, Figures, Sizes, Suite, per_message

PIECES = 32
WORDS = [token_hex(4)[:7] for _ in range(PIECES)]
POST = f"reverse {' '.join(WORDS)}"  # the demo agent says one word a piece, where a word has seven letters
ANSWER = " ".join(WORDS)[::-1]
EVENTS = [
    "user_message",
    "agent_started",
    "agent_thinking",
    "tool_executing",
    "tool_completed",
    *["agent_message"] * PIECES,
    "agent_completed",
]
LAST = EVENTS[-1].encode()
TEXT = 0x81
AGENTS = {"an agent that waits": "waiting", "an agent that waits for a pulse": "pulse"}


class Event(msgspec.Struct):
    type: str
    seq: int = 0
    text: str = ""
    outcome: str = ""


decode = msgspec.json.Decoder(Event).decode
encode = msgspec.json.encode


def measure(server: Server, *, conversations: int, readers: int, posts: int, subprotocol: str) -> Figures:
    """Post in each conversation, one post after the other; every reader of it must hear all that must come of it."""
    names = [token_hex(8) for _ in range(conversations)]
    with Clients(server) as clients:
        clients.connect(conversations * readers, headers=f"Sec-WebSocket-Protocol: {subprotocol}\r\n")
        groups = {client: names[index // readers] for index, client in enumerate(clients)}
        open_all(clients, groups)
        post(clients, groups, 0)  # warm
        with Meter(server) as meter:
            for turn in range(1, posts + 1):
                post(clients, groups, turn)
    return per_message(meter, len(EVENTS) * len(groups) * posts)


def open_all(clients: Clients, names: dict[Client, str]) -> None:
    """Have each client follow its conversation."""
    for client, name in names.items():
        client.sock.sendall(text(encode({"type": "open", "conversation": name})))
    waiting = set(clients)
    while waiting:
        for client, data in said(clients):
            client.heard += data
            for _, payload in frames(client.heard):
                types = [decode(line).type for line in payload.splitlines()]
                if "error" in types:
                    raise Failed(f"says {payload.decode()}")
                if "opened" in types:
                    waiting.remove(client)


def post(clients: Clients, groups: dict[Client, str], turn: int) -> None:
    """Post once in each conversation; wait until every client has heard what comes of it, and check it."""
    for name, client in {name: client for client, name in groups.items()}.items():
        message = {"type": "post", "id": f"p-{turn}", "conversation": name, "text": POST}
        client.sock.sendall(text(encode(message)))
    waiting = set(clients)
    while waiting:
        for client, data in said(clients):
            client.heard += data
            if is_complete(client.heard):
                check(bytes(client.heard), turn * len(EVENTS))
                client.heard.clear()
                waiting.discard(client)


def said(clients: Clients) -> list[tuple[Client, bytes]]:
    heard = clients.hear()
    if not heard:
        raise Failed("says nothing any more")
    if not all(data for _, data in heard):
        raise Failed("closes a connection")
    return heard


def is_complete(heard: bytearray) -> bool:
    """Whether the last event of a run has come, and all of it; that no parsing is needed for."""
    return heard[-1:] in (b"}", b"\n") and heard.find(LAST, max(0, len(heard) - 1000)) >= 0


@lru_cache(maxsize=4)
def check(heard: bytes, before: int) -> None:
    """Check what came of a post, once for all who heard the same. Raises `Failed` where it is not what must come."""
    heard_frames = frames(stream := bytearray(heard))
    lines = [line for first, payload in heard_frames if first == TEXT for line in payload.splitlines()]
    events = [event for event in map(decode, lines) if event.type != "posted"]
    if stream or [event.type for event in events] != EVENTS:
        raise Failed(f"tells something else than a run: {[event.type for event in events]}")
    if [event.seq for event in events] != list(range(before + 1, before + len(EVENTS) + 1)):
        raise Failed("loses, doubles or swaps events")
    if "".join(event.text for event in events if event.type == "agent_message") != ANSWER:
        raise Failed("answers something else")
    if events[-1].outcome != "success":
        raise Failed(f"ends a run with {events[-1].outcome}")


def chat(sizes: Sizes) -> Iterator[Case]:
    chats = partial(measure, conversations=sizes.chats, readers=1, posts=sizes.posts)
    for subprotocol in ("tricorn.v1", "tricorn.v1.batch"):
        yield Case(f"{sizes.chats} conversations, {subprotocol}", partial(chats, subprotocol=subprotocol))
    for name, agent in AGENTS.items():
        before = "env", f"TRICORN_AGENT=bench.agent:{agent}"
        yield Case(f"tricorn.v1, {name}", partial(chats, subprotocol="tricorn.v1"), before=before)


def fanout(sizes: Sizes) -> Iterator[Case]:
    yield Case(
        f"{sizes.readers:,} readers",
        partial(measure, conversations=1, readers=sizes.readers, posts=sizes.posts, subprotocol="tricorn.v1"),
    )


SUITES = {
    "chat": Suite(
        f"CPU for an event delivered to a client, in µs; of a post come {len(EVENTS)}, {PIECES} of them pieces of text",
        chat,
        tuple(CHATS),
    ),
    "fanout": Suite("The same where very many follow one conversation", fanout, tuple(CHATS)),
}
