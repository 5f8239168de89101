"""trio-websocket, as its documentation begins."""

import sys
from functools import partial

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, WebSocketServer, serve_websocket


async def handle(request: WebSocketRequest) -> None:
    ws = await request.accept()
    try:
        if request.path != "/":
            await misbehave(ws, request.path)
        while True:
            await ws.send_message(await ws.get_message())
    except ConnectionClosed:
        pass


async def misbehave(ws: WebSocketConnection, path: str) -> None:
    await ws.get_message()
    while path == "/flood":
        await ws.send_message("x" * 65536)
    raise RuntimeError("as it was asked to")


async def main(host: str) -> None:
    async with trio.open_nursery() as nursery:
        server: WebSocketServer = await nursery.start(partial(serve_websocket, handle, host, 0, None))
        print(f"listening on http://{host}:{server.port}", flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
