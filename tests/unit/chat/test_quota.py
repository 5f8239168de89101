"""What one user may have at a time."""

from __future__ import annotations

import gc

from trio.testing import MockClock

from tricorn.chat.quota import MINUTE, Quotas
from tricorn.chat.settings import ChatSettings as Settings


async def test_a_user_has_one_and_its_connections_are_counted() -> None:
    allowances = Quotas(Settings(user_connections=2), per_user=True)
    ann = allowances.enter("ann")
    assert ann is not None
    assert allowances.enter("ann") is ann
    assert allowances.enter("bob") is not ann
    assert allowances.enter("ann") is None
    assert ann.connections == 2
    allowances.leave(ann)
    assert allowances.enter("ann") is ann


async def test_it_is_kept_for_a_minute_and_then_forgotten(mock_clock: MockClock) -> None:
    """So that coming back does not fill a bucket, and those who are gone cost no memory."""
    allowances = Quotas(Settings(posts_per_minute=1), per_user=True)
    ann = allowances.enter("ann")
    assert ann is not None
    assert ann.posts.take() == 0
    allowances.leave(ann)
    del ann
    gc.collect()
    mock_clock.jump(MINUTE - 1)
    again = allowances.enter("ann")
    assert again is not None
    assert again.posts.take() > 0
    allowances.leave(again)
    del again
    mock_clock.jump(MINUTE)
    allowances.enter("bob")
    gc.collect()
    assert list(allowances._by_user) == []


async def test_a_run_keeps_it(mock_clock: MockClock) -> None:
    allowances = Quotas(Settings(), per_user=True)
    ann = allowances.enter("ann")
    assert ann is not None
    ann.runs += 1
    counted = {1: ann}
    allowances.leave(ann)
    del ann
    mock_clock.jump(2 * MINUTE)
    allowances.enter("bob")
    again = allowances.enter("ann")
    assert again is not None
    assert again.runs == 1
    counted.pop(1).runs -= 1
    assert again.runs == 0


async def test_where_nobody_says_who_they_are_each_connection_has_its_own() -> None:
    allowances = Quotas(Settings(user_connections=1), per_user=False)
    first, second = allowances.enter("local"), allowances.enter("local")
    assert first is not second
    assert None not in (first, second)
