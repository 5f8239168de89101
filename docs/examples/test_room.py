import pytest
from room import members, room

import tricorn
from tricorn.testing import Client, Connect

BIG = "." * 2**19  # characters: a few of them are more than a member that does not read may leave unread


async def test_everybody_hears_a_message(tricorn_connect: Connect) -> None:
    ann, bob = [await tricorn_connect(room) for _ in range(2)]
    await ann.send("hello")
    assert [await client.receive() for client in (ann, bob)] == ["hello", "hello"]


async def test_a_member_that_leaves_is_forgotten(tricorn_connect: Connect) -> None:
    ann, bob = [await tricorn_connect(room) for _ in range(2)]
    await bob.close()
    await ann.send("hello")
    assert await ann.receive() == "hello"
    assert members == {ann.websocket}


async def test_a_member_that_does_not_read_is_closed_and_nobody_waits_for_it(tricorn_connect: Connect) -> None:
    quick, slow = [await tricorn_connect(room) for _ in range(2)]
    while slow.websocket in members:
        await quick.send(BIG)
        assert await quick.receive() == BIG
    with pytest.raises(tricorn.Disconnected, match="1008 too slow"):
        await receive_all(slow)


async def receive_all(client: Client) -> None:
    while True:
        await client.receive()
