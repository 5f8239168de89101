"""websockets, or picows' reimplementation of it, on asyncio or uvloop, ended by SIGTERM as its documentation has it."""

import asyncio
import signal
import sys
from pkgutil import resolve_name
from typing import Any

from websockets.asyncio.server import ServerConnection

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


async def main(host: str, options: dict[str, Any], package: str) -> None:
    async with resolve_name(f"{package}.asyncio.server:serve")(handle, host, 0, **options) as server:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.close)
        print(f"listening on http://{host}:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.wait_closed()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=resolve_name(f"{sys.argv[3]}:new_event_loop")) as runner:
        runner.run(main(sys.argv[1], OPTIONS[sys.argv[2]], sys.argv[4]))
