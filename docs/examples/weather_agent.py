import trio

from tricorn.chat import Run, ToolError


async def weather(run: Run) -> str:
    city = run.message.strip()
    await run.think(f"looking up {city}")
    try:
        async with run.tool("forecast", city=city) as tool:
            tool.result = await forecast(city)
    except ToolError as error:
        return f"I cannot say: there is {error}."
    return f"{city}: {tool.result}."


async def forecast(city: str) -> str:
    await trio.sleep(0.5)  # in real life: a request to a weather service
    if city not in FORECASTS:
        raise ToolError(f"no weather station in {city}")
    return FORECASTS[city]


FORECASTS = {"Oslo": "rain", "Cairo": "sun"}
