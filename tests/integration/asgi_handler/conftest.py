"""A server of ASGI applications in the test's own Trio, in each way in, and a client that reads when it is told to."""

from __future__ import annotations

import re
import ssl
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import hypercorn.trio
import pytest
import trio
import trustme
from hypercorn.config import Config
from trio.testing import MockClock
from websockets.client import ClientProtocol
from websockets.frames import DATA_OPCODES, Close, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

import tricorn
from fixtures.records import Records

PATIENCE = 60  # seconds, for a whole test
MOCK_PATIENCE = 1000  # seconds of a mock clock

AUTHORITY = trustme.CA()

PAGE = re.compile(rb"HTTP/1\.1 200 .*?\r\ncontent-length: (\d+)\r\n.*?\r\n\r\n(.*)", re.DOTALL)


@pytest.fixture(autouse=True)
def reported(records: Records) -> Records:
    """An error that the test does not ask for fails it."""
    return records


@dataclass
class Client:
    """A WebSocket client past its handshake. It reads, and answers, only while it is told to receive."""

    stream: trio.abc.Stream
    protocol: ClientProtocol
    frames: deque[Frame] = field(default_factory=deque)
    response: Response = field(init=False)

    async def send(self, *messages: str | bytes) -> None:
        """Send messages, all of them in one write."""
        for message in messages:
            if isinstance(message, str):
                self.protocol.send_text(message.encode())
            else:
                self.protocol.send_binary(message)
        await self.flush()

    async def flush(self) -> None:
        for data in self.protocol.data_to_send():
            if data:
                await self.stream.send_all(data)

    async def frame(self) -> Frame:
        while not self.frames:
            data = await self.stream.receive_some(65536)
            assert data, "the stream ended"
            self.protocol.receive_data(data)
            self.take()
            await self.flush()
        return self.frames.popleft()

    def take(self) -> None:
        for event in self.protocol.events_received():
            if isinstance(event, Response):
                self.response = event
            elif isinstance(event, Frame) and event.opcode not in (Opcode.PING, Opcode.PONG):
                self.frames.append(event)

    async def receive(self) -> str | bytes:
        """Return the next message."""
        frame = await self.frame()
        assert frame.opcode in DATA_OPCODES, frame
        return frame.data.decode() if frame.opcode is Opcode.TEXT else bytes(frame.data)

    async def closed(self) -> tuple[int, str]:
        """Return code and reason of the close frame, which must come next."""
        frame = await self.frame()
        assert frame.opcode is Opcode.CLOSE, frame
        close = Close.parse(frame.data)
        return close.code, close.reason

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Send a close frame, and wait for the answer to it."""
        self.protocol.send_close(code, reason)
        await self.flush()
        assert (await self.closed())[0] == code


@dataclass
class Running:
    """A server that runs. `over` is set once it is closed, for which its scope is cancelled."""

    port: int
    tls: bool
    hides_codes: bool  # Hypercorn reads the frames, and does not tell how a client closed
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    over: trio.Event = field(default_factory=trio.Event)

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[trio.abc.Stream]:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with stream:
            if not self.tls:
                yield stream
                return
            context = ssl.create_default_context()
            AUTHORITY.configure_trust(context)
            wrapped = trio.SSLStream(stream, context, server_hostname="127.0.0.1", https_compatible=True)
            await wrapped.do_handshake()
            yield wrapped

    @asynccontextmanager
    async def ask(
        self, path: str, headers: dict[str, str] | None = None, **options: Any
    ) -> AsyncGenerator[tuple[Client, Response]]:
        """A client past the response to its handshake, whatever that is. The options are those of ClientProtocol."""
        async with self.open() as stream:
            scheme = "wss" if self.tls else "ws"
            uri = parse_uri(f"{scheme}://127.0.0.1:{self.port}{path}")
            protocol = ClientProtocol(uri, max_size=None, **options)
            request = protocol.connect()
            request.headers.update(headers or {})
            protocol.send_request(request)
            client = Client(stream, protocol)
            await client.flush()
            while protocol.state is State.CONNECTING and protocol.handshake_exc is None:
                data = await stream.receive_some(65536)
                protocol.receive_data(data) if data else protocol.receive_eof()
            client.take()
            yield client, client.response

    @asynccontextmanager
    async def connect(self, path: str = "/", **options: Any) -> AsyncGenerator[Client]:
        """A client past a handshake that must succeed."""
        async with self.ask(path, **options) as (client, response):
            assert response.status_code == 101, response
            yield client

    async def refused(self, path: str = "/", **options: Any) -> Response:
        """Return the response to a handshake, which must fail."""
        async with self.ask(path, **options) as (_, response):
            assert response.status_code != 101
            return response

    async def get(self, path: str = "/") -> str:
        """Return the body of a page, which must be there."""
        async with self.open() as stream:
            await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            data = b""
            while not (page := PAGE.fullmatch(data)) or len(page[2]) < int(page[1]):
                more = await stream.receive_some(65536)
                assert more, data
                data += more
            return page[2].decode()


async def native(handler: Any, *, task_status: trio.TaskStatus[int], **options: Any) -> None:
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(tricorn.serve, handler, 0, **options))
        task_status.started(server.addresses[0][1])


async def with_tls(handler: Any, *, task_status: trio.TaskStatus[int], **options: Any) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    AUTHORITY.issue_cert("127.0.0.1").configure_cert(context)
    await native(handler, task_status=task_status, ssl_context=context, **options)


async def plain_hypercorn(handler: Any, *, task_status: trio.TaskStatus[int], **options: Any) -> None:
    """Under Hypercorn's own server, which is told to end if this is cancelled."""
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    config.graceful_timeout = 5
    told = trio.Event()
    serve = partial(hypercorn.trio.serve, tricorn.asgi_app(handler, **options), config, shutdown_trigger=told.wait)
    async with trio.open_nursery() as outer:
        with trio.CancelScope(shield=True):
            [address] = await outer.start(_shielded, serve)
        task_status.started(int(address.rpartition(":")[2]))
        try:
            await trio.sleep_forever()
        finally:
            told.set()


async def _shielded(serve: Any, task_status: trio.TaskStatus[list[str]]) -> None:
    with trio.CancelScope(shield=True):
        await serve(task_status=task_status)


@asynccontextmanager
async def running(host: Any, handler: Any, **options: Any) -> AsyncGenerator[Running]:
    server = Running(0, host is with_tls, host is plain_hypercorn)

    async def serving(task_status: trio.TaskStatus[int]) -> None:
        with server.scope:
            await host(handler, task_status=task_status, **options)
        server.over.set()

    before = trio.lowlevel.current_statistics().tasks_living
    mocked = isinstance(trio.lowlevel.current_clock(), MockClock)
    with trio.fail_after(MOCK_PATIENCE if mocked else PATIENCE):
        async with trio.open_nursery() as nursery:
            server.port = await nursery.start(serving)
            yield server
            server.scope.cancel()
    assert trio.lowlevel.current_statistics().tasks_living == before


Served = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def served() -> Served:
    """`async with served(handler, **options) as server`: on the native server."""
    return partial(running, native)


@pytest.fixture(params=[native, with_tls, plain_hypercorn])
def everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Served:
    """Like `served`, in each way in."""
    monkeypatch.setattr("tricorn.application.LOOK", 0.01)
    return partial(running, request.param)
