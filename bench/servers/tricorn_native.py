"""Tricorn's own host."""

import gc
import signal
import sys
from functools import partial
from math import inf

import trio

import tricorn
from tricorn.settings import Settings

DEFAULTS = Settings()
# What no peer has: limits on how fast a client may be and on how many there are.
BARE = Settings(ping_interval=inf, messages_per_second=inf, bytes_per_second=inf, max_connections=100_000)
DEFLATE = Settings(ping_interval=inf, messages_per_second=inf, bytes_per_second=inf, deflate="takeover")


async def handle(ws: tricorn.WebSocket) -> None:
    if ws.request.path != "/":
        await misbehave(ws)
    async for message in ws:
        await ws.send(message)


async def misbehave(ws: tricorn.WebSocket) -> None:
    await ws.receive()
    while ws.request.path == "/flood":
        await ws.send("x" * 65536)
    raise RuntimeError("as it was asked to")


async def main(host: str, settings: Settings) -> None:
    async with trio.open_nursery() as nursery:
        server: tricorn.Server = await nursery.start(partial(tricorn.serve, handle, 0, host, settings=settings))
        print(f"listening on http://{host}:{server.addresses[0][1]}", flush=True)
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                nursery.cancel_scope.cancel()


if __name__ == "__main__":
    # As `tricorn serve` does: it records the end of every connection, and what a connection is made of lives long.
    tricorn.send_records("stderr", "INFO")
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    trio.run(main, sys.argv[1], {"defaults": DEFAULTS, "bare": BARE, "deflate": DEFLATE}[sys.argv[2]])
