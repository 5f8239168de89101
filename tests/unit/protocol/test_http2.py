"""Counting the frames of HTTP/2, against the frames that `h2` makes."""

from __future__ import annotations

import h2.config
import h2.connection
import h2.events
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.protocol.http2 import REFUSAL, FrameCounter


def spoken(pings: int) -> bytes:
    """What a client says: the preface, its settings, and so many pings."""
    client = h2.connection.H2Connection(h2.config.H2Configuration())
    client.initiate_connection()
    for _ in range(pings):
        client.ping(bytes(8))
    said: bytes = client.data_to_send()
    return said


@given(pings=st.integers(0, 20), cuts=st.lists(st.integers(1, 60), min_size=1), limit=st.integers(1, 5))
def test_every_frame_is_counted_once_however_the_stream_is_cut(pings: int, cuts: list[int], limit: int) -> None:
    counter = FrameCounter()
    left = spoken(pings)
    counted, turn = 0, 0
    while left:
        data = left[: cuts[turn % len(cuts)]]
        turn += 1
        size, begun = counter.cut(data, limit)
        assert 0 < size <= len(data)
        assert begun <= limit
        assert size == len(data) or begun == limit
        counted += begun
        left = left[size:]
    assert counted == 1 + pings


@pytest.mark.parametrize("pings", [3, 500])
def test_the_cut_comes_before_the_frame_that_is_too_many(pings: int) -> None:
    said = spoken(pings)
    size, begun = FrameCounter().cut(said, 3)
    assert begun == 3
    assert said[size:] == said[len(said) - 17 * (pings - 2) :]


def test_the_refusal_says_that_http_1_1_is_required() -> None:
    client = h2.connection.H2Connection(h2.config.H2Configuration())
    client.initiate_connection()
    event = client.receive_data(REFUSAL)[-1]
    assert isinstance(event, h2.events.ConnectionTerminated)
    assert (event.error_code, event.last_stream_id) == (13, 0)
