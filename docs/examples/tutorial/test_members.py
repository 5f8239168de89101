"""Step 4: test the room in memory. Run this with `pytest`."""

import time

import jwt
import pytest
from step3_members import authenticator, members, room

import tricorn
from tricorn.testing import Connect

KEY = "a key of 32 bytes or more, for the tests"


def token(user: str, key: str = KEY, seconds: int = 60) -> dict[str, str]:
    """Return the header with which a user comes in."""
    made = jwt.encode({"sub": user, "exp": time.time() + seconds}, key, algorithm="HS256")
    return {"Authorization": f"Bearer {made}"}


async def test_everybody_hears_who_speaks_and_who_leaves(tricorn_connect: Connect) -> None:
    ann = await tricorn_connect(room, headers=token("ann"), before_upgrade=authenticator(KEY))
    bob = await tricorn_connect(room, headers=token("bob"), before_upgrade=authenticator(KEY))
    await ann.send("hello")
    assert await ann.receive() == "ann: hello"
    assert await bob.receive() == "ann: hello"
    await bob.close()
    assert await ann.receive() == "bob has left"
    assert len(members) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic YTpi"},
        token("eve", key="another key, of which the room knows nothing"),
        token("ann", seconds=-1),
    ],
    ids=["no token", "another scheme", "a forged token", "a token that has expired"],
)
async def test_others_get_401(tricorn_connect: Connect, headers: dict[str, str]) -> None:
    with pytest.raises(tricorn.Refuse) as refused:
        await tricorn_connect(room, headers=headers, before_upgrade=authenticator(KEY))
    assert refused.value.status == 401
