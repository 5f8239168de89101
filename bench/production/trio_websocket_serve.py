"""trio-websocket, as its documentation begins."""

import sys

import trio
from trio_websocket import ConnectionClosed, WebSocketRequest, serve_websocket


async def serve(request: WebSocketRequest) -> None:
    ws = await request.accept()
    try:
        while True:
            message = await ws.get_message()
            if message == "crash":
                raise RuntimeError("as it was asked to")
            while message == "flood":
                await ws.send_message("x" * 65536)
            await ws.send_message(message)
    except ConnectionClosed:
        pass


trio.run(serve_websocket, serve, sys.argv[1], int(sys.argv[2]), None)
