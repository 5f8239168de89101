"""websockets on Trio, ended by SIGTERM as a Trio program ends."""

import signal
import sys
from functools import partial

import trio
from websockets.trio.server import ServerConnection, serve


async def handle(ws: ServerConnection) -> None:
    async for message in ws:
        if message == "crash":
            raise RuntimeError("as it was asked to")
        while message == "flood":
            await ws.send("x" * 65536)
        await ws.send(message)


async def main() -> None:
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve, handle, int(sys.argv[2]), host=sys.argv[1]))
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                await server.aclose()
                break
        nursery.cancel_scope.cancel()


trio.run(main)
