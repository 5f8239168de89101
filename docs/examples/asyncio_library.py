"""A library that needs asyncio streams an answer, and Stop cancels it in its loop."""

from asyncio import sleep
from collections.abc import AsyncGenerator
from contextlib import aclosing

from tricorn.chat import Run
from tricorn.chat.asyncio_bridge import from_asyncio, to_asyncio


async def agent(run: Run) -> None:
    await to_asyncio(answer, run)


async def answer(run: Run) -> None:
    """This runs in a loop of asyncio's. What belongs to Trio, like `run.say`, is called by `from_asyncio`."""
    async with aclosing(library(run.message)) as pieces:
        async for piece in pieces:
            await from_asyncio(run.say, piece)


async def library(question: str) -> AsyncGenerator[str]:
    """Stand in for a framework such as pydantic-ai."""
    for word in f"You asked: {question}".split():
        await sleep(0.01)
        yield f"{word} "
