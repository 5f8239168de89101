"""Tricorn, by `tricorn.run`."""

import sys

import tricorn


async def serve(ws: tricorn.WebSocket) -> None:
    async for message in ws:
        if message == "crash":
            raise RuntimeError("as it was asked to")
        while message == "flood":
            await ws.send("x" * 65536)
        await ws.send(message)


tricorn.run(serve, int(sys.argv[2]), sys.argv[1])
