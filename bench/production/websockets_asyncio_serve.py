"""websockets on asyncio, ended by SIGTERM as its documentation has it."""

import asyncio
import signal
import sys

from websockets.asyncio.server import ServerConnection, serve


async def handle(ws: ServerConnection) -> None:
    async for message in ws:
        if message == "crash":
            raise RuntimeError("as it was asked to")
        while message == "flood":
            await ws.send("x" * 65536)
        await ws.send(message)


async def main() -> None:
    async with serve(handle, sys.argv[1], int(sys.argv[2])) as server:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.close)
        await server.wait_closed()


asyncio.run(main())
