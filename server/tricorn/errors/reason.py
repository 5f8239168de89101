"""Why something failed, in a few words for people."""

from __future__ import annotations


def innermost(error: BaseException) -> BaseException:
    """Return the error at the bottom of groups and causes; of several in a group, the first."""
    while cause := error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__:
        error = cause
    return error


def reason(error: BaseException) -> str:
    """Say in one line what went wrong: what the operating system says, else the innermost error's text or type."""
    error = innermost(error)
    text: str = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0].rstrip()
    return text or type(error).__name__
