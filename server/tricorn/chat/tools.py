"""How the end of a tool is shown to people."""

from __future__ import annotations

from tricorn.chat.protocol import Outcome
from tricorn.errors.chain import is_any
from tricorn.errors.failures import leaves

TOOL_NAME_MAX = 128  # characters
TOOL_ERROR_MAX = 500  # characters of a ToolError's text that people are shown

TOOL_FAILED = "the tool failed"
TOOL_LEFT_OPEN = "not finished"
TOOL_ENDED = {"cancelled": "cancelled", "timeout": "timed out", "interrupted": "interrupted"}


class ToolError(Exception):
    """Raise this inside a tool to have its text shown to people as the tool's error."""


def shown(
    error: BaseException, cancelled: type[BaseException], ending: Outcome | None, limit: int = TOOL_ERROR_MAX
) -> str:
    """Return what people may see of the exception that ended a tool, in about `limit` characters.

    If it is nothing but `cancelled`, they see why the run is ending, if it is.
    """
    errors = [leaf for leaf in leaves(error) if not is_any(leaf, (cancelled,))]
    if not errors:
        return TOOL_ENDED[ending or "cancelled"]
    if not all(is_any(leaf, (ToolError,)) for leaf in errors):
        return TOOL_FAILED
    text = "; ".join([_text(leaf) for leaf in errors])
    if len(text) > limit:
        text = text[:limit] + "…"
    return text or TOOL_FAILED


def _text(error: BaseException) -> str:
    try:
        return str(error).encode(errors="replace").decode()
    except Exception:  # of a subclass that cannot be shown
        return TOOL_FAILED
