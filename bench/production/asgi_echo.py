"""An ASGI application, for Hypercorn and uvicorn."""

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
    while (event := await receive())["type"] == "websocket.receive":
        if event.get("text") == "crash":
            raise RuntimeError("as it was asked to")
        while event.get("text") == "flood":
            await send({"type": "websocket.send", "text": "x" * 65536})
        await send({"type": "websocket.send", "text": event["text"]})
