"""The chat: people post, an agent works, and everybody who follows the conversation sees it as it happens."""

from tricorn.chat.agent_error import AgentError
from tricorn.chat.chat import Chat
from tricorn.chat.function_tools import FunctionTool, tool
from tricorn.chat.history import Asked, ToolCall, Turn
from tricorn.chat.model_tools import Tool
from tricorn.chat.protocol import SUBPROTOCOLS
from tricorn.chat.run import Agent, Run
from tricorn.chat.tools import NotAnswered, ToolError

__all__ = [
    "SUBPROTOCOLS",
    "Agent",
    "AgentError",
    "Asked",
    "Chat",
    "FunctionTool",
    "NotAnswered",
    "Run",
    "Tool",
    "ToolCall",
    "ToolError",
    "Turn",
    "tool",
]
