"""A server in the test's own Trio, on each host, and a client that reads only when it is told to."""

from __future__ import annotations

import json
import os
import select
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from struct import pack
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from websockets.client import ClientProtocol
from websockets.frames import DATA_OPCODES, Close, Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

import tricorn
from fixtures.hosts import HOSTS, Handler, Host, asgi, native
from tricorn.transport.poller import Epoll, PerSocket

PATIENCE = 60  # seconds, for a whole test
MOCK_PATIENCE = 1000  # seconds of a mock clock
# Seconds between two looks of an application whether it is told to end: a mock clock stops at each for a while, and
# with another one a test takes as long to end.
MOCK_LOOK = 1.0
LOOK = 0.01


READINESSES = [
    pytest.param(Epoll, marks=pytest.mark.skipif(not hasattr(select, "epoll"), reason="no epoll")),
    PerSocket,
]


@pytest.fixture(params=READINESSES)
def readiness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """How the server waits for its sockets."""
    monkeypatch.setattr("tricorn.server.best_poller", request.param)
    return request.param


@pytest.fixture
def patient_clock() -> MockClock:
    """Jumps to the next deadline when nothing has happened for a while: what is under way in the kernel gets there."""
    return MockClock(autojump_threshold=0.05)


class Records:
    """What was reported, as far as it has not been read yet."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def read(self, severity: str) -> list[dict[str, Any]]:
        """All the records of a severity; the others are dropped."""
        lines = self._capfd.readouterr().err.splitlines()
        return [record for record in map(json.loads, lines) if record["severity"] == severity]


@pytest.fixture(autouse=True)
def records(capfd: pytest.CaptureFixture[str]) -> Iterator[Records]:
    """What is reported on stderr. An error that the test did not ask for fails it."""
    records = Records(capfd)
    yield records
    assert records.read("ERROR") == []


@dataclass
class Client:
    """A WebSocket client. Nothing is read, and no ping or close frame is answered, but while it is told to receive."""

    stream: trio.SocketStream
    protocol: ClientProtocol
    frames: deque[Frame] = field(default_factory=deque)
    response: Any = None  # to the handshake, as websockets has it

    def request(self) -> bytes:
        """The request head."""
        self.protocol.send_request(self.protocol.connect())
        return b"".join(self.protocol.data_to_send())

    async def handshake(self) -> None:
        """Receive the response, which must accept."""
        while self.protocol.state is State.CONNECTING:
            data = await self.stream.receive_some(65536)
            assert data
            self.protocol.receive_data(data)
            assert self.protocol.handshake_exc is None, self.protocol.handshake_exc
        self.response, *frames = self.protocol.events_received()
        self.frames += (event for event in frames if isinstance(event, Frame))

    async def send(self, *messages: str | bytes) -> None:
        """Send messages, all of them in one write."""
        for message in messages:
            if isinstance(message, str):
                self.protocol.send_text(message.encode())
            else:
                self.protocol.send_binary(message)
        await self.flush()

    async def flush(self) -> None:
        """Write what the protocol has to say."""
        for data in self.protocol.data_to_send():
            if data:
                await self.stream.send_all(data)

    async def frame(self, *, answer: bool = True) -> Frame | None:
        """The next frame, or None at the end of the stream."""
        while not self.frames:
            data = await self.stream.receive_some(65536)
            if not data:
                return None
            self.protocol.receive_data(data)
            assert self.protocol.parser_exc is None, self.protocol.parser_exc
            self.frames += (event for event in self.protocol.events_received() if isinstance(event, Frame))
            if answer:
                await self.flush()
        return self.frames.popleft()

    async def receive(self) -> str | bytes:
        """The next message; it is an error if something else comes."""
        frame = await self.frame()
        assert frame is not None
        assert frame.opcode in DATA_OPCODES, frame
        assert frame.fin
        return frame.data.decode() if frame.opcode is Opcode.TEXT else bytes(frame.data)

    async def closed(self, *, answer: bool = True) -> tuple[int, str]:
        """The code and the reason of the close frame, which must come next, and behind it the end of the stream."""
        frame = await self.frame(answer=answer)
        assert frame is not None
        assert frame.opcode is Opcode.CLOSE, frame
        assert await self.stream.receive_some() == b""
        close = Close.parse(frame.data)
        return close.code, close.reason

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Send a close frame."""
        self.protocol.send_close(code, reason)
        await self.flush()

    def reset(self) -> None:
        """Be gone with a RST."""
        self.stream.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, pack("ii", 1, 0))
        self.stream.socket.close()


@dataclass
class Server:
    port: int
    scope: trio.CancelScope
    """Cancel it to close the server."""
    over: trio.Event = field(default_factory=trio.Event)
    """It is closed."""
    own: tricorn.Server = field(init=False)
    """The server itself, on the native host."""

    @asynccontextmanager
    async def open(self, receive_buffer: int | None = None) -> AsyncGenerator[trio.SocketStream]:
        """A socket that has said nothing yet. `receive_buffer` bounds what it takes without reading, in bytes."""
        socket = trio.socket.socket()
        if receive_buffer:
            socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, receive_buffer)
        with socket:
            await socket.connect(("127.0.0.1", self.port))
            yield trio.SocketStream(socket)

    @asynccontextmanager
    async def connect(
        self, path: str = "/", receive_buffer: int | None = None, **options: Any
    ) -> AsyncGenerator[Client]:
        """A client past its handshake. The options are those of websockets' ClientProtocol."""
        async with self.open(receive_buffer) as stream:
            client = self.client(stream, path, **options)
            await stream.send_all(client.request())
            await client.handshake()
            yield client

    def client(self, stream: trio.SocketStream, path: str = "/", **options: Any) -> Client:
        """A client that has said nothing yet."""
        uri = parse_uri(f"ws://127.0.0.1:{self.port}{path}")
        return Client(stream, ClientProtocol(uri, max_size=None, **options))


@asynccontextmanager
async def run_server(host: Host, handler: Handler, **options: Any) -> AsyncGenerator[Server]:
    server = Server(0, trio.CancelScope())

    if host is native:
        options["notice"] = partial(setattr, server, "own")

    async def serving(task_status: trio.TaskStatus[int]) -> None:
        with server.scope:
            await host(handler, task_status=task_status, **options)
        server.over.set()

    before = left_over()
    mocked = isinstance(trio.lowlevel.current_clock(), MockClock)
    with trio.fail_after(MOCK_PATIENCE if mocked else PATIENCE):
        async with trio.open_nursery() as nursery:
            server.port = await nursery.start(serving)
            yield server
            server.scope.cancel()
    assert left_over() == before


def left_over() -> tuple[int, int]:
    """How many descriptors are open and how many tasks there are."""
    return len(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living


@pytest.fixture
def served(readiness: object) -> Callable[..., AbstractAsyncContextManager[Server]]:
    """`async with served(handler, **options) as server, server.connect() as client`: on the native host.

    The server is closed with the block, and everything that the clients had of it must be gone then.
    """
    return partial(run_server, native)


@pytest.fixture(params=[*READINESSES, *(host for host in HOSTS if host is not native)])
def hosted(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., AbstractAsyncContextManager[Server]]:
    """Like `served`, on every host, and on the native one over each kind of readiness."""
    if request.param is asgi and (mark := request.node.get_closest_marker("not_asgi")):
        pytest.skip(f"under Hypercorn {mark.args[0]}")
    if request.param is asgi:
        monkeypatch.setattr("tricorn.application.LOOK", MOCK_LOOK if "patient_clock" in request.fixturenames else LOOK)
    if request.param in HOSTS:
        return partial(run_server, request.param)
    monkeypatch.setattr("tricorn.server.best_poller", request.param)
    return partial(run_server, native)


@pytest.fixture
def running() -> Callable[..., AbstractAsyncContextManager[Server]]:
    """Like `served`, on the host that is its first argument."""
    return run_server


@pytest.fixture
def misses_hang_ups(request: pytest.FixtureRequest, hosted: object) -> bool:
    """Whether nothing tells of a hang-up while reading is paused, as there is no epoll."""
    return request.node.callspec.params["hosted"] is not Epoll


@pytest.fixture
def sees_the_end_within(request: pytest.FixtureRequest, hosted: object) -> float:
    """Seconds in which the server sees that it is told to end, as an application has to look."""
    return MOCK_LOOK if request.node.callspec.params["hosted"] is asgi else 0


@pytest.fixture
def hides_codes(request: pytest.FixtureRequest, hosted: object) -> bool:
    """Whether every end that the peer makes looks the same, 1006 without a reason, as under Hypercorn."""
    return request.node.callspec.params["hosted"] is asgi
