"""What one user may have at a time."""

from __future__ import annotations

import gc

from trio.testing import MockClock

from tricorn.chat.quota import MINUTE, Quotas
from tricorn.chat.settings import ChatSettings


async def test_a_user_has_one_and_its_connections_are_counted() -> None:
    quotas = Quotas(ChatSettings(user_connections=2), per_user=True)
    ann = quotas.enter("ann")
    assert ann is not None
    assert quotas.enter("ann") is ann
    assert quotas.enter("bob") is not ann
    assert quotas.enter("ann") is None
    assert ann.connections == 2
    quotas.leave(ann)
    assert quotas.enter("ann") is ann


async def test_it_is_kept_for_a_minute_and_then_forgotten(mock_clock: MockClock) -> None:
    """So that coming back does not fill a bucket, and those who are gone cost no memory."""
    quotas = Quotas(ChatSettings(posts_per_minute=1), per_user=True)
    ann = quotas.enter("ann")
    assert ann is not None
    assert ann.posts.take() == 0
    quotas.leave(ann)
    del ann
    gc.collect()
    mock_clock.jump(MINUTE - 1)
    again = quotas.enter("ann")
    assert again is not None
    assert again.posts.take() > 0
    quotas.leave(again)
    del again
    mock_clock.jump(MINUTE)
    quotas.enter("bob")
    gc.collect()
    assert list(quotas._by_user) == []


async def test_a_run_keeps_it(mock_clock: MockClock) -> None:
    quotas = Quotas(ChatSettings(), per_user=True)
    ann = quotas.enter("ann")
    assert ann is not None
    ann.runs += 1
    counted = {1: ann}
    quotas.leave(ann)
    del ann
    mock_clock.jump(2 * MINUTE)
    quotas.enter("bob")
    again = quotas.enter("ann")
    assert again is not None
    assert again.runs == 1
    counted.pop(1).runs -= 1
    assert again.runs == 0


async def test_where_nobody_says_who_they_are_each_connection_has_its_own() -> None:
    quotas = Quotas(ChatSettings(user_connections=1), per_user=False)
    first, second = quotas.enter("local"), quotas.enter("local")
    assert first is not second
    assert None not in (first, second)
