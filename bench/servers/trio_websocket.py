"""trio-websocket, the other WebSocket server on Trio. Prints its port."""

from functools import partial

import trio
from trio_websocket import ConnectionClosed, WebSocketRequest, WebSocketServer, serve_websocket


async def echo(request: WebSocketRequest) -> None:
    ws = await request.accept()
    try:
        while True:
            await ws.send_message(await ws.get_message())
    except ConnectionClosed:
        pass


async def main() -> None:
    async with trio.open_nursery() as nursery:
        server: WebSocketServer = await nursery.start(partial(serve_websocket, echo, "127.0.0.1", 0, None))
        print(server.port, flush=True)


trio.run(main)
