"""Tricorn as an ASGI app under Hypercorn on Trio. Prints its port."""

from functools import partial

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

import tricorn


async def echo(ws: tricorn.WebSocket) -> None:
    async for message in ws:
        await ws.send(message)


async def main() -> None:
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    async with trio.open_nursery() as nursery:
        [address] = await nursery.start(partial(serve, tricorn.asgi_app(echo), config))
        print(address.rpartition(":")[2], flush=True)


trio.run(main)
