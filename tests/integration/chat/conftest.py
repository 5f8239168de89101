"""The whole chat on a free port, and a client on a WebSocket library that is not ours."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from subprocess import PIPE
from typing import Any
from unittest.mock import ANY

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream

from fixtures.hosts import HOSTS, Host, dial, enter, native, native_unix
from fixtures.service import PATH, first_line
from fixtures.worker import worker
from tricorn import WebSocket
from tricorn.chat import SUBPROTOCOLS, Agent, Chat
from tricorn.chat.agents.demo import demo
from tricorn.chat.identity import Gate
from tricorn.chat.logs.memory import MemoryLog
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.protocol import BATCH_SUBPROTOCOL, SUBPROTOCOL
from tricorn.chat.settings import ChatSettings
from tricorn.service.pages import pages

PATIENCE = 120  # seconds, for a whole test


class Objects(list[dict[str, Any]]):
    """What came, in order."""

    def events(self, conversation: str = "c") -> Objects:
        return Objects(each for each in self if "at" in each and each["conversation"] == conversation)

    @property
    def types(self) -> list[str]:
        return [each["type"] for each in self]

    @property
    def seqs(self) -> list[int]:
        return [each["seq"] for each in self if "at" in each]

    def check_end(self, outcome: str, tool_error: str, tools: int) -> None:
        """Each tool was completed with this error, and only then, and once, came the end of the run."""
        executing = [each["call"] for each in self if each["type"] == "tool_executing"]
        completed = [each for each in self if each["type"] == "tool_completed"]
        assert len(executing) == tools
        assert sorted(each["call"] for each in completed) == sorted(executing)
        assert all(tool_error in each["error"] for each in completed)
        assert all("result" not in each for each in completed)
        assert self[-1]["type"] == "agent_completed"
        assert self[-1]["outcome"] == outcome
        assert Counter(self.types)["agent_completed"] == 1


@dataclass
class Client:
    """Reads only when it is told to: what it has not asked for stays in the socket."""

    ws: WebSocketConnection
    stream: trio.SocketStream
    received: Objects = field(default_factory=Objects)
    pending: deque[str] = field(default_factory=deque)
    ids: Iterator[int] = field(default_factory=count)

    async def send(self, type_: str, **fields: Any) -> None:
        await self.ws.send_message(json.dumps({"type": type_, **fields}))

    async def post(self, text: str, conversation: str = "c", id_: str | None = None) -> str:
        """Say something and return the post's id."""
        id_ = id_ or f"{self.stream.socket.getsockname()[1]}-{next(self.ids)}"
        await self.send("post", id=id_, conversation=conversation, text=text)
        return id_

    async def receive(self) -> dict[str, Any]:
        while not self.pending:
            message = await self.ws.get_message()
            assert isinstance(message, str)
            self.pending.extend(message.split("\n") if self.ws.subprotocol == BATCH_SUBPROTOCOL else [message])
        received = json.loads(self.pending.popleft())
        self.received.append(received)
        return received

    async def until(self, type_: str, **fields: Any) -> Objects:
        """Everything up to the first object of this type with these fields, which is the last of the list."""
        seen = Objects()
        while not (seen and seen[-1].items() >= {"type": type_, **fields}.items()):
            seen.append(await self.receive())
        return seen

    async def answer(self, type_: str, **fields: Any) -> dict[str, Any]:
        """The first object of this type with these fields."""
        return (await self.until(type_, **fields))[-1]

    async def until_closed(self) -> tuple[Objects, int]:
        """Everything that still comes, and the close code."""
        seen = Objects()
        while True:
            try:
                seen.append(await self.receive())
            except ConnectionClosed as closed:
                return seen, closed.reason.code

    async def break_off(self) -> None:
        """Be gone without a word."""
        await self.stream.aclose()


@dataclass
class Server:
    port: int
    log: MemoryLog
    scope: trio.CancelScope
    """Cancel it to close the server."""
    session_ended: trio.Event
    """Set when the first session has."""
    metrics: ChatMetrics = field(default_factory=ChatMetrics)
    host: Host = native

    def hits(self) -> Any:
        """The limits of the chat that were hit, and how often."""
        return {name: number for name, number in self.metrics.limit_hits.values.items() if number}

    async def recorded(self, conversation: str = "c") -> Objects:
        """The log's own account of a conversation."""
        return Objects(json.loads(entry.json) for entry in await self.log.read(f"local/{conversation}", 0, 100_000))

    @asynccontextmanager
    async def connect(
        self,
        subprotocol: str | None = SUBPROTOCOL,
        receive_buffer: int | None = None,
        token: str | None = None,
        *,
        welcome: bool = True,
    ) -> AsyncGenerator[Client]:
        """A client that has been welcomed. `receive_buffer` bounds what it takes without reading, in bytes."""
        stream = await dial(self.port, receive_buffer)
        async with stream, trio.open_nursery() as nursery:
            entered = await enter(self.host, stream)
            offered = [subprotocol] if subprotocol else []
            headers = [(b"Authorization", f"Bearer {token}".encode())] if token else []
            ws = await wrap_client_stream(
                nursery, entered, f"127.0.0.1:{self.port}", "/ws", subprotocols=offered, extra_headers=headers
            )
            client = Client(ws, stream)
            assert not welcome or (await client.receive())["type"] == "welcome"
            yield client
            await ws.aclose()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def chat_server(
    agent: Agent = worker, gate: Gate | None = None, host: Host = native, **settings: Any
) -> AsyncGenerator[Server]:
    log, scope, ended = MemoryLog(), trio.CancelScope(), trio.Event()

    async def session(ws: WebSocket) -> None:
        try:
            await chat.session(ws)
        finally:
            ended.set()

    async def serving(task_status: trio.TaskStatus[int]) -> None:
        with scope:
            await host(
                {"/ws": session},
                settings=chat.settings,
                subprotocols=SUBPROTOCOLS,
                app=pages(chat.why_not_ready),
                drain=chat.drain,
                task_status=task_status,
            )

    with trio.fail_after(PATIENCE):
        async with Chat(agent, ChatSettings(**settings), log, gate) as chat, trio.open_nursery() as nursery:
            port = await nursery.start(serving)
            yield Server(port, log, scope, ended, chat.metrics, host)
            scope.cancel()


@dataclass
class ServerProcess(Server):
    """A server in a process of its own. Its log is what it tells, and what it counts is not seen."""

    def hits(self) -> Any:
        return ANY

    async def recorded(self, conversation: str = "c") -> Objects:
        if self.scope.cancel_called:
            pytest.skip("all but the log was as it must be; that has gone with the process")
        async with self.connect() as client:
            await client.send("open", conversation=conversation)
            head = (await client.answer("opened"))["head"]
            return Objects([await client.receive() for _ in range(head)])


@asynccontextmanager
async def chat_process(
    command: list[str], agent: Agent = worker, gate: Gate | None = None, **settings: Any
) -> AsyncGenerator[Server]:
    if agent not in (worker, demo) or gate is not None:
        pytest.skip("the agent, or who decides who comes in, is in the test's own process")
    options = ["--agent", "fixtures.asyncio_worker:worker"] if agent is worker else []
    environ = {f"TRICORN_{name.upper()}": str(value) for name, value in settings.items()}
    run = partial(
        trio.run_process,
        [*command, "--bind", "127.0.0.1:0", *options],
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "PYTHONPATH": PATH, **environ},
    )
    scope, ended = trio.CancelScope(), trio.Event()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(run)
            nursery.start_soon(_tell, process.stderr, ended)
            nursery.start_soon(_obey, scope, process)
            port = int((await first_line(process)).rpartition(":")[2])
            yield ServerProcess(port, MemoryLog(), scope, ended)
            scope.cancel()


async def _tell(stderr: trio.abc.ReceiveStream, ended: trio.Event) -> None:
    """Pass on what the process reports, and set the event when a session has ended."""
    async for data in stderr:
        os.write(2, data)
        if b"connection closed" in data:
            ended.set()


async def _obey(scope: trio.CancelScope, process: trio.Process) -> None:
    with scope:
        await trio.sleep_forever()
    process.terminate()


@pytest.fixture
def chatting(request: pytest.FixtureRequest) -> Callable[..., AbstractAsyncContextManager[Server]]:
    """`async with chatting(agent, **settings) as server, server.connect() as client`; ends with the block."""
    if request.config.getoption("--against") == "tricorn":
        return chat_server
    return partial(chat_process, request.getfixturevalue("serve"))


@pytest.fixture(params=[host for host in HOSTS if host is not native_unix])
def chatting_anywhere(request: pytest.FixtureRequest) -> Callable[..., AbstractAsyncContextManager[Server]]:
    """Like `chatting`, on every host where clients come in without a key: on a Unix socket they may be a proxy's."""
    if request.config.getoption("--against") == "tricorn":
        return partial(chat_server, host=request.param)
    if request.param is not native:
        pytest.skip("a host of Tricorn's")
    return partial(chat_process, request.getfixturevalue("serve"))
