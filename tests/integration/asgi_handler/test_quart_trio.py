"""A Quart-Trio application on the server: it listens in a task of its own, and broadcasts from others."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from quart import ResponseReturnValue, abort, websocket
from quart_trio import QuartTrio
from trio.testing import wait_all_tasks_blocked

import tricorn


class Room:
    """Members, each with messages on their way to it."""

    def __init__(self) -> None:
        self.members: set[trio.MemorySendChannel[str]] = set()
        self.all_left = trio.Event()

    def broadcast(self, text: str) -> None:
        for member in self.members:
            member.send_nowait(text)


def make_app(room: Room, happened: list[str]) -> QuartTrio:
    app = QuartTrio(__name__)

    @app.before_serving
    async def start() -> None:
        happened.append("start-up")

    @app.after_serving
    async def stop() -> None:
        happened.append("shutdown")

    @app.route("/")
    async def page() -> ResponseReturnValue:
        return f"{len(room.members)} in the room"

    @app.websocket("/echo")
    async def echo() -> None:
        while True:
            await websocket.send(await websocket.receive())

    @app.websocket("/room/<name>")
    async def enter(name: str) -> None:
        sender, messages = trio.open_memory_channel[str](10)
        room.members.add(sender)
        await websocket.send(f"welcome {name}")

        async def deliver() -> None:
            async for text in messages:
                await websocket.send(text)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(deliver)
                while True:
                    room.broadcast(f"{name}: {await websocket.receive()}")
        finally:
            room.members.discard(sender)
            if not room.members:
                room.all_left.set()

    @app.websocket("/protocol")
    async def protocol() -> None:
        await websocket.accept(headers={"X-Served": "Quart"}, subprotocol=websocket.requested_subprotocols[-1])
        await websocket.close(4001, "enough")

    @app.websocket("/private")
    async def private() -> None:
        if websocket.args.get("token") != "secret":
            abort(403)
        await websocket.send(websocket.headers.get("Origin", "no origin"))

    @app.websocket("/bug")
    async def bug() -> None:
        await websocket.accept()
        raise ZeroDivisionError("in the app")

    return app


@pytest.fixture
def room() -> Room:
    return Room()


@pytest.fixture
def happened() -> list[str]:
    return []


@pytest.fixture
def server(everywhere: Any, room: Room, happened: list[str]) -> Any:
    return everywhere(tricorn.asgi_handler(make_app(room, happened)))


async def test_echo_of_text_and_binary(server: Any) -> None:
    async with server as server, server.connect("/echo") as client:
        for message in ("hällo", b"\0\xff", ""):
            await client.send(message)
            assert await client.receive() == message


async def test_tasks_broadcast_to_a_room(server: Any, room: Room) -> None:
    async with server as server:
        async with server.connect("/room/Ann") as ann, server.connect("/room/Bob") as bob:
            assert [await ann.receive(), await bob.receive()] == ["welcome Ann", "welcome Bob"]
            await ann.send("hello")
            assert [await ann.receive(), await bob.receive()] == ["Ann: hello"] * 2
            assert await server.get() == "2 in the room"
            await bob.close()
            while len(room.members) > 1:
                await wait_all_tasks_blocked()
            await ann.send("alone")
            assert await ann.receive() == "Ann: alone"
        await room.all_left.wait()
        assert await server.get() == "0 in the room"


async def test_subprotocol_headers_and_close_code(server: Any) -> None:
    async with server as server, server.connect("/protocol", subprotocols=["one", "two"]) as client:
        assert client.protocol.subprotocol == "two"
        assert client.response.headers["x-served"] == "Quart"
        assert await client.closed() == (4001, "enough")


async def test_aborting_before_accepting_is_a_response(server: Any) -> None:
    async with server as server:
        response = await server.refused("/private")
        assert response.status_code == 403
        assert b"Forbidden" in response.body
        async with server.connect("/private?token=secret") as client:
            assert await client.receive() == "no origin"
            assert await client.closed() == (1000, "")


async def test_there_is_no_such_route(server: Any) -> None:
    async with server as server:
        assert (await server.refused("/no-such-route")).status_code == 404


async def test_the_lifespan_is_run_once(server: Any, happened: list[str]) -> None:
    async with server as server:
        await server.get()
        async with server.connect("/echo"):
            assert happened == ["start-up"]
    assert happened == ["start-up", "shutdown"]


async def test_closing_the_server_ends_the_tasks_of_every_member(server: Any, room: Room) -> None:
    async with server as server, server.connect("/room/Ann") as ann:
        await ann.receive()
        server.scope.cancel()
        assert (await ann.closed())[0] == 1012
        await server.over.wait()
    assert room.all_left.is_set()


async def test_quart_answers_for_its_bugs_itself(server: Any) -> None:
    async with server as server, server.connect("/bug") as client:
        assert await client.closed() == (1000, "")
