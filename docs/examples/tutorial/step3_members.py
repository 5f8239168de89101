"""Step 3: let in only those who have a token, and say who speaks."""

import os

import jwt

from tricorn import Accept, BeforeUpgrade, Refuse, Request, WebSocket, broadcast, run

members: set[WebSocket[str]] = set()


def authenticator(key: str) -> BeforeUpgrade:
    """Make the hook that lets in whoever shows a token that was signed with this key."""

    async def authenticate(request: Request) -> Accept | Refuse:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return Refuse(401, "a token is needed", {"WWW-Authenticate": "Bearer"})
        try:
            claims = jwt.decode(token, key, algorithms=["HS256"], options={"require": ["exp", "sub"]})
        except jwt.InvalidTokenError:
            return Refuse(401, "this token is not valid", {"WWW-Authenticate": "Bearer"})
        return Accept(state=claims["sub"])

    return authenticate


async def room(ws: WebSocket[str]) -> None:
    members.add(ws)
    try:
        async for message in ws:
            if isinstance(message, str):
                say(f"{ws.state}: {message}")
    finally:
        members.discard(ws)
        say(f"{ws.state} has left")


def say(text: str) -> None:
    for slow in broadcast(members, text):
        members.discard(slow)
        slow.nursery.start_soon(slow.close, 1008, "too slow")


if __name__ == "__main__":
    host = os.environ.get("HOST", "127.0.0.1")
    run(room, 8080, host, before_upgrade=authenticator(os.environ["ROOM_KEY"]))
