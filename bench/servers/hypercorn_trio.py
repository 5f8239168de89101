"""A bare ASGI app under Hypercorn on Trio: nothing between it and the messages. Prints its port."""

from functools import partial

import trio
from hypercorn.config import Config
from hypercorn.trio import serve


async def echo(scope, receive, send):
    if scope["type"] != "websocket":
        raise NotImplementedError
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": event["text"]})


async def main() -> None:
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    async with trio.open_nursery() as nursery:
        [address] = await nursery.start(partial(serve, echo, config))
        print(address.rpartition(":")[2], flush=True)


trio.run(main)
