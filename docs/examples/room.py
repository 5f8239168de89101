"""A room: everybody in it hears what anybody says. A member that does not keep up is let go; nobody waits for it."""

import tricorn

members: set[tricorn.WebSocket] = set()


async def room(ws: tricorn.WebSocket) -> None:
    members.add(ws)
    try:
        async for message in ws:
            for slow in tricorn.broadcast(members, message):
                members.discard(slow)
                slow.nursery.start_soon(slow.close, 1008, "too slow")
    finally:
        members.discard(ws)


if __name__ == "__main__":
    tricorn.run(room, 8080)
