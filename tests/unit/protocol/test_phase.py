from __future__ import annotations

from itertools import product

import pytest

from tricorn.protocol.phase import MOVES, IllegalMove, Phase, move

LEGAL = [
    (Phase.CONNECTING, Phase.ACCEPTED),
    (Phase.CONNECTING, Phase.CLOSED),
    (Phase.ACCEPTED, Phase.OPEN),
    (Phase.ACCEPTED, Phase.CLOSING),
    (Phase.OPEN, Phase.CLOSING),
    (Phase.CLOSING, Phase.CLOSED),
]
ILLEGAL = [pair for pair in product(Phase, Phase) if pair not in LEGAL]


@pytest.mark.parametrize(("current", "to"), LEGAL)
def test_a_legal_move_returns_the_new_phase(current: Phase, to: Phase) -> None:
    assert move(current, to) is to


@pytest.mark.parametrize(("current", "to"), ILLEGAL)
def test_an_illegal_move_raises_and_names_both_phases(current: Phase, to: Phase) -> None:
    with pytest.raises(IllegalMove, match=f"^a connection cannot go from {current.value} to {to.value}$"):
        move(current, to)


def test_every_phase_has_its_moves() -> None:
    assert set(MOVES) == set(Phase)


@pytest.mark.parametrize("start", Phase)
def test_every_life_ends_closed(start: Phase) -> None:
    """No path comes back to a phase, and the only one without a way on is CLOSED."""
    paths = [[start]]
    while paths:
        path = paths.pop()
        assert len(set(path)) == len(path)
        assert MOVES[path[-1]] or path[-1] is Phase.CLOSED
        paths += [[*path, to] for to in MOVES[path[-1]]]
