"""Where there is no room, who comes is told to come back, who is there notices nothing, and who leaves makes room."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from typing import Any

import trio
from h11 import CLIENT, Connection, Request, Response
from trio.testing import MockClock, wait_all_tasks_blocked

from fixtures.handlers import echo
from tricorn import Settings
from tricorn.listening.accept import SPARE
from tricorn.listening.capacity import RETRY_AFTER

Serving = Callable[..., AbstractAsyncContextManager[Any]]


async def health(scope: Any, receive: Any, send: Any) -> None:
    """An app whose only page says that it is well."""
    if scope["type"] == "lifespan":
        while True:
            await send({"type": f"{(await receive())['type']}.complete"})
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def hits(server: Any) -> dict[str, float]:
    """The limits that this server's clients have hit, and how often."""
    return {name: number for name, number in server.own.metrics.limit_hits.values.items() if number}


async def refused(server: Any, stream: trio.SocketStream) -> None:
    """Ask for a WebSocket and be refused, with everything that an intermediary needs to know."""
    client = Connection(CLIENT)
    with trio.fail_after(10):
        with suppress(trio.BrokenResourceError):  # refused before it has asked; the answer is there all the same
            await stream.send_all(server.client(stream).request())
        client.send(Request(method="GET", target="/", headers=[("Host", "h")]))
        answer = client.next_event()
        while not isinstance(answer, Response):
            data = await stream.receive_some(4096)
            assert data, "closed without an answer"
            client.receive_data(data)
            answer = client.next_event()
    headers = dict(answer.headers)
    assert answer.status_code == 503
    assert int(headers[b"retry-after"]) in RETRY_AFTER
    assert headers[b"connection"] == b"close"


async def undisturbed(client: Any) -> None:
    await client.send("undisturbed")
    assert await client.receive() == "undisturbed"


async def test_who_comes_when_it_is_full_is_told_when_to_come_back(served: Serving) -> None:
    async with (
        served(echo, settings=Settings(max_connections=2), app=health) as server,
        server.connect() as first,
    ):
        async with server.connect() as second:
            for _ in range(3):
                async with server.open() as third:
                    await refused(server, third)
            await undisturbed(second)
            async with server.open() as page:
                await page.send_all(b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
                assert b"200" in await page.receive_some()
            await second.close()
            await second.closed()
        async with server.connect() as next_one:
            await undisturbed(next_one)
        await undisturbed(first)
    assert hits(server) == {"max_connections": 3}


async def test_past_what_can_be_read_sockets_are_answered_unread(served: Serving) -> None:
    async with served(echo, settings=Settings(max_connections=1)) as server, server.connect() as first:
        async with AsyncExitStack() as silent:
            for _ in range(SPARE):
                await silent.enter_async_context(server.open())
            await wait_all_tasks_blocked()
            async with server.open() as stream:
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 503 ")
                assert await stream.receive_some() == b""
            await undisturbed(first)
        await wait_all_tasks_blocked()
        async with server.open() as stream:
            await refused(server, stream)
    assert hits(server) == {"max_connections": 2}


async def test_the_answer_arrives_also_where_it_was_not_waited_for(served: Serving) -> None:
    async with served(echo, settings=Settings(peer_connections=1)) as server, server.connect():
        with socket.create_connection(("127.0.0.1", server.port)) as early:
            early.sendall(b"GET / HTTP/1.1\r\n")  # before it is accepted, since nothing else runs now
            early.setblocking(False)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(early))
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 503 ")
            assert await stream.receive_some() == b""  # and no reset


async def test_one_address_may_have_only_so_many_sockets(served: Serving) -> None:
    async with served(echo, settings=Settings(peer_connections=2)) as server, server.connect() as first:
        async with server.open():
            await wait_all_tasks_blocked()
            async with server.open() as third:
                await refused(server, third)
            await undisturbed(first)
        await wait_all_tasks_blocked()
        async with server.connect() as next_one:
            await undisturbed(next_one)
    assert hits(server) == {"peer_connections": 1}


async def test_only_so_many_may_say_nothing(served: Serving) -> None:
    """Whoever has said what it wants is none of them."""
    async with (
        served(echo, settings=Settings(max_handshakes=2)) as server,
        server.connect() as first,
        server.connect() as second,
        server.open() as silent,
        server.open(),
    ):
        await wait_all_tasks_blocked()
        async with server.open() as stream:
            await refused(server, stream)
        await undisturbed(first)
        await undisturbed(second)
        await silent.send_all(server.client(silent).request())
        assert (await silent.receive_some()).startswith(b"HTTP/1.1 101 ")
        async with server.connect() as next_one:
            await undisturbed(next_one)
    assert hits(server) == {"max_handshakes": 1}


# How fast one may be; the time stands still, so that it is no burst and a bit


async def test_who_sends_too_many_messages_is_closed_behind_what_came(served: Serving, mock_clock: MockClock) -> None:
    settings = Settings(messages_per_second=10)
    async with served(echo, settings=settings) as server, server.connect() as first, server.connect() as client:
        await client.send(*map(str, range(100)))
        assert [await client.receive() for _ in range(100)] == [str(number) for number in range(100)]
        await client.send("too much")
        assert await client.receive() == "too much"
        assert await client.closed() == (4003, "more than 10 messages per second")
        await undisturbed(first)
    assert hits(server) == {"messages_per_second": 1}


async def test_who_sends_too_many_bytes_is_closed_whatever_they_are(served: Serving, mock_clock: MockClock) -> None:
    """Pings too, which no handler sees."""
    async with served(echo, settings=Settings(bytes_per_second=1000)) as server, server.connect() as client:
        for _ in range(100):
            client.protocol.send_ping(bytes(125))
        await client.flush()
        while (frame := await client.frame(answer=False)) is not None:
            last = frame
        assert last.data == (4003).to_bytes(2) + b"more than 1,000 bytes per second"
    assert hits(server) == {"bytes_per_second": 1}


async def test_who_goes_on_is_counted_once(served: Serving, records: Any, mock_clock: MockClock) -> None:
    """While the handler still has what came before, nothing more is heard, counted or noted."""
    resume = trio.Event()

    async def handler(ws: Any) -> None:
        await resume.wait()
        async for _ in ws:
            pass

    async with served(handler, settings=Settings(messages_per_second=10)) as server, server.connect() as client:
        for _ in range(3):
            await client.send(*["x"] * 200)
            await wait_all_tasks_blocked()
        resume.set()
        assert await client.closed() == (4003, "more than 10 messages per second")
        await client.stream.aclose()
        await wait_all_tasks_blocked()
        [record] = records.read("INFO")
        assert (record["code"], record.get("notes")) == (4003, None)
    assert hits(server) == {"messages_per_second": 1}
