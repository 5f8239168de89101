"""How fast something may come."""

from __future__ import annotations

from math import inf

import pytest
from trio.testing import MockClock

from tricorn.metrics import ServerMetrics
from tricorn.protocol.close import Close
from tricorn.settings import Settings
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


def limit(messages: float = inf, size: float = inf) -> RateLimit:
    return RateLimit(Settings(messages_per_second=messages, bytes_per_second=size), ServerMetrics())


TOO_MANY_MESSAGES = Close(4003, "more than 100 messages per second")


async def test_a_pace_allows_a_burst_and_then_as_much_as_comes_evenly(mock_clock: MockClock) -> None:
    pace = limit(100)
    assert pace.exceeded(int(100 * BURST), 0) is None
    for _ in range(500):
        mock_clock.jump(0.1)
        assert pace.exceeded(9, 0) is None
    assert pace.exceeded(500 + int(100 * LOT), 0) == TOO_MANY_MESSAGES


async def test_messages_and_bytes_are_counted_apart(mock_clock: MockClock) -> None:
    assert limit(size=100).exceeded(10**9, 0) is None
    assert limit(size=100).exceeded(0, 1001) == Close(4003, "more than 100 bytes per second")
    assert limit(100).exceeded(0, 10**12) is None
    assert limit(100).exceeded(1001, 0) == TOO_MANY_MESSAGES


async def test_what_comes_in_small_pieces_is_counted_all_the_same(mock_clock: MockClock) -> None:
    pace = limit(size=1000)
    passed = [pace.exceeded(0, 1) for _ in range(20_000)]
    assert passed.index(Close(4003, "more than 1,000 bytes per second")) == pytest.approx(1000 * BURST, rel=0.01)


async def test_a_slow_pace_is_kept_too(mock_clock: MockClock) -> None:
    pace = limit(1)
    assert [pace.exceeded(1, 0) for _ in range(10)] == [None] * 10
    assert pace.exceeded(1, 0) == Close(4003, "more than 1 messages per second")


async def test_what_is_too_much_is_counted(mock_clock: MockClock) -> None:
    metrics = ServerMetrics()
    both = RateLimit(Settings(messages_per_second=1, bytes_per_second=1), metrics)
    both.exceeded(0, 11)
    both.exceeded(11, 0)
    hits = metrics.limit_hits.values
    assert {name: number for name, number in hits.items() if number} == {
        "messages_per_second": 1,
        "bytes_per_second": 1,
    }
