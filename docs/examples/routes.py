"""A handler for each path; any other path is answered with 404."""

import tricorn


async def echo(ws: tricorn.WebSocket) -> None:
    async for message in ws:
        await ws.send(message)


async def latency(ws: tricorn.WebSocket) -> None:
    async for _ in ws:
        await ws.send(f"{await ws.ping() * 1000:.1f} ms")


if __name__ == "__main__":
    tricorn.run({"/echo": echo, "/latency": latency}, 8080)
