"""aiohttp, by `run_app`."""

import sys

from aiohttp import WSMsgType, web


async def handle(request: web.Request) -> web.WebSocketResponse:
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    async for message in ws:
        if message.type is not WSMsgType.TEXT:
            continue
        if message.data == "crash":
            raise RuntimeError("as it was asked to")
        while message.data == "flood":
            await ws.send_str("x" * 65536)
        await ws.send_str(message.data)
    return ws


app = web.Application()
app.add_routes([web.get("/", handle)])
web.run_app(app, host=sys.argv[1], port=int(sys.argv[2]), print=None)
