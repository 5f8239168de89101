"""Where the time of a message goes: what its parts cost inside the process, without the kernel.

    python -m bench.anatomy 2>/dev/null

CPU of this process in µs, each the least of many short runs, since what else the machine does only adds to it. But for
the first line, what the kernel does is not in here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from secrets import token_hex
from socket import IPPROTO_TCP, TCP_NODELAY, create_connection, create_server
from time import process_time
from typing import Any

import trio
from rich.console import Console
from trio.lowlevel import cancel_shielded_checkpoint
from trio.testing import wait_all_tasks_blocked

from bench.load import text
from tricorn.chat import Chat, Run
from tricorn.chat.logs.base import stamp
from tricorn.chat.protocol import AgentMessage
from tricorn.chat.session import decode
from tricorn.chat.settings import ChatSettings
from tricorn.connection import Connection
from tricorn.metrics import ServerMetrics
from tricorn.protocol.frames import Opcode, frame
from tricorn.protocol.receiver import Receiver
from tricorn.request import Accept, Request
from tricorn.transport.flow_control import READ_SIZE
from tricorn.transport.keep_alive import Reaper
from tricorn.transport.native import NativeTransport
from tricorn.transport.poller import Turns, Watched
from tricorn.waiter import Waiter
from tricorn.websocket import WebSocket

CONNECTIONS = 100
RUNS = 60  # of which the least counts
TEXT = "x" * 64
SETTINGS = ChatSettings(messages_per_second=10**9, bytes_per_second=10**12, posts_per_minute=10**9)
POST = '{"type":"post","id":"p-1","conversation":"c","text":"what time is it in Tokyo"}'
SAID = 200  # events of a run
NAP, NAPS = 0.001, 10  # seconds

Round = Callable[[], Awaitable[None]]


async def least(round: Round, units: int) -> float:
    """The µs of CPU for each of the units that a round is made of."""
    times = []
    for _ in range(RUNS):
        began = process_time()
        await round()
        times.append(process_time() - began)
    return min(times) / units * 1e6


def repeated(call: Callable[[], Any], times: int = 2000) -> tuple[Round, int]:
    """A round of nothing but calls."""

    async def round() -> None:
        for _ in range(times):
            call()

    return round, times


class Socket:
    """Always has the same to read, and takes everything."""

    def __init__(self, number: int, arrives: bytes) -> None:
        self._number = number
        self._arrives = arrives
        self.sent = 0

    def fileno(self) -> int:
        return self._number

    def recv(self, size: int) -> bytes:
        return self._arrives

    def send(self, data: bytes | memoryview) -> int:
        self.sent += len(data)
        return len(data)

    def setsockopt(self, level: int, option: int, value: bytes) -> None: ...

    def shutdown(self, how: int) -> None: ...

    def close(self) -> None: ...


class Ready(Turns):
    """A readiness whose sockets are ready when somebody says so."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: list[Watched] = []

    def register(self, watched: Watched) -> None:
        self.watched.append(watched)

    def change(self, watched: Watched) -> None: ...

    def unregister(self, watched: Watched) -> None: ...

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._take_turns()


async def echo(ws: WebSocket) -> None:
    async for message in ws:
        await ws.send(message)


async def turn() -> None:
    """Let all tasks run that can, and those that they wake."""
    for _ in range(2):
        await cancel_shielded_checkpoint()


async def of_an_echo(in_flight: int) -> float:
    """From what a read brought to the write, with the handler in between."""
    arrives = text(TEXT.encode()) * in_flight
    ready, metrics = Ready(), ServerMetrics()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ready.run)
        for number in range(CONNECTIONS):
            transport = NativeTransport(Socket(number, arrives), b"", ready, SETTINGS, metrics)
            request = Request("GET", "/", "", "1.1", {}, ("127.0.0.1", 1))
            connection = Connection(transport, request, SETTINGS, metrics, Reaper())
            nursery.start_soon(connection.run, echo, WebSocket(connection, Accept()))
        await wait_all_tasks_blocked()

        async def round() -> None:
            for watched in ready.watched:
                watched.readable()
            await turn()

        cost = await least(round, CONNECTIONS * in_flight)
        nursery.cancel_scope.cancel()
    return cost


async def of_a_switch() -> float:
    """A task that waits is woken, runs, and waits again: what Trio asks for the handler's turn."""
    waiters = [Waiter() for _ in range(CONNECTIONS)]

    async def wait(waiter: Waiter) -> None:
        while True:
            await waiter.wait()

    async with trio.open_nursery() as nursery:
        for waiter in waiters:
            nursery.start_soon(wait, waiter)
        await wait_all_tasks_blocked()

        async def round() -> None:
            for waiter in waiters:
                waiter.wake()
            await turn()

        cost = await least(round, CONNECTIONS)
        nursery.cancel_scope.cancel()
    return cost


async def of_a_run(events: int) -> float:
    """From a post to the end of a run in which an agent says so many pieces of an answer, all in one go."""
    ended = trio.Event()

    async def agent(run: Run) -> None:
        for _ in range(events):
            await run.say("a piece ")
        ended.set()

    async with Chat(agent, SETTINGS) as chat:
        by = chat.quotas.enter("somebody")
        assert by is not None

        async def round() -> None:
            nonlocal ended
            ended = trio.Event()
            await chat.conversation("somebody/c").post(token_hex(8), "x", by)
            await ended.wait()

        return await least(round, 1)


async def of_a_socket() -> float:
    """What a message pays in the kernel and on the way there: sent on one socket, read from another."""
    with create_server(("127.0.0.1", 0)) as listener, create_connection(listener.getsockname()) as client:
        client.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        server, _ = listener.accept()
        with server:
            message = text(TEXT.encode())

            def there() -> None:
                client.send(message)
                server.recv(READ_SIZE)

            return await least(*repeated(there))


async def nap(sleep: Callable[[float], Awaitable[object]]) -> None:
    for _ in range(NAPS):
        await sleep(NAP)


async def of_a_nap() -> float:
    async def round() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(CONNECTIONS):
                nursery.start_soon(nap, trio.sleep)

    return await least(round, CONNECTIONS * NAPS)


async def of_a_nap_on_asyncio() -> float:
    async def round() -> None:
        await asyncio.gather(*(nap(asyncio.sleep) for _ in range(CONNECTIONS)))

    return await least(round, CONNECTIONS * NAPS)


async def measure() -> dict[str, float]:
    message = TEXT.encode()
    one, many = text(message), text(message) * 16
    event = AgentMessage(conversation="c", run="0123456789abcdef", seq=0, at=0.0, text="a piece ")
    receiver = Receiver(1 << 20)
    nothing_said, said = await of_a_run(0), await of_a_run(SAID)
    return {
        "a send and a recv of 64 bytes, with the kernel": await of_a_socket(),
        "an echo of 64 bytes, from the read to the write": await of_an_echo(1),
        "the same with 16 in flight, each": await of_an_echo(16),
        "of that, a turn of a task in Trio's scheduler": await of_a_switch(),
        "codec: a frame of a client, read alone": await least(*repeated(lambda: receiver.receive_data(one))),
        "codec: each of 16 that one read brought": await least(*repeated(lambda: receiver.receive_data(many))) / 16,
        "codec: a frame for a client": await least(*repeated(lambda: frame(Opcode.TEXT, message))),
        "chat: a post, and a run in which nothing is said": nothing_said,
        "chat: an event that an agent says, in the log": (said - nothing_said) / SAID,
        "of that, JSON: it is stamped and encoded": await least(*repeated(lambda: stamp(event, 1))),
        "chat: JSON: a post is decoded and checked": await least(*repeated(lambda: decode(POST))),
        "an agent's wait for a timer, in Trio": await of_a_nap(),
    }


def main() -> None:
    parts = trio.run(measure) | {"the same in asyncio": asyncio.run(of_a_nap_on_asyncio())}
    for name, cost in parts.items():
        Console().print(f"{name:52}{cost:6.2f} µs")


if __name__ == "__main__":
    main()
