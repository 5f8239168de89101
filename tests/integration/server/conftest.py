"""A server in the test's own Trio, on each host, and a client that reads only when it is told to."""

from __future__ import annotations

import select
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from websockets.client import ClientProtocol
from websockets.uri import parse_uri

import tricorn
from fixtures.client import Client, left_over
from fixtures.hosts import HOSTS, NATIVE, Handler, Host, asgi, dial, enter, native
from fixtures.records import Records
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


@pytest.fixture(autouse=True)
def reported(records: Records) -> Records:
    """An error that the test does not ask for fails it."""
    return records


@dataclass
class Server:
    port: int
    scope: trio.CancelScope
    """Cancel it to close the server."""
    over: trio.Event = field(default_factory=trio.Event)
    """It is closed."""
    own: tricorn.Server = field(init=False)
    """The server itself, on the native host."""
    host: Host = native

    @asynccontextmanager
    async def open(self, receive_buffer: int | None = None) -> AsyncGenerator[trio.SocketStream]:
        """A socket that has said nothing yet. `receive_buffer` bounds what it takes without reading, in bytes."""
        stream = await dial(self.port, receive_buffer)
        with stream.socket:
            yield await enter(self.host, stream)

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
        port = 80 if isinstance(self.port, str) else self.port
        uri = parse_uri(f"ws://127.0.0.1:{port}{path}")
        return Client(stream, ClientProtocol(uri, max_size=None, **options))


@asynccontextmanager
async def run_server(host: Host, handler: Handler, **options: Any) -> AsyncGenerator[Server]:
    server = Server(0, trio.CancelScope(), host=host)

    if host in NATIVE:
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
