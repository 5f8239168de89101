"""What ends a task, taken apart: what must go on, and what has failed.

An exception group is never split: an application's `derive` would be called, and could raise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio import Cancelled

from tricorn.errors.chain import is_any, is_group, members

if TYPE_CHECKING:
    from collections.abc import Iterator

_set_context = BaseException.__dict__["__context__"].__set__  # whatever a subclass says

# Trio's own, and the signal. Everything else fails what raised it: SystemExit, GeneratorExit and another library's
# cancellation too, which must not end the server.
PASSING = (Cancelled, KeyboardInterrupt)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in a group, in order, however deep; or the exception itself."""
    pending = [error]
    while pending:
        each = pending.pop()
        if is_group(each):
            pending += reversed(members(each))
        else:
            yield each


def passing(error: BaseException) -> BaseException | None:
    """Return what of an exception has to be raised again where failures end, or None."""
    found = [leaf for leaf in leaves(error) if is_any(leaf, PASSING)]
    if not found:
        return None
    return found[0] if len(found) == 1 else BaseExceptionGroup("", found)


def forget_contexts(ending: BaseException) -> None:
    """Clear the contexts in an exception that is raised again, once they are reported, so that it hides no errors."""
    for leaf in leaves(ending):
        _set_context(leaf, None)
