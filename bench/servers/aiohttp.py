"""aiohttp on asyncio or uvloop, by `run_app`; its connections are closed at the end as its documentation has it."""

import sys
from pkgutil import resolve_name
from socket import create_server
from weakref import WeakSet

from aiohttp import WSCloseCode, WSMsgType, web

OPTIONS = {"defaults": {}, "bare": {"compress": False}, "deflate": {}}[sys.argv[2]]
CONNECTIONS = web.AppKey("connections", WeakSet[web.WebSocketResponse])


async def handle(request: web.Request) -> web.WebSocketResponse:
    ws = web.WebSocketResponse(**OPTIONS)
    await ws.prepare(request)
    request.app[CONNECTIONS].add(ws)
    if request.path != "/":
        await misbehave(ws, request.path)
    async for message in ws:
        if message.type is WSMsgType.TEXT:
            await ws.send_str(message.data)
    return ws


async def misbehave(ws: web.WebSocketResponse, path: str) -> None:
    await ws.receive()
    while path == "/flood":
        await ws.send_str("x" * 65536)
    raise RuntimeError("as it was asked to")


async def close(app: web.Application) -> None:
    for ws in set(app[CONNECTIONS]):
        await ws.close(code=WSCloseCode.GOING_AWAY, message=b"Server shutdown")


if __name__ == "__main__":
    app = web.Application()
    app[CONNECTIONS] = WeakSet()
    app.add_routes([web.get("/{path:.*}", handle)])
    app.on_shutdown.append(close)
    listener = create_server((sys.argv[1], 0), backlog=128)  # as many as it has by default
    print(f"listening on http://{sys.argv[1]}:{listener.getsockname()[1]}", flush=True)
    loop = resolve_name(f"{sys.argv[3]}:new_event_loop")()
    web.run_app(app, sock=listener, print=None, access_log=None, loop=loop)
