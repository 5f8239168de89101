"""The errors that lead to an error, and which of them was the first that nobody handled: rules E8 and E9.

An exception's attributes are read as Python itself reads them, so properties of a subclass that lie or raise do not
count. Nothing here calls an exception, and nothing raises unless memory or stack run out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio import Cancelled

from tricorn.errors.bound import binder
from tricorn.errors.interrupted import takes_over
from tricorn.request import Refuse

if TYPE_CHECKING:
    from types import FrameType


class Interruption(Exception):
    """Base class of our exceptions that end a task and are nobody's fault, such as `Disconnected`.

    An interruption, like a cancellation, is never the headline if there is an error below it.
    """


# What ends a task and is no error itself; Refuse answers a request.
ENDINGS = (Cancelled, KeyboardInterrupt, GeneratorExit, Interruption, Refuse)

cause_of = BaseException.__dict__["__cause__"].__get__
_context = BaseException.__dict__["__context__"].__get__
_suppresses = BaseException.__dict__["__suppress_context__"].__get__
traceback_of = BaseException.__dict__["__traceback__"].__get__
_members = BaseExceptionGroup.__dict__["exceptions"].__get__
_bases = type.__dict__["__mro__"].__get__  # `isinstance` would ask the exception for its class

LOOKED_AT = 100  # of the errors that one statement or interruption may have handled
ERROR, HANDLED, ENDING, CANCELLED, GROUP = range(5)  # the first of the least of these is the headline

_bound = binder(_names := dict(globals()))


@_bound
def is_any(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Return whether an exception is of one of the kinds. Its own `__class__` is not asked."""
    return any(base is kind for base in _bases(type(error)) for kind in kinds)


@_bound
def is_group(error: BaseException) -> bool:
    return is_any(error, (BaseExceptionGroup,))


@_bound
def members(error: BaseException) -> tuple[BaseException, ...]:
    """Return the exceptions in a group, or an empty tuple if this is not a group."""
    return _members(error) if is_group(error) else ()


@_bound
def _caught_in(error: BaseException) -> FrameType | None:
    place = traceback_of(error)
    return None if place is None else place.tb_frame


@_bound
def _passed(error: BaseException) -> dict[FrameType, int]:
    """Return the frames that an exception went through, each with the offset where it was, the innermost last."""
    found: dict[FrameType, int] = {}
    place = traceback_of(error)
    while place is not None:
        found.pop(place.tb_frame, None)
        found[place.tb_frame] = place.tb_lasti
        place = place.tb_next
    return found


@_bound
def context_of(error: BaseException) -> BaseException | None:
    """Return what was being handled when an exception was raised.

    A cancellation that found its task handling nothing has as context what the task that cancelled was handling. That
    does not count.
    """
    context: BaseException | None = _context(error)
    if context is not None and type(error) is Cancelled and _caught_in(context) not in _passed(error):
        return None
    return context


@_bound
def leads_to(error: BaseException) -> list[BaseException]:
    """Return what directly led to an exception, the earliest first: its context, its cause, its members."""
    context, cause = context_of(error), cause_of(error)
    found = [] if context is None or context is cause else [context]
    if cause is not None:
        found.append(cause)
    found += members(error)
    return found


@_bound
def in_order(error: BaseException) -> list[BaseException]:
    """Return all that led to an exception, each once and before what it led to; last the exception itself."""
    order: list[BaseException] = []
    seen: set[int] = set()
    pending: list[tuple[BaseException, bool]] = [(error, False)]
    while pending:
        each, is_next = pending.pop()
        if is_next:
            order.append(each)
        elif id(each) not in seen:
            seen.add(id(each))
            pending.append((each, True))
            pending += [(earlier, False) for earlier in leads_to(each)[::-1]]
    return order


@_bound
def _suppressed(error: BaseException) -> list[BaseException]:
    """Return what the author of `raise … from` declares as handled: what the function with that statement caught.

    Its callers may be handling errors as well, of which it cannot know. Python hides these too.
    """
    earlier = _context(error)
    if not _suppresses(error) or earlier is None or earlier is cause_of(error):
        return []
    here, caught = next(reversed(_passed(error)), None), _caught_in(earlier)
    found = [earlier] if here is None or caught is None else []  # then there is only the author's word
    while caught is not None and caught is here and len(found) < LOOKED_AT:
        found.append(earlier)
        earlier = _context(earlier)
        caught = None if earlier is None else _caught_in(earlier)
    return found


@_bound
def _taken_over(ending: BaseException) -> list[BaseException]:
    """Return the errors that were being handled on purpose when an ending interrupted the handling."""
    earlier = context_of(ending)
    if earlier is None:
        return []
    passed = _passed(ending)
    found: list[BaseException] = []
    is_handled = False
    while earlier is not None and len(found) < LOOKED_AT:
        caught = traceback_of(earlier)
        interrupted = None if caught is None else passed.get(caught.tb_frame)
        if interrupted is not None:  # else what it led to was caught instead
            is_handled = takes_over(caught.tb_frame.f_code, caught.tb_lasti, interrupted)
        if not is_handled:
            break
        found.append(earlier)
        earlier = context_of(earlier)
    return found


@_bound
def weigh(order: list[BaseException]) -> list[int]:
    """Return for each of the exceptions what it counts as: ERROR, HANDLED, ENDING, CANCELLED or GROUP."""
    handled: set[int] = set()
    kinds: list[int] = []
    for each in order:
        handled.update([id(earlier) for earlier in _suppressed(each)])
        if not is_any(each, ENDINGS):
            kinds.append(GROUP if is_group(each) else ERROR)
        else:
            kinds.append(CANCELLED if type(each) is Cancelled else ENDING)
            handled.update([id(earlier) for earlier in _taken_over(each)])
    return [HANDLED if kind == ERROR and id(each) in handled else kind for each, kind in zip(order, kinds, strict=True)]


@_bound
def first_of(order: list[BaseException]) -> BaseException:
    """Return the headline: the first error that was not handled, else the first of what comes closest to one."""
    kinds = weigh(order)
    return order[kinds.index(min(kinds))]


@_bound
def hides_an_error(ending: BaseException) -> bool:
    """Return whether there is an unhandled error below something that ends a task. Cheap if nothing is below it.

    An exception that is an error itself hides nothing.
    """
    pending = [ending]
    is_alone = True
    for each in pending:  # which grows meanwhile
        if is_group(each):
            pending += members(each)
        elif not is_any(each, ENDINGS):
            return False
        is_alone = is_alone and _context(each) is None and cause_of(each) is None
    return not is_alone and ERROR in weigh(in_order(ending))
