"""Tools as a model calls them: by name, with JSON. Ask `forecast {"place": {"city": "Oslo"}}`."""

from dataclasses import dataclass
from datetime import date
from typing import Annotated

import trio
from msgspec import Meta

from tricorn.chat import Run, ToolError, tool
from tricorn.chat.model_tools import by_name


@dataclass
class Place:
    city: str
    country: str | None = None


@dataclass
class Day:
    day: date
    sky: str


@tool(seconds=10)
async def forecast(run: Run, place: Place, days: Annotated[int, Meta(ge=1, le=14)] = 1) -> list[Day]:
    """Return the weather at a place, from today on.

    Args:
        place: a city with a weather station.
        days: how many days.
    """
    await run.think(f"asking the weather service about {place.city}")
    await trio.sleep(0.1)  # in real life: a request to it
    if place.city != "Oslo":
        raise ToolError(f"no weather station in {place.city}; there is one in Oslo")
    return [Day(date(2026, 5, 1 + each), "rain") for each in range(days)]


@tool
def factorial(number: Annotated[int, Meta(ge=0)]) -> int:
    """Return the factorial of a number."""
    result = 1
    for factor in range(2, number + 1):
        trio.from_thread.check_cancelled()  # this runs in a thread, and Stop ends it here
        result *= factor
    return result


TOOLS = by_name([forecast, factorial])


async def agent(run: Run) -> None:
    """Do what a model would do with `TOOLS`. Its API is told the name, description and parameters of each."""
    name, _, arguments = run.message.partition(" ")
    if name in TOOLS:
        await run.say(await TOOLS[name].call(run, arguments))
    else:
        await run.say(f"There is no tool {name!r}, but {', '.join(TOOLS)}.")
