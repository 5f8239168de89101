import tricorn


async def echo(ws: tricorn.WebSocket) -> None:
    async for message in ws:
        await ws.send(message)


tricorn.run(echo, 8080)
