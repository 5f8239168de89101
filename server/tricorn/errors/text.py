"""Values and errors as text: bounded, safe to print, and whatever the code of the value or error does.

A stack trace shows each error of a chain with a traceback of its own, as Python does: the first error first. Each has a
guaranteed share of the room, and what some do not need goes to the others.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from traceback import extract_tb
from typing import TYPE_CHECKING, cast

from trio import Cancelled

from tricorn.errors.bound import binder
from tricorn.errors.chain import cause_of, is_group, leads_to, members, traceback_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TEXT_MAX = 4_000  # characters of a message, and of each text that comes with it
ERRORS_SHOWN = 24  # of a chain: the first half of them and the last
PLACES_SHOWN = 100  # lines of a traceback: of a longer one the outermost third and the innermost rest
OUTLINE_PLACES = 20  # the innermost lines of each traceback in an outline
NOT_SHOWN = "<cannot be shown>"

HEADER = "Traceback (most recent call last):\n"
CAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n\n"
GROUP_OF_ONE = "\nThe above exception is in the following group:\n\n"
GROUP = "\nThe above exceptions are in the following group:\n\n"
APART = "\nAnother exception, not caused by the above:\n\n"
BUILTIN = ("builtins", "__main__")  # modules that are not shown

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_name_of = cast("Callable[[type], str]", type.__dict__["__name__"].__get__)  # whatever a metaclass says
_qualname_of = cast("Callable[[type], str]", type.__dict__["__qualname__"].__get__)
_module_of = cast("Callable[[type], object]", type.__dict__["__module__"].__get__)

_add_note = BaseException.add_note

_bound = binder(_names := dict(globals()))


@_bound
def clean(text: str, limit: int) -> str:
    """Cut a text to `limit` characters, and escape those that a terminal obeys or UTF-8 lacks."""
    if len(text) > limit:
        left_out = f"\n[{len(text) - limit} characters left out]\n"
        text = text[: limit // 2] + left_out + text[len(text) - limit // 2 :]
    if text.isprintable():
        return text  # nothing in it to escape
    return str.translate(text, _ESCAPES).encode(errors="backslashreplace").decode()


@_bound
def shown(value: object, show: Callable[[object], str], limit: int = TEXT_MAX) -> str:
    try:
        return clean("".join((show(value),)), limit)  # joined, it is a str and of no subclass
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: ASYNC103 - nothing here waits, so no Cancelled of Trio's passes
        return NOT_SHOWN  # noqa: ASYNC104


@_bound
def title(error: BaseException) -> str:
    """Return the type and the text of an error, or the type alone."""
    text = shown(error, str)
    name = _name_of(type(error))
    return f"{name}: {text}" if text else name


@_bound
def note(error: BaseException, text: str) -> None:
    """Add a note to an error, if the error lets it. Raises nothing."""
    with suppress(Exception):
        _add_note(error, text)


@_bound
def _full_name(error: BaseException) -> str:
    kind = type(error)
    module = _module_of(kind)
    return _qualname_of(kind) if type(module) is not str or module in BUILTIN else f"{module}.{_qualname_of(kind)}"


@_bound
def _notes(error: object) -> str:
    notes = getattr(error, "__notes__", ())
    return "".join([f"{note}\n" for note in notes]) if type(notes) is list else f"{notes!r}\n" if notes else ""


@_bound
def _places(error: BaseException) -> str:
    """Return the innermost places of a traceback without their source, which takes little and cannot fail."""
    places = deque((traceback_of(error),), OUTLINE_PLACES)
    while places[-1] is not None:
        places.append(places[-1].tb_next)
    lines = [HEADER]
    for place in places:
        if place is not None:
            code = place.tb_frame.f_code
            lines.append(f'  File "{code.co_filename}", line {place.tb_lineno}, in {code.co_name}\n')
    return "".join(lines) if len(lines) > 1 else ""


@_bound
def _lines(error: BaseException) -> str:
    """Return a traceback with its source."""
    first = rest = traceback_of(error)
    if first is None:
        return ""
    count = 0
    while rest is not None:
        rest = rest.tb_next
        count += 1
    if count <= PLACES_SHOWN:
        return HEADER + "".join(extract_tb(first).format())
    outermost = PLACES_SHOWN // 3
    rest = first
    for _ in range(count - PLACES_SHOWN + outermost):
        rest = None if rest is None else rest.tb_next
    left_out = f"  [{count - PLACES_SHOWN} calls left out]\n"
    return HEADER + "".join([*extract_tb(first, outermost).format(), left_out, *extract_tb(rest).format()])


@_bound
def _section(error: BaseException, room: int) -> str:
    """Return an error with its traceback: of both the beginning and the end."""
    text = shown(error, str)
    try:
        name = _full_name(error)
    except Exception:
        name = _name_of(type(error))
    try:
        lines = _lines(error)
    except Exception:  # of a module's own loader, for example
        lines = _places(error)
    headline = f"{name}: {text}" if text else name
    last = clean(f"{headline}\n{shown(error, _notes)}", max(room // 2, room - len(lines)))
    return clean(lines, max(room - len(last), 0)) + last


@_bound
def _intro(error: BaseException, before: BaseException | None, so_far: set[int]) -> str:
    """Return the sentence between what is shown before an error and the error."""
    if before is None:
        return ""
    if is_group(error) and any(id(each) in so_far for each in members(error)):
        return GROUP if len(members(error)) > 1 else GROUP_OF_ONE
    if cause_of(error) is before:
        return CAUSE
    return CONTEXT if any(id(each) in so_far for each in leads_to(error)) else APART


@_bound
def _without_cancellations(order: Sequence[BaseException]) -> Sequence[BaseException]:
    """Leave out the cancellations in groups, and the groups that have nothing else, unless that is all."""
    left_out: set[int] = set()
    for each in order:
        if is_group(each):
            left_out.update([id(one) for one in members(each) if type(one) is Cancelled and not leads_to(one)])
            if all(id(one) in left_out for one in leads_to(each)):
                left_out.add(id(each))
    return [each for each in order if id(each) not in left_out] or order


@_bound
def _fair(sizes: Sequence[int], room: int) -> int:
    """Return the size to which the larger ones are cut, so that all together have room."""
    ordered = sorted(sizes)
    for number, size in enumerate(ordered):
        share = room // (len(ordered) - number)
        if size > share:
            return share
        room -= size
    return ordered[-1]


@_bound
def stack_trace(order: Sequence[BaseException], room: int) -> str:
    """Return all that led to an error, and the error, as text of about `room` characters.

    order: as `in_order` returns it.
    """
    errors = _without_cancellations(order)
    half = ERRORS_SHOWN // 2
    left_out = len(errors) - ERRORS_SHOWN
    before = None
    so_far: set[int] = set()
    sections: list[tuple[str, str, BaseException]] = []
    for each in errors if left_out <= 0 else (*errors[:half], *errors[-half:]):
        intro = _intro(each, before, so_far)
        if left_out > 0 and len(sections) == half:
            intro = f"\n[{left_out} exceptions left out]\n\n"
        sections.append((intro, _section(each, room), each))
        before = each
        so_far.add(id(each))
    share = _fair([len(section) for _, section, _ in sections], room - sum([len(intro) for intro, _, _ in sections]))
    return "".join(
        [intro + (section if len(section) <= share else _section(each, share)) for intro, section, each in sections]
    )


@_bound
def outline(order: Sequence[BaseException]) -> str:
    """Return a stack trace of types and places only, which takes little memory and does not call the exceptions."""
    errors = _without_cancellations(order)
    half = ERRORS_SHOWN // 2
    if len(errors) > ERRORS_SHOWN:
        errors = (*errors[:half], *errors[-half:])
    return "\n".join([f"{_places(each)}{_name_of(type(each))}\n" for each in errors])
