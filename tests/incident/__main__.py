"""Serve until SIGTERM; handlers that have not ended a second later are cancelled."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import suppress
from functools import partial
from importlib import import_module
from signal import SIGTERM

from websockets.asyncio.server import serve

from incident.endpoint import websocket_endpoint

GRACE = 1  # seconds


async def main(name: str) -> None:
    module, _, function = name.partition(":")
    agent = getattr(import_module(module), function)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(SIGTERM, stop.set)
    server = await serve(
        partial(websocket_endpoint, agent), "127.0.0.1", 0, subprotocols=["tricorn.v1"], close_timeout=GRACE
    )
    print("http://{}:{}".format(*server.sockets[0].getsockname()), flush=True)
    await stop.wait()
    server.close()
    with suppress(TimeoutError):
        await asyncio.wait_for(server.wait_closed(), GRACE)


logging.basicConfig(level=logging.ERROR, format="%(message)s")
asyncio.run(main(sys.argv[1]))
