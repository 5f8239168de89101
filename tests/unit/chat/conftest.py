"""A client without a socket: both ends of a connection in memory."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import pytest
import trio
import trio.testing

from tricorn.chat import Chat
from tricorn.request import Request


class Client:
    """To the chat it is a WebSocket, to the test it is the client at its other end."""

    def __init__(self, subprotocol: str | None, headers: dict[str, str] | None = None) -> None:
        self.subprotocol = subprotocol
        self.id = "connection-1"
        self.context: dict[str, object] = {}
        self.request = Request("GET", "/ws", "", "1.1", headers or {"host": "localhost:8080"}, ("127.0.0.1", 50000))
        self.closed: tuple[int, str] | None = None
        self.ended = trio.Event()
        self.messages: list[str] = []  # as they were sent
        self.writes = 0
        self.sizes: list[int] = []  # of the writes, in bytes
        self.readable = trio.Event()
        self.readable.set()
        self._heard = 0
        self._objects: list[dict[str, Any]] = []
        self._arrived = trio.lowlevel.ParkingLot()
        self._sender, self._receiver = trio.open_memory_channel[str | bytes](math.inf)

    async def serve(self, chat: Chat) -> None:
        try:
            async with trio.open_nursery() as self.nursery:
                await chat.session(self)  # type: ignore[arg-type]
                self.nursery.cancel_scope.cancel()
        finally:
            self.ended.set()

    # What the chat uses

    def __aiter__(self) -> AsyncIterator[str | bytes]:
        return self._receiver

    def limit_messages(self, max_bytes: int) -> None:
        pass

    async def send_texts(self, payloads: Iterable[bytes]) -> None:
        messages = [payload.decode() for payload in payloads]
        await trio.lowlevel.checkpoint()
        await self.readable.wait()
        self._hear(messages)

    def send_texts_nowait(self, payloads: Iterable[bytes]) -> None:
        if not self.readable.is_set():
            raise trio.WouldBlock
        self._hear([payload.decode() for payload in payloads])

    def _hear(self, messages: list[str]) -> None:
        self.writes += 1
        self.sizes.append(sum(map(len, messages)))
        self.messages += messages
        self._objects += [json.loads(line) for message in messages for line in message.split("\n")]
        self._arrived.unpark_all()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        self.closed = (code, reason)
        self.nursery.cancel_scope.cancel()
        await trio.sleep_forever()

    # What a test uses

    def say(self, type: str, **fields: Any) -> None:
        self.send(json.dumps({"type": type, **fields}))

    def send(self, message: str | bytes) -> None:
        self._sender.send_nowait(message)

    def stop_reading(self) -> None:
        self.readable = trio.Event()

    async def leave(self) -> None:
        self._sender.close()
        await self.ended.wait()

    async def hear(self) -> dict[str, Any]:
        while self._heard == len(self._objects):
            await self._arrived.park()
        self._heard += 1
        return self._objects[self._heard - 1]

    async def hear_until(self, type: str) -> list[dict[str, Any]]:
        """The objects up to and with the next one of this type."""
        heard = [await self.hear()]
        while heard[-1]["type"] != type:
            heard.append(await self.hear())
        return heard

    async def hear_all(self) -> list[dict[str, Any]]:
        """What there is once nothing moves any more."""
        await trio.testing.wait_all_tasks_blocked()
        heard, self._heard = self._objects[self._heard :], len(self._objects)
        return heard


@pytest.fixture
def client_type() -> type[Client]:
    return Client


@pytest.fixture
def connect(nursery: trio.Nursery) -> Callable[..., Awaitable[Client]]:
    """Connect a client to a chat and hear its welcome."""

    async def connect(chat: Chat, subprotocol: str | None = "tricorn.v1") -> Client:
        client = Client(subprotocol)
        nursery.start_soon(client.serve, chat)
        assert (await client.hear())["type"] == "welcome"
        return client

    return connect
