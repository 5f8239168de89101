"""What an agent sees of its run: the same methods as Tricorn's, so that one agent serves on both."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from itertools import count
from types import SimpleNamespace

from websockets.asyncio.server import ServerConnection


class Run:
    def __init__(self, websocket: ServerConnection, conversation: str, message: str) -> None:
        self.conversation = conversation
        self.message = message
        self.answer: list[str] = []
        self._websocket = websocket
        self._seq = count(1)

    async def tell(self, type_: str, **fields: object) -> None:
        event = {"type": type_, "conversation": self.conversation, "seq": next(self._seq), "at": 0.0, **fields}
        await self._websocket.send(json.dumps(event))

    async def think(self, text: str) -> None:
        await self.tell("agent_thinking", text=text)

    async def say(self, text: str) -> None:
        self.answer.append(text)
        await self.tell("agent_message", text=text)

    @asynccontextmanager
    async def tool(self, name: str, **arguments: object) -> AsyncGenerator[SimpleNamespace]:
        await self.tell("tool_executing", call=name, tool=name, arguments=arguments)
        tool = SimpleNamespace(result=None)
        yield tool
        await self.tell("tool_completed", call=name, tool=name, seconds=0.0, result=tool.result)
