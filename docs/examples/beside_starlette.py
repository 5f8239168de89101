"""Beside Starlette: one port has an application's pages and its own WebSocket route, and a room that is a handler."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

import tricorn

members: set[tricorn.WebSocket] = set()


async def page(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{len(members)} in the room\n")


async def announce(ws: WebSocket) -> None:
    await ws.accept()
    async for news in ws.iter_text():
        slow = tricorn.broadcast(members, news)
        await ws.send_text(f"announced to {len(members) - len(slow)}")


async def room(ws: tricorn.WebSocket) -> None:
    members.add(ws)
    try:
        async for message in ws:
            tricorn.broadcast(members, message)
    finally:
        members.discard(ws)


app = Starlette(routes=[Route("/", page), WebSocketRoute("/announce", announce)])


if __name__ == "__main__":
    tricorn.run({"/room": room, "/announce": tricorn.asgi_handler(app)}, 8080, app=app)
