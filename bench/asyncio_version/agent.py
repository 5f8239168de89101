"""The demo agent. Of its skills, only `slow` waits for something other than the run, and does that here on asyncio."""

from __future__ import annotations

import asyncio
from typing import Any

from tricorn.chat import ToolError
from tricorn.chat.agents.demo import HELP, MAX_SECONDS, POLITENESS, SKILLS, answer
from tricorn.chat.agents.demo import slow as trio_slow


async def demo(run: Any) -> None:
    """Do what `run.message` asks for, or say what can be asked. A tool that refuses is an answer, not a failure."""
    message = POLITENESS.sub("", run.message.strip())
    for pattern, skill in SKILLS:
        if request := pattern.fullmatch(message):
            try:
                await (slow if skill is trio_slow else skill)(run, **request.groupdict())
            except ToolError as refusal:
                await answer(run, f"Sorry, that did not work. {refusal}")
            return
    await answer(run, HELP)


async def slow(run: Any, seconds: str) -> None:
    duration = float(seconds)
    await run.think(f"This will take {seconds} s. Cancel it if that is too long.")
    async with run.tool("slow", seconds=duration) as tool:
        if duration > MAX_SECONDS:
            raise ToolError(f"I stay at one thing for {MAX_SECONDS} s at most.")
        started = asyncio.get_running_loop().time()
        await asyncio.sleep(duration)
        tool.result = round(asyncio.get_running_loop().time() - started, 1)
    await answer(run, f"Done. It took {tool.result} s.")
