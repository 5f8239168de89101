"""One HTTP client for all runs, as long as the server lives: tricorn serve --agent shared_client:weather_service"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from tricorn.chat import Agent, Run, ToolError

SERVICE = "http://127.0.0.1:8000"


@asynccontextmanager
async def weather_service() -> AsyncIterator[Agent]:
    async with httpx.AsyncClient(base_url=SERVICE, timeout=10) as client:
        # Do not serve if it is not there. The first request also imports what httpx needs, while imports are allowed.
        (await client.get("/")).raise_for_status()

        async def weather(run: Run) -> str:
            try:
                async with run.tool("forecast", city=run.message) as tool:
                    tool.result = await forecast(client, run.message)
            except ToolError as error:
                return f"I cannot say: {error}."
            return f"{run.message}: {tool.result}."

        yield weather


async def forecast(client: httpx.AsyncClient, city: str) -> str:
    response = await client.get("/forecast", params={"city": city})
    if response.status_code == 404:
        raise ToolError(f"there is no weather station in {city}")
    return response.raise_for_status().text
