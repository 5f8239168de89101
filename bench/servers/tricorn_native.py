"""Tricorn's native host. Prints its port."""

import trio

import tricorn


async def echo(ws: tricorn.WebSocket) -> None:
    async for message in ws:
        await ws.send(message)


async def main() -> None:
    async with trio.open_nursery() as nursery:
        [(_, port)] = await nursery.start(tricorn.serve, echo, 0)
        print(port, flush=True)


trio.run(main)
