import pytest
from tools_agent import agent, factorial

from tricorn.chat.protocol import ToolCompleted
from tricorn.chat.testing import ask


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('forecast {"place": {"city": "Oslo"}}', '[{"day":"2026-05-01","sky":"rain"}]'),
        ('forecast {"place": {"city": "Rome"}}', "Error: no weather station in Rome; there is one in Oslo"),
        ('forecast {"place": "Oslo"}', "Error: wrong arguments: Expected `object`, got `str` - at `$.place`"),
        ('factorial {"number": 5}', "120"),
        ("weather", "There is no tool 'weather', but forecast, factorial."),
    ],
)
async def test_the_answer_is_what_the_tool_returned(text: str, answer: str) -> None:
    result = await ask(agent, text)
    assert (result.outcome, result.answer) == ("success", answer)


async def test_people_see_the_tool_and_its_result() -> None:
    result = await ask(agent, 'factorial {"number": 5}')
    [tool] = [event for event in result.events if isinstance(event, ToolCompleted)]
    assert (tool.tool, tool.result) == (factorial.name, 120)
