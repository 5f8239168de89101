"""A program that embeds trio-websocket: its handlers get Tricorn's connections, and end with it as those do."""

import signal

import trio
from trio_websocket import serve_websocket

import tricorn
from tricorn.trio_websocket import adapt


async def echo(ws: tricorn.WebSocket) -> None:
    async for message in ws:
        await ws.send(message)


async def main() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_websocket, adapt(echo), "127.0.0.1", 8080, None)
            await anext(signals)
            nursery.cancel_scope.cancel()  # closes every connection with 1012


if __name__ == "__main__":
    trio.run(main)
