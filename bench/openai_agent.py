"""An agent for the asyncio version that asks a model by `openai`, as its documentation shows, and joins pieces as ours.

It keeps one client for all runs. It tells the model nothing of earlier posts, and does not ask again if that fails.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from openai import AsyncOpenAI

from tricorn.chat.agents.model import JOIN

client = AsyncOpenAI()


async def answer(run: Any) -> None:
    stream = await client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": run.message}],
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces: list[str] = []
    due = 0.0
    async with stream:
        async for chunk in stream:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                pieces.append(text)
                if (now := monotonic()) >= due:
                    await run.say("".join(pieces))
                    pieces.clear()
                    due = now + JOIN
    await run.say("".join(pieces))
