"""A FastAPI application on the server: dependencies, path and query parameters, JSON, errors before and after."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
import trio
from fastapi import Cookie, Depends, FastAPI, Header, HTTPException, Query, WebSocket, WebSocketException
from fastapi.websockets import WebSocketDisconnect

import tricorn


class Pool:
    """What a dependency hands out, and takes back."""

    def __init__(self) -> None:
        self.lent = 0
        self.returned = trio.Event()


POOL = "pool"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Any]]:
    yield {POOL: Pool()}


async def pool(websocket: WebSocket) -> AsyncGenerator[Pool]:
    lent: Pool = websocket.state.pool
    lent.lent += 1
    try:
        yield lent
    finally:
        await trio.lowlevel.checkpoint()
        lent.lent -= 1
        lent.returned.set()


async def user(token: Annotated[str | None, Query()] = None, x_token: Annotated[str | None, Header()] = None) -> str:
    known = {"tok-ann": "Ann"}
    name = known.get(token or x_token or "")
    if name is None:
        raise WebSocketException(1008, "a known token is needed")
    return name


async def member(session: Annotated[str | None, Cookie()] = None) -> str:
    if session is None:
        raise HTTPException(401, "log in first", {"WWW-Authenticate": "Cookie"})
    return session


def make_app(pools: list[Pool]) -> FastAPI:
    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def page() -> dict[str, str]:
        return {"page": "FastAPI"}

    @app.websocket("/rooms/{room}/items/{item}")
    async def items(
        websocket: WebSocket, room: str, item: int, name: Annotated[str, Depends(user)], limit: int = 10
    ) -> None:
        await websocket.accept()
        await websocket.send_json({"room": room, "item": item, "user": name, "limit": limit})
        try:
            while True:
                numbers = await websocket.receive_json()
                await websocket.send_json({"sum": sum(numbers)})
        except WebSocketDisconnect:
            pass

    @app.websocket("/pool")
    async def borrow(websocket: WebSocket, lent: Annotated[Pool, Depends(pool)]) -> None:
        pools.append(lent)
        await websocket.accept()
        await websocket.send_text(str(lent.lent))
        while True:
            await websocket.receive_text()

    @app.websocket("/members")
    async def members(websocket: WebSocket, name: Annotated[str, Depends(member)]) -> None:
        await websocket.accept()
        await websocket.send_text(name)
        await websocket.close(4000, "that was all")

    return app


@pytest.fixture
def pools() -> list[Pool]:
    return []


@pytest.fixture
def server(everywhere: Any, pools: list[Pool]) -> Any:
    return everywhere(tricorn.asgi_handler(make_app(pools)))


async def test_parameters_dependencies_and_json(server: Any) -> None:
    async with server as server, server.connect("/rooms/a%20b/items/7?token=tok-ann&limit=3") as client:
        assert json.loads(await client.receive()) == {"room": "a b", "item": 7, "user": "Ann", "limit": 3}
        await client.send("[1, 2, 3]")
        assert json.loads(await client.receive()) == {"sum": 6}


async def test_a_dependency_reads_a_header(server: Any) -> None:
    async with server as server, server.connect("/rooms/a/items/1", headers={"X-Token": "tok-ann"}) as client:
        assert json.loads(await client.receive())["user"] == "Ann"


@pytest.mark.parametrize("path", ["/rooms/a/items/1", "/rooms/a/items/seven?token=tok-ann", "/no-such-route"])
async def test_a_websocket_exception_or_a_bad_parameter_before_accepting_is_403(server: Any, path: str) -> None:
    async with server as server:
        assert (await server.refused(path)).status_code == 403


async def test_an_http_exception_of_a_dependency_is_the_response(server: Any) -> None:
    async with server as server:
        response = await server.refused("/members")
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Cookie"
        assert json.loads(response.body) == {"detail": "log in first"}
        async with server.connect("/members", headers={"Cookie": "session=Bob"}) as client:
            assert await client.receive() == "Bob"
            assert await client.closed() == (4000, "that was all")


async def test_a_dependency_is_cleaned_up_after_the_connection(server: Any, pools: list[Pool]) -> None:
    async with server as server:
        async with server.connect("/pool") as one, server.connect("/pool") as other:
            assert [await one.receive(), await other.receive()] == ["1", "2"]
        await pools[0].returned.wait()
        while pools[0].lent:
            await trio.testing.wait_all_tasks_blocked()
        assert pools[0] is pools[1]


async def test_a_page_beside_it(server: Any) -> None:
    async with server as server:
        assert json.loads(await server.get()) == {"page": "FastAPI"}


async def test_a_bad_message_is_1011_with_the_id_of_its_record(server: Any, records: Any) -> None:
    async with server as server, server.connect("/rooms/a/items/1?token=tok-ann") as client:
        await client.receive()
        await client.send("no JSON")
        code, reason = await client.closed()
    [record] = records.read("ERROR")
    assert (code, reason) == (1011, record["error_id"])
    assert record["message"].startswith("JSONDecodeError")
