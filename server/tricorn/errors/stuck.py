"""Where tasks wait that do not end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trio.lowlevel import Task

TASKS_MAX = 20
LOOPS = ("/trio/", "/asyncio/")
OURS = str(Path(__file__).parents[1])
_INNER = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))


def stuck(root: Task) -> list[str]:
    """Return where a task and all below it wait, the innermost first; at most `TASKS_MAX` of them.

    Tasks that wait in the program's own code are named; ours only if there are no others.
    """
    tasks = [root]
    for task in tasks:  # which grows meanwhile
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    places = [(task.name, place(task.coro)) for task in reversed(tasks)]
    theirs = [each for each in places if each[1] and not each[1].startswith(OURS)]
    return [f"{name}: {where}" for name, where in (theirs or places)[:TASKS_MAX]]


def place(coroutine: object) -> str:
    """Return file, line and function of a coroutine's innermost frame that is not a loop's; empty if it has none."""
    found = ""
    awaited: Any = coroutine
    while awaited is not None:
        frame, inner = None, None
        for frame_name, inner_name in _INNER:
            frame = frame or getattr(awaited, frame_name, None)
            inner = inner or getattr(awaited, inner_name, None)
        if frame is not None and not any(each in frame.f_code.co_filename for each in LOOPS):
            found = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        awaited = inner
    return found
