"""A chat that wants tokens, on a free port, and a client that can be as bad as it likes."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from time import time
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream

from tricorn import WebSocket, serve
from tricorn.chat import SUBPROTOCOLS, Chat, Run
from tricorn.chat.identity import Gate
from tricorn.chat.protocol import SUBPROTOCOL
from tricorn.service.auth import Tokens, make_token
from tricorn.service.jwt_keys import Keys, parse, parse_for_signing
from tricorn.service.pages import pages
from tricorn.service.settings import ServiceSettings

PATIENCE = 10  # seconds, for a whole test
SECRET = "a secret of thirty-two bytes or more"


async def echo(run: Run) -> None:
    """Says what was said to it; then `wait` waits until the run is ended, and `fail` fails."""
    await run.say(f"{run.message} {run.user}")
    if run.message.endswith("fail"):
        raise RuntimeError(run.message)
    if run.message.endswith("wait"):
        await trio.sleep_forever()


async def _fail() -> None:
    raise RuntimeError("a secret of the handler's")


class Client:
    def __init__(self, ws: WebSocketConnection) -> None:
        self.ws = ws
        self.heard: list[str] = []
        self.id = ""

    async def say(self, type_: str, **fields: Any) -> None:
        await self.ws.send_message(json.dumps({"type": type_, **fields}))

    async def hear(self) -> dict[str, Any]:
        text = await self.ws.get_message()
        assert isinstance(text, str)
        self.heard.append(text)
        heard = json.loads(text)
        assert isinstance(heard, dict)
        return heard

    async def until(self, type_: str) -> dict[str, Any]:
        while (heard := await self.hear())["type"] != type_:
            pass
        return heard

    async def end(self) -> tuple[int, str]:
        """The close code and reason, once the server has closed."""
        try:
            while True:
                await self.hear()
        except ConnectionClosed as closed:
            return closed.reason.code, closed.reason.reason or ""


class Server:
    def __init__(self, settings: ServiceSettings) -> None:
        self.port = 0
        self.settings = settings
        self.connections: dict[str, WebSocket] = {}

    def crash(self, connection: str) -> None:
        """Have a task of this connection's handler raise."""
        self.connections[connection].nursery.start_soon(_fail)

    def token(self, user: str = "ada", ttl: float = 60, share: Sequence[str] = ()) -> str:
        return make_token(parse_for_signing(SECRET), user, time(), ttl, self.settings, tuple(share))

    @asynccontextmanager
    async def connect(
        self,
        authorization: str | None = None,
        subprotocols: Sequence[str] = (SUBPROTOCOL,),
        path: str = "/ws",
        headers: Sequence[tuple[bytes, bytes]] = (),
        host: str | None = None,
    ) -> AsyncGenerator[Client]:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        more = [*headers]
        if authorization is not None:
            more.append((b"Authorization", authorization.encode()))
        async with stream, trio.open_nursery() as nursery:
            ws = await wrap_client_stream(
                nursery,
                stream,
                host or f"127.0.0.1:{self.port}",
                path,
                subprotocols=list(subprotocols),
                extra_headers=more,
            )
            yield Client(ws)
            await ws.aclose()
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def user(self, name: str = "ada", share: Sequence[str] = ()) -> AsyncGenerator[Client]:
        """A client that has been welcomed."""
        async with self.connect(f"Bearer {self.token(name, share=share)}") as client:
            welcome = await client.hear()
            assert welcome["user"] == name
            client.id = welcome["connection"]
            yield client


@asynccontextmanager
async def chat_with_tokens(
    key: str = SECRET, gate: Callable[[ServiceSettings], Gate] | None = None, **settings: Any
) -> AsyncGenerator[Server]:
    made = ServiceSettings(**settings)
    chosen = gate(made) if gate else Tokens(Keys(parse(key)), made)
    with trio.fail_after(PATIENCE):
        server = Server(made)

        async def handler(ws: WebSocket) -> None:
            server.connections[ws.id] = ws
            await chat.session(ws)

        async with Chat(echo, made, gate=chosen) as chat, trio.open_nursery() as nursery:
            options = {
                "settings": made,
                "subprotocols": SUBPROTOCOLS,
                "app": pages(chat.why_not_ready),
                "drain": chat.drain,
            }
            serving = await nursery.start(partial(serve, {"/ws": handler}, 0, **options))  # type: ignore[arg-type]
            server.port = serving.addresses[0][1]
            yield server
            nursery.cancel_scope.cancel()


@pytest.fixture
def guarded() -> Callable[..., AbstractAsyncContextManager[Server]]:
    """`async with guarded(key, **settings) as server, server.connect(...) as client`; ends with the block."""
    return chat_with_tokens
