"""A bare ASGI application, for Hypercorn and uvicorn."""

from typing import Any


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            phase = (await receive())["type"]
            await send({"type": f"{phase}.complete"})
            if phase == "lifespan.shutdown":
                return
    await receive()
    await send({"type": "websocket.accept"})
    if scope["path"] != "/":
        await misbehave(scope, receive, send)
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": event["text"]})


async def misbehave(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    while scope["path"] == "/flood":
        await send({"type": "websocket.send", "text": "x" * 65536})
    raise RuntimeError("as it was asked to")
