"""From nothing to the first connection, and what is imported on the way there and afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic

from bench.load import Clients, Failed, text
from bench.process import ADDRESS, Server
from bench.servers import SERVERS
from bench.suites.suite import Case, Figures, Sizes, Suite

# Python's own list: a line for each module that is loaded, in the moment when it is.
LISTING = ("env", "PYTHONPROFILEIMPORTTIME=1")
IMPORT = re.compile(rb"^import time: +\d", re.MULTILINE)
NO_FRAME = b"\x83\x80abcd"  # an opcode that there is not (RFC 6455 §5.2)


def cold(server: Server) -> Figures:
    with Clients(server) as clients:
        clients.connect(1)
        return {"s": monotonic() - server.began, "s CPU": server.cpu()}


def modules(server: Server) -> Figures:
    """Count imports up to the address and afterwards, where clients say what is right, what is wrong, and vanish."""
    with Clients(server) as clients:
        clients.connect(3)
        for client, said in zip(clients, (text(b"hello"), NO_FRAME, b"\x81"), strict=True):
            client.sock.sendall(said)
        clients.hear()
        clients.vanish()
    with suppress(Failed, OSError), Clients(server) as clients:
        clients.connect(1, "/crash")
        for client in clients:
            client.sock.sendall(text(b"hello"))
        clients.hear()
        clients.vanish()
    with suppress(Failed, OSError), Clients(server) as clients:
        clients.connect(1)  # by then it has done with the others
    before, _, after = server.output().partition(ADDRESS.search(server.output())[0])
    return {"modules": len(IMPORT.findall(before)), "imports afterwards": len(IMPORT.findall(after))}


def imports(sizes: Sizes) -> Iterator[Case]:
    yield Case("cold start", cold, fresh=True)
    yield Case("imports", modules, fresh=True, before=LISTING)


SUITES = {
    "imports": Suite(
        "From the start of the process to the first handshake, in seconds; modules loaded up to then, and those loaded "
        "afterwards, by an echo, an error of a client and one of a handler",
        imports,
        tuple(name for name, program in SERVERS.items() if program.imports),
        ("s", "s CPU", "modules", "imports afterwards"),
    )
}
