from echo import echo

from tricorn.testing import connect


async def test_each_message_comes_back_as_it_was() -> None:
    async with connect(echo) as client:
        for message in ("hello", b"\0\xff"):
            await client.send(message)
            assert await client.receive() == message
