"""The servers, each a process: how it is started, and in which of three ways.

`defaults` is what its documentation begins with; `bare` is without compression and without pings of its own, the
fastest that its documentation tells of; `deflate` is `bare` with compression. A server listens on a port that the
kernel chooses and says which in the first line with an address. An echo server has three paths: `/` echoes text,
`/crash` raises at the first message, `/flood` answers the first message without end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

from bench import logs, model

Mode = Literal["defaults", "bare", "deflate"]

PYTHON = sys.executable
ASGI = "bench.servers.asgi:app"


@dataclass(frozen=True)
class Program:
    """A server's command, and what its modes add to it.

    In it, {host} and {mode} stand for themselves, and {beside} for the address of what is started beside the server.
    """

    command: tuple[str, ...]
    options: dict[Mode, tuple[str, ...]] = field(default_factory=dict)
    path: str = "/"
    deflates: bool = True
    crashes: bool = True  # at /crash; one that has no handlers has none that could
    imports: bool = True  # modules, of Python
    beside: Callable[[], AbstractContextManager[str]] = logs.memory  # its log, or the model that it asks

    def line(self, host: str, mode: Mode, beside: str) -> list[str]:
        return [
            part.format(host=host, mode=mode, beside=beside) for part in (*self.command, *self.options.get(mode, ()))
        ]


def own(module: str, *arguments: str, **facts: bool) -> Program:
    """A program of this folder."""
    return Program((PYTHON, "-m", f"bench.servers.{module}", "{host}", "{mode}", *arguments), **facts)


def hypercorn(worker: str, app: str = ASGI, path: str = "/") -> Program:
    return Program((PYTHON, "-m", "hypercorn", "-k", worker, "-b", "{host}:0", app), path=path)


def uvicorn(implementation: str) -> Program:
    bare = ("--no-access-log", "--ws-ping-interval", "86400", "--ws-per-message-deflate")
    return Program(
        (PYTHON, *f"-m uvicorn --loop uvloop --ws {implementation} --host {{host}} --port 0 {ASGI}".split()),
        {"bare": (*bare, "false"), "deflate": (*bare, "true")},
    )


# No limit on what one user may do, since no load is a person.
CHAT = ("env", "TRICORN_POSTS_PER_MINUTE=1000000", "TRICORN_MAX_CONNECTIONS=100000")


def chat(program: Program, log: str = "{beside}") -> Program:
    return Program((*CHAT, f"TRICORN_LOG={log}", *program.command), path="/ws")


TRICORN_SERVE = (PYTHON, "-m", "tricorn", "serve", "--bind", "{host}:0")


def asyncio_version(loop: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "bench.asyncio_version", "--bind", "{host}:0", "--loop", loop)


def asking(command: tuple[str, ...], *variables: str) -> Program:
    """A chat whose agent asks a model, of which it is told by options or by variables."""
    program = chat(Program(("env", *variables, *command)), log="memory:")
    return replace(program, beside=model.streaming)


ECHO = {
    "tricorn": own("tricorn_native"),
    "tricorn-hypercorn": hypercorn("trio", "bench.servers.tricorn_asgi:app"),
    "trio-websocket": own("trio_websocket", deflates=False),
    "websockets-trio": own("websockets_trio"),
    "websockets-asyncio": own("websockets_asyncio", "asyncio", "websockets"),
    "websockets-uvloop": own("websockets_asyncio", "uvloop", "websockets"),
    "hypercorn-trio": hypercorn("trio"),
    "hypercorn-asyncio": hypercorn("asyncio"),
    "hypercorn-uvloop": hypercorn("uvloop"),
    "uvicorn-websockets": uvicorn("websockets-sansio"),
    "uvicorn-wsproto": uvicorn("wsproto"),
    "aiohttp": own("aiohttp", "asyncio"),
    "aiohttp-uvloop": own("aiohttp", "uvloop"),
    "picows-uvloop": own("picows", deflates=False),
    "picows-websockets-uvloop": own("websockets_asyncio", "uvloop", "picows.websockets"),
    "node-ws": Program(
        ("env", "NODE_PATH=/usr/share/nodejs", "node", "bench/servers/node_ws.js", "{host}", "{mode}"), imports=False
    ),
    "c-epoll": own("epoll_echo", deflates=False, crashes=False, imports=False),
}
SERVE = chat(Program(TRICORN_SERVE))
OPENAI = ("OPENAI_BASE_URL={beside}", "OPENAI_API_KEY=none", "TRICORN_AGENT=bench.openai_agent:answer")
CHATS = {  # with the log in memory, which both versions have, unless the name says otherwise
    "tricorn-serve": SERVE,
    "tricorn-serve-sqlite": replace(SERVE, beside=logs.sqlite),
    "tricorn-serve-redis": replace(SERVE, beside=logs.redis),
    "tricorn-serve-postgres": replace(SERVE, beside=logs.postgres),
    "tricorn-serve-hypercorn": chat(hypercorn("trio", "tricorn.asgi:app")),
    "asyncio-version": chat(Program(asyncio_version("asyncio"))),
    "asyncio-version-uvloop": chat(Program(asyncio_version("uvloop"))),
    "asyncio-version-hypercorn": chat(hypercorn("asyncio", "bench.asyncio_version.asgi:app")),
}
MODELS = {  # with the log in memory; a server beside them streams what a model might say
    "tricorn-model": asking((*TRICORN_SERVE, "--model", "m", "--base-url", "{beside}")),
    "asyncio-version-openai": asking(asyncio_version("asyncio"), *OPENAI),
    "asyncio-version-openai-uvloop": asking(asyncio_version("uvloop"), *OPENAI),
}
SERVERS = ECHO | CHATS | MODELS
