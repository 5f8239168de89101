from asyncio_library import agent

from tricorn.chat.testing import ask


async def test_the_answer_is_what_the_library_yields() -> None:
    result = await ask(agent, "why?")
    assert (result.outcome, result.answer) == ("success", "You asked: why? ")
