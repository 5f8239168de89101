"""Step 1: send each message back."""

import tricorn


async def echo(ws: tricorn.WebSocket) -> None:
    async for message in ws:
        await ws.send(message)


if __name__ == "__main__":
    tricorn.run(echo, 8080)
