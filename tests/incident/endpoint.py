"""The WebSocket endpoint. Its inner handler asks a helper that can fail before it says what happened."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable

from websockets.asyncio.server import ServerConnection

from incident.run import Run
from incident.state_machine import StateMachine
from incident.utils import is_websocket_connected

logger = logging.getLogger("incident")

Agent = Callable[[Run], Awaitable[None]]


async def websocket_endpoint(agent: Agent, websocket: ServerConnection) -> None:
    StateMachine().transition("ACCEPTED")
    try:
        await websocket.send(json.dumps({"type": "welcome", "connection": str(websocket.id), "user": "local"}))
        await handle_messages(agent, websocket)
    except Exception as e:
        logger.error("WebSocket error: %s", e)
        await websocket.close(1011, str(e)[:100])


async def handle_messages(agent: Agent, websocket: ServerConnection) -> None:
    while True:
        try:
            await handle_message(agent, websocket, json.loads(await websocket.recv()))
        except Exception as e:
            if not is_websocket_connected(websocket):
                return
            logger.error("Error processing message: %s: %s", type(e).__name__, e)
            await websocket.send(json.dumps({"type": "error", "code": "internal", "message": "this did not work"}))


async def handle_message(agent: Agent, websocket: ServerConnection, message: dict[str, str]) -> None:
    conversation = message["conversation"]
    if message["type"] == "open":
        await websocket.send(json.dumps({"type": "opened", "conversation": conversation, "epoch": "", "head": 0}))
    elif message["type"] == "post":
        posted = {"type": "posted", "id": message["id"], "conversation": conversation, "seq": 1}
        await websocket.send(json.dumps(posted))
        run = Run(websocket, conversation, message["text"])
        await run.tell("user_message", id=message["id"], text=message["text"])
        await run.tell("agent_started", agent=agent.__name__, post=message["id"])
        await agent(run)
        await run.tell("agent_completed", outcome="success", seconds=0.0, text="".join(run.answer))
