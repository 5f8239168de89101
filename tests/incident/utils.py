"""Helpers of the endpoint. They import inside of functions, because `state_machine` imports this module."""

from __future__ import annotations

from websockets.asyncio.server import ServerConnection
from websockets.protocol import State


def is_websocket_connected(websocket: ServerConnection) -> bool:
    """Called by the error path; detects the environment anew each time, with what that imports."""
    from incident.environment import get_current_environment

    if get_current_environment() == "staging":
        from incident.cloud_run import seconds_since
        from incident.state_machine import MAX_SECONDS

        return seconds_since(0) < MAX_SECONDS and websocket.state is State.OPEN
    return websocket.state is State.OPEN


def describe(state: str) -> str:
    return f"state machine to {state}"
