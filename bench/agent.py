"""An agent that waits for every piece of its answer, as one does that asks a model, on Trio and on asyncio.

It waits for a turn of the loop and no longer: what a socket or a timer costs is not the chat's.
"""

from __future__ import annotations

import asyncio
from typing import Any

from sniffio import current_async_library
from trio.lowlevel import checkpoint

from tricorn.chat.agents.demo import PIECE


async def waiting(run: Any) -> None:
    """Turn the text of `reverse TEXT` around."""
    on_trio = current_async_library() == "trio"
    text = run.message.removeprefix("reverse ")
    await run.think("I turn the text around.")
    async with run.tool("reverse", text=text) as tool:
        tool.result = text[::-1]
    for piece in PIECE.findall(tool.result):
        if on_trio:
            await checkpoint()
        else:
            await asyncio.sleep(0)
        await run.say(piece)
