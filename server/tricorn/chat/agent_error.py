"""What an agent's failure says to people."""

from __future__ import annotations

from collections.abc import Sequence

from tricorn.errors.chain import is_any

ERROR_MAX = 500  # characters of an error that people are shown


class AgentError(Exception):
    """Raise this in an agent to have its text shown to people as the reason why the run failed.

    Of other exceptions, people see only the id of the report.
    """


def for_people(errors: Sequence[BaseException], limit: int = ERROR_MAX) -> str | None:
    """Return the text of some errors, in about `limit` characters, if all of them are meant for people and have one."""
    if not errors or not all(is_any(error, (AgentError,)) for error in errors):
        return None
    text = "; ".join(filter(None, map(_text, errors)))
    return text[:limit] + "…" if len(text) > limit else text or None


def _text(error: BaseException) -> str | None:
    try:
        return str(error).encode(errors="replace").decode()
    except Exception:  # of a subclass that cannot be shown
        return None
