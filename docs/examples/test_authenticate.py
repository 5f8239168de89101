import pytest
from authenticate import authenticate, greet

import tricorn
from tricorn.testing import connect


async def test_a_client_with_a_token_is_greeted_by_name() -> None:
    async with connect(greet, headers={"Authorization": "Bearer tok-ann"}, before_upgrade=authenticate) as client:
        assert await client.receive() == "Hello Ann!"
        await client.send("hi")
        assert await client.receive() == "Ann said: 'hi'"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer tok-eve"}, {"Authorization": "Basic tok-ann"}])
async def test_a_client_without_a_known_token_gets_401(headers: dict[str, str]) -> None:
    with pytest.raises(tricorn.Refuse) as refused:
        async with connect(greet, headers=headers, before_upgrade=authenticate):
            pass
    assert refused.value.status == 401
    assert refused.value.headers == {"WWW-Authenticate": "Bearer"}
