import pytest
from routes import echo, latency

import tricorn
from tricorn.testing import connect

HANDLERS = {"/echo": echo, "/latency": latency}


async def test_each_path_has_its_handler() -> None:
    async with connect(HANDLERS, "/echo") as client:
        await client.send("hello")
        assert await client.receive() == "hello"
    async with connect(HANDLERS, "/latency") as client:
        await client.send("how long?")
        answer = await client.receive()
        assert isinstance(answer, str)
        assert answer.endswith(" ms")


async def test_any_other_path_is_refused_with_404() -> None:
    with pytest.raises(tricorn.Refuse) as refused:
        async with connect(HANDLERS, "/other"):
            pass
    assert refused.value.status == 404
