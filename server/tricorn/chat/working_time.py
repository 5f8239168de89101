"""Deadlines of a run that stand still while it waits for a person."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

from trio import CancelScope, current_time


class WorkingTime:
    """The time in which a run works: not that in which it waits for an answer, whatever its other tasks do then."""

    def __init__(self) -> None:
        self._limited: dict[CancelScope, float] = {}  # while the time stands still: the seconds that are left
        self._waits = 0

    @contextmanager
    def limit(self, scope: CancelScope) -> Iterator[CancelScope]:
        """Enter a scope whose deadline stands still with the time."""
        with scope:
            self.watch(scope)
            try:
                yield scope
            finally:
                self.forget(scope)

    def watch(self, scope: CancelScope) -> None:
        """Have the deadline of a scope stand still with the time, until `forget`."""
        self._limited[scope] = inf
        if self._waits:
            self._stop(scope)

    def forget(self, scope: CancelScope) -> None:
        del self._limited[scope]

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Stop the time for the length of a block; several blocks may overlap."""
        self._waits += 1
        if self._waits == 1:
            for scope in self._limited:
                self._stop(scope)
        try:
            yield
        finally:
            self._waits -= 1
            if not self._waits:
                for scope, left in self._limited.items():
                    scope.deadline = current_time() + left

    def _stop(self, scope: CancelScope) -> None:
        self._limited[scope] = scope.deadline - current_time()
        scope.deadline = inf
