"""The phases of a connection and the moves between them. Sans-I/O."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Where a connection is in its life."""

    CONNECTING = "connecting"  # the socket is there, the request head is being read
    ACCEPTED = "accepted"  # the 101 response went out, the handler has not run yet
    OPEN = "open"
    CLOSING = "closing"  # a cause was recorded: the nursery ends, close frames go both ways
    CLOSED = "closed"


MOVES: dict[Phase, frozenset[Phase]] = {
    Phase.CONNECTING: frozenset({Phase.ACCEPTED, Phase.CLOSED}),
    Phase.ACCEPTED: frozenset({Phase.OPEN, Phase.CLOSING}),
    Phase.OPEN: frozenset({Phase.CLOSING}),
    Phase.CLOSING: frozenset({Phase.CLOSED}),
    Phase.CLOSED: frozenset(),
}


class IllegalMove(RuntimeError):
    """A connection was asked to go to a phase that does not follow the one it is in."""


def move(current: Phase, to: Phase) -> Phase:
    """Return `to` where it may follow `current`.

    Raises:
        IllegalMove: it may not; the text names both phases.
    """
    if to not in MOVES[current]:
        raise IllegalMove(f"a connection cannot go from {current.value} to {to.value}")
    return to
