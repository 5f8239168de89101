from mcp_agent import agent

from tricorn.chat.testing import ask


async def test_the_answer_is_that_of_the_mcp_server() -> None:
    result = await ask(agent, 'forecast {"city": "Oslo"}')
    assert (result.outcome, result.answer) == ("success", "Oslo: rain")
