"""Step 2: two tools that a model can call, and an agent that calls them as a model would."""

from typing import Annotated

import trio
from msgspec import Meta

from tricorn.chat import Run, Tool, ToolError, tool
from tricorn.chat.model_tools import by_name

STOCK = {"tea": 12, "coffee": 0}


@tool
async def stock(item: str) -> int:
    """Return how many packets of an item there are.

    Args:
        item: what the customer wants, in lower case.
    """
    if item not in STOCK:
        raise ToolError(f"we do not sell {item}, but {', '.join(STOCK)}")
    return STOCK[item]


@tool(seconds=10)
async def order(run: Run, item: str, packets: Annotated[int, Meta(ge=1, le=10)] = 1) -> str:
    """Order packets of an item for the customer.

    Args:
        item: what to order.
        packets: how many.
    """
    await run.think(f"asking the warehouse for {packets} of {item}")
    await trio.sleep(0.1)  # in real life: a request to the warehouse
    if STOCK.get(item, 0) < packets:
        raise ToolError(f"there are only {STOCK.get(item, 0)} packets of {item}")
    STOCK[item] -= packets
    return f"ordered by {run.user}"


TOOLS: list[Tool] = [stock, order]


async def agent(run: Run) -> str:
    """Take a message like `order {"item": "tea"}`, which is what a model's call of a tool is."""
    name, _, arguments = run.message.partition(" ")
    tools = by_name(TOOLS)
    if name not in tools:
        return f"There are {', '.join(tools)}."
    return await tools[name].call(run, arguments)
