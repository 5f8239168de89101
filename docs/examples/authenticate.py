"""Authenticate before the upgrade: a client without a known token gets 401, and the handler knows who the user is."""

import tricorn

USERS = {"tok-ann": "Ann", "tok-bob": "Bob"}  # in real life: verify a signed token


async def authenticate(request: tricorn.Request) -> tricorn.Accept | tricorn.Refuse:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    user = USERS.get(token)
    if scheme.lower() != "bearer" or user is None:
        return tricorn.Refuse(401, "a known token is needed", {"WWW-Authenticate": "Bearer"})
    return tricorn.Accept(state=user)


async def greet(ws: tricorn.WebSocket[str]) -> None:
    await ws.send(f"Hello {ws.state}!")
    async for message in ws:
        await ws.send(f"{ws.state} said: {message!r}")


if __name__ == "__main__":
    tricorn.run(greet, 8080, before_upgrade=authenticate)
