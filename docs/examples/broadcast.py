"""Everybody hears what anybody says. Who falls 100 messages behind is let go, so nobody waits for the slowest."""

import trio

import tricorn

listeners: set[trio.MemorySendChannel[str | bytes]] = set()


async def room(ws: tricorn.WebSocket) -> None:
    listener, messages = trio.open_memory_channel[str | bytes](100)
    listeners.add(listener)
    ws.nursery.start_soon(deliver, ws, messages)
    try:
        async for message in ws:
            broadcast(message)
    finally:
        listeners.discard(listener)


def broadcast(message: str | bytes) -> None:
    for listener in tuple(listeners):
        try:
            listener.send_nowait(message)
        except trio.WouldBlock:
            listeners.discard(listener)
            listener.close()


async def deliver(ws: tricorn.WebSocket, messages: trio.MemoryReceiveChannel[str | bytes]) -> None:
    async for message in messages:
        await ws.send(message)
    await ws.close(1008, "too slow")


tricorn.run(room, 8080)
