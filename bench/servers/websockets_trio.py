"""websockets on Trio, ended by SIGTERM as a Trio program ends."""

import signal
import sys
from functools import partial
from typing import Any

import trio
from websockets.trio.server import ServerConnection, serve

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "bare": {"compression": None, "ping_interval": None},
    "deflate": {"ping_interval": None},
}


async def handle(ws: ServerConnection) -> None:
    if ws.request.path != "/":
        await misbehave(ws)
    async for message in ws:
        await ws.send(message)


async def misbehave(ws: ServerConnection) -> None:
    await ws.recv()
    while ws.request.path == "/flood":
        await ws.send("x" * 65536)
    raise RuntimeError("as it was asked to")


async def main(host: str, options: dict[str, Any]) -> None:
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve, handle, 0, host=host, **options))
        print(f"listening on http://{host}:{server.listeners[0].socket.getsockname()[1]}", flush=True)
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                await server.aclose()
                break
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], OPTIONS[sys.argv[2]])
