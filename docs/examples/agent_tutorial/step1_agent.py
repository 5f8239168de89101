"""Step 1: an agent that shows what it does."""

from tricorn.chat import Run, ToolError

STOCK = {"tea": 12, "coffee": 0}


async def agent(run: Run) -> str:
    item = run.message.strip().lower()
    await run.think(f"looking for {item}")
    try:
        async with run.tool("stock", item=item) as tool:
            if item not in STOCK:
                raise ToolError(f"we do not sell {item}")
            tool.result = STOCK[item]
    except ToolError as error:
        return f"Sorry, {error}."
    return f"We have {STOCK[item]} packets of {item}."
