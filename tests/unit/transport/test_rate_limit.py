"""How fast something may come."""

from __future__ import annotations

from math import inf

import pytest
from trio.testing import MockClock

from tricorn.transport.rate_limit import BURST, LOT, RateLimit, TokenBucket


async def test_a_bucket_is_full_at_first_and_fills_up_evenly(mock_clock: MockClock) -> None:
    bucket = TokenBucket(6, 60)
    assert [bucket.take() for _ in range(6)] == [0] * 6
    assert bucket.take() == pytest.approx(10)
    mock_clock.jump(4)
    assert bucket.take() == pytest.approx(6)
    mock_clock.jump(6.001)
    assert bucket.take() == 0
    assert bucket.take() > 9
    mock_clock.jump(1000)
    assert [bucket.take() for _ in range(6)] == [0] * 6
    assert bucket.take() > 0


async def test_several_are_taken_at_once_or_none(mock_clock: MockClock) -> None:
    bucket = TokenBucket(6, 60)
    assert bucket.take(4) == 0
    assert bucket.take(3) == pytest.approx(10)
    assert bucket.take(2) == 0


async def test_a_pace_allows_a_burst_and_then_as_much_as_comes_evenly(mock_clock: MockClock) -> None:
    pace = RateLimit(100, inf)
    assert pace.passed(int(100 * BURST), 0) is None
    for _ in range(500):
        mock_clock.jump(0.1)
        assert pace.passed(9, 0) is None
    assert pace.passed(500 + int(100 * LOT), 0) == "messages_per_second"


async def test_messages_and_bytes_are_counted_apart(mock_clock: MockClock) -> None:
    assert RateLimit(inf, 100).passed(10**9, 0) is None
    assert RateLimit(inf, 100).passed(0, 1001) == "bytes_per_second"
    assert RateLimit(100, inf).passed(0, 10**12) is None
    assert RateLimit(100, inf).passed(1001, 0) == "messages_per_second"


async def test_what_comes_in_small_pieces_is_counted_all_the_same(mock_clock: MockClock) -> None:
    pace = RateLimit(inf, 1000)
    passed = [pace.passed(0, 1) for _ in range(20_000)]
    assert passed.index("bytes_per_second") == pytest.approx(1000 * BURST, rel=0.01)


async def test_a_slow_pace_is_kept_too(mock_clock: MockClock) -> None:
    pace = RateLimit(1, inf)
    assert [pace.passed(1, 0) for _ in range(10)] == [None] * 10
    assert pace.passed(1, 0) == "messages_per_second"
