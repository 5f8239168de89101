"""A Starlette application, which runs on anyio, on the server: its WebSockets, its pages, its lifespan."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

import tricorn


class Program:
    """The application, and what happens in it."""

    def __init__(self) -> None:
        self.happened: list[Any] = []
        self.disconnected = trio.Event()
        self.app = Starlette(
            lifespan=self.lifespan,
            routes=[
                Route("/", self.page),
                WebSocketRoute("/echo", self.echo),
                WebSocketRoute("/about/{name:int}", self.about),
                WebSocketRoute("/agreed", self.agreed),
                WebSocketRoute("/count", self.count),
                WebSocketRoute("/until-gone", self.until_gone),
                WebSocketRoute("/careless", self.careless),
                WebSocketRoute("/close", self.close),
                WebSocketRoute("/refuse", self.refuse),
                WebSocketRoute("/deny", self.deny),
                WebSocketRoute("/login", self.login),
                WebSocketRoute("/http-error", self.http_error),
                WebSocketRoute("/policy", self.policy),
                WebSocketRoute("/bug", self.bug),
                WebSocketRoute("/early-bug", self.early_bug),
                Mount("/mounted", routes=[WebSocketRoute("/here", self.here)]),
            ],
        )

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncGenerator[dict[str, Any]]:
        self.happened.append("start-up")
        yield {"visits": []}
        self.happened.append("shutdown")

    async def page(self, request: Request) -> PlainTextResponse:
        request.state.visits.append("page")
        return PlainTextResponse(" ".join(request.state.visits))

    async def count(self, ws: WebSocket) -> None:
        await ws.accept()
        ws.state.visits.append("websocket")
        await ws.send_text(" ".join(ws.state.visits))
        await ws.close()

    async def echo(self, ws: WebSocket) -> None:
        await ws.accept()
        while (message := await ws.receive())["type"] == "websocket.receive":
            if message["text"] is not None:
                await ws.send_text(message["text"])
            else:
                await ws.send_bytes(message["bytes"])

    async def about(self, ws: WebSocket) -> None:
        await ws.accept()
        await ws.send_json(
            {
                "name": ws.path_params["name"],
                "query": ws.query_params.getlist("q"),
                "cookie": ws.cookies["session"],
                "url": ws.url.path,
                "scheme": ws.url.scheme,
                "client": ws.client.host if ws.client else None,
            }
        )
        await ws.close()

    async def agreed(self, ws: WebSocket) -> None:
        cookies = [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
        await ws.accept(ws.scope["subprotocols"][-1], [*cookies, (b"x-served", b"Starlette")])
        await ws.send_text(ws.scope["subprotocols"][0])
        await ws.close()

    async def until_gone(self, ws: WebSocket) -> None:
        await ws.accept()
        await ws.send_text("here")
        try:
            await ws.receive_text()
        except WebSocketDisconnect as gone:
            await trio.lowlevel.checkpoint()  # to clean up may need some
            self.happened.append((gone.code, gone.reason))
            self.disconnected.set()

    async def careless(self, ws: WebSocket) -> None:
        await ws.accept()
        try:
            while True:
                await ws.receive_text()
        finally:
            self.disconnected.set()

    async def close(self, ws: WebSocket) -> None:
        await ws.accept()
        await ws.send_text("last")
        await ws.close(3456, "enough")
        await trio.lowlevel.checkpoint()
        self.happened.append("closed")

    async def refuse(self, ws: WebSocket) -> None:
        await ws.close()

    async def deny(self, ws: WebSocket) -> None:
        response = JSONResponse({"detail": "no"}, 401, {"WWW-Authenticate": "Bearer"})
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        await ws.send_denial_response(response)

    async def login(self, ws: WebSocket) -> None:
        await ws.send_denial_response(RedirectResponse("/login"))

    async def http_error(self, ws: WebSocket) -> None:
        raise HTTPException(418, "a teapot")

    async def policy(self, ws: WebSocket) -> None:
        await ws.accept()
        raise WebSocketException(1008, "not like this")

    async def bug(self, ws: WebSocket) -> None:
        await ws.accept()
        raise ZeroDivisionError("in the app")

    async def early_bug(self, ws: WebSocket) -> None:
        raise ZeroDivisionError("in the app")

    async def here(self, ws: WebSocket) -> None:
        await ws.accept()
        await ws.send_text(f"{ws.scope['root_path']} {ws.scope['path']}")
        await ws.close()


@pytest.fixture
def program() -> Program:
    return Program()


@pytest.fixture
def server(everywhere: Any, program: Program) -> Any:
    return everywhere(tricorn.asgi_handler(program.app))


async def test_echo_of_text_and_binary(server: Any) -> None:
    async with server as server, server.connect("/echo") as client:
        for message in ("hällo", b"\0\xff", "", b""):
            await client.send(message)
            assert await client.receive() == message


async def test_messages_come_in_order(server: Any) -> None:
    texts = [str(i) for i in range(100)]
    async with server as server, server.connect("/echo") as client:
        await client.send(*texts)
        assert [await client.receive() for _ in texts] == texts


async def test_the_app_sees_path_query_cookies_and_client(server: Any) -> None:
    async with (
        server as server,
        server.connect("/about/7?q=1&q=%C3%A4", headers={"Cookie": "session=xyz"}) as client,
    ):
        seen = json.loads(await client.receive())
    assert seen == {
        "name": 7,
        "query": ["1", "ä"],
        "cookie": "xyz",
        "url": "/about/7",
        "scheme": "wss" if server.tls else "ws",
        "client": "127.0.0.1",
    }


async def test_the_app_chooses_subprotocol_and_headers(server: Any) -> None:
    async with server as server, server.connect("/agreed", subprotocols=["one", "two"]) as client:
        assert client.protocol.subprotocol == "two"
        assert client.response.headers["x-served"] == "Starlette"
        assert client.response.headers.get_all("set-cookie") == ["a=1", "b=2"]
        assert await client.receive() == "one"


async def test_pages_and_websockets_share_the_state_of_one_lifespan(server: Any, program: Program) -> None:
    async with server as server:
        assert await server.get() == "page"
        async with server.connect("/count") as client:
            assert await client.receive() == "page websocket"
        assert await server.get() == "page websocket page"
        assert program.happened == ["start-up"]
    assert program.happened == ["start-up", "shutdown"]


async def test_the_app_learns_how_the_client_closed(server: Any, program: Program) -> None:
    async with server as server, server.connect("/until-gone") as client:
        assert await client.receive() == "here"
        await client.close(4321, "bye")
        await program.disconnected.wait()
        assert program.happened[-1] == ((1006, "") if server.hides_codes else (4321, "bye"))


async def test_an_unhandled_disconnect_is_no_error(server: Any, program: Program) -> None:
    async with server as server, server.connect("/careless") as client:
        await client.close(1001)
        await program.disconnected.wait()


async def test_the_app_closes_with_code_and_reason_and_goes_on(server: Any, program: Program) -> None:
    async with server as server, server.connect("/close") as client:
        assert await client.receive() == "last"
        assert await client.closed() == (3456, "enough")
    assert "closed" in program.happened


async def test_closing_before_accepting_is_403(server: Any) -> None:
    async with server as server:
        assert (await server.refused("/refuse")).status_code == 403
        assert (await server.refused("/no-such-route")).status_code in (403, 404)


async def test_a_denial_response_is_sent_as_it_is(server: Any) -> None:
    async with server as server:
        response = await server.refused("/deny")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers.get_all("content-type") == ["application/json"]
    assert [cookie.partition(";")[0] for cookie in response.headers.get_all("set-cookie")] == ["a=1", "b=2"]
    assert response.body == b'{"detail":"no"}'


async def test_a_redirect_is_a_denial_too(server: Any) -> None:
    async with server as server:
        response = await server.refused("/login")
    assert (response.status_code, response.headers["location"]) == (307, "/login")


async def test_an_http_exception_before_accepting_is_a_denial(server: Any) -> None:
    async with server as server:
        response = await server.refused("/http-error")
    assert (response.status_code, response.body) == (418, b"a teapot")


async def test_a_websocket_exception_closes_with_its_code(server: Any) -> None:
    async with server as server, server.connect("/policy") as client:
        assert await client.closed() == (1008, "not like this")


async def test_a_bug_is_1011_with_the_id_of_its_record(server: Any, records: Any) -> None:
    async with server as server, server.connect("/bug") as client:
        code, reason = await client.closed()
    [record] = records.read("ERROR")
    assert (code, reason) == (1011, record["error_id"])
    assert record["message"] == "ZeroDivisionError: in the app"
    assert record["path"] == "/bug"


async def test_a_bug_before_accepting_is_500_with_the_id_of_its_record(server: Any, records: Any) -> None:
    async with server as server:
        response = await server.refused("/early-bug")
    [record] = records.read("ERROR")
    assert response.status_code == 500
    assert response.body.decode() == f"internal server error {record['error_id']}\n"
    assert record["message"] == "ZeroDivisionError: in the app"
    assert record["path"] == "/early-bug"


async def test_routes_of_a_mounted_app(server: Any) -> None:
    async with server as server, server.connect("/mounted/here") as client:
        assert await client.receive() == "/mounted /mounted/here"


async def test_closing_the_server_is_1012_on_both_sides(server: Any, program: Program) -> None:
    async with server as server, server.connect("/until-gone") as client:
        assert await client.receive() == "here"
        server.scope.cancel()
        assert (await client.closed())[0] == 1012
        await server.over.wait()
    assert program.happened == ["start-up", (1012, ""), "shutdown"]
