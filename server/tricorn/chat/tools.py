"""How the end of a tool is shown to people."""

from __future__ import annotations

from tricorn.chat.agent_error import ERROR_MAX, AgentError, for_people
from tricorn.chat.protocol import Outcome
from tricorn.errors.chain import is_any
from tricorn.errors.failures import leaves

TOOL_NAME_MAX = 128  # characters

TOOL_FAILED = "the tool failed"
TOOL_LEFT_OPEN = "not finished"
TOOL_ENDED = {"cancelled": "cancelled", "abandoned": "abandoned", "timeout": "timed out", "interrupted": "interrupted"}


class NotAnswered(AgentError):
    """Nobody has answered the question of a run in time. People are shown the text."""


class ToolError(AgentError):
    """Raise this inside a tool to have its text shown to people as the tool's error."""


def shown(error: BaseException, cancelled: type[BaseException], ending: Outcome | None, limit: int = ERROR_MAX) -> str:
    """Return what people may see of the exception that ended a tool, in about `limit` characters.

    If it is nothing but `cancelled`, they see why the run is ending, if it is.
    """
    errors = [leaf for leaf in leaves(error) if not is_any(leaf, (cancelled,))]
    if not errors:
        return TOOL_ENDED[ending or "cancelled"]
    return for_people(errors, limit) or TOOL_FAILED
