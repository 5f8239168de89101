"""What a token of a model costs, all the way from the model's server to a client."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from secrets import token_hex

from bench.load import Clients, Failed, Meter, frames, text
from bench.model import ANSWER, PAUSE, TOKENS
from bench.process import Server
from bench.servers import MODELS
from bench.suites.chat import decode, encode, is_complete, open_all, said
from bench.suites.suite import Case, Figures, Sizes, Suite, per_message


def measure(server: Server, *, conversations: int) -> Figures:
    """Post once in each conversation, all at a time; every client must hear the whole answer."""
    with Clients(server) as clients:
        clients.connect(conversations, headers="Sec-WebSocket-Protocol: tricorn.v1\r\n")
        names = {client: token_hex(8) for client in clients}
        open_all(clients, names)
        with Meter(server) as meter:
            for client, name in names.items():
                client.sock.sendall(text(encode({"type": "post", "id": "p", "conversation": name, "text": "tell me"})))
            waiting = set(clients)
            while waiting:
                for client, data in said(clients):
                    client.heard += data
                    if is_complete(client.heard):
                        check(client.heard)
                        waiting.discard(client)
    return per_message(meter, TOKENS * conversations)


def check(heard: bytearray) -> None:
    """Raise `Failed` if that is not the model's answer."""
    events = [decode(payload) for _, payload in frames(heard)]
    if "".join(event.text for event in events if event.type == "agent_message") != ANSWER:
        raise Failed("answers something else")
    if events[-1].outcome != "success":
        raise Failed(f"ends a run with {events[-1].outcome}")


def model(sizes: Sizes) -> Iterator[Case]:
    yield Case(f"{sizes.chats} conversations at a time", partial(measure, conversations=sizes.chats))


SUITES = {
    "model": Suite(
        f"CPU for a token of a model, from its server to a client, in µs; each client gets {1 / PAUSE:.0f} in a second",
        model,
        tuple(MODELS),
    )
}
