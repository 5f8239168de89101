"""Tools of an MCP server: `pip install 'tricorn[mcp]'`. Ask `forecast {"city": "Oslo"}`."""

import sys
from pathlib import Path

from tricorn.chat import Run
from tricorn.chat.mcp import mcp
from tricorn.chat.model_tools import by_name

SERVER = Path(__file__).with_name("mcp_weather_server.py")


async def agent(run: Run) -> None:
    name, _, arguments = run.message.partition(" ")
    async with mcp(sys.executable, str(SERVER)) as tools:
        text = await by_name(tools)[name].call(run, arguments)
    await run.say(text)
