"""Test an agent without a server. Run this with `pytest`, pytest-trio, and `trio_mode = true` in pytest's settings."""

import trio
from trio.testing import MockClock
from weather_agent import weather

from tricorn.chat.protocol import AgentThinking, ToolCompleted
from tricorn.chat.testing import ask


async def test_the_forecast_is_the_answer(autojump_clock: MockClock) -> None:
    result = await ask(weather, "Oslo")
    assert (result.outcome, result.answer) == ("success", "Oslo: rain.")
    assert [event.text for event in result.events if isinstance(event, AgentThinking)] == ["looking up Oslo"]


async def test_a_city_without_a_station_is_refused(autojump_clock: MockClock) -> None:
    result = await ask(weather, "Atlantis")
    assert (result.outcome, result.answer) == ("success", "I cannot say: there is no weather station in Atlantis.")
    [tool] = [event for event in result.events if isinstance(event, ToolCompleted)]
    assert tool.error == "no weather station in Atlantis"


async def test_a_user_can_cancel_it(autojump_clock: MockClock) -> None:
    result = await ask(weather, "Cairo", cancel_after=0.2)
    assert (result.outcome, result.answer) == ("cancelled", "")
    assert trio.current_time() == 0.2
