"""Which posts may go into the log after some were refused."""

from __future__ import annotations

import trio
import trio.testing

from tricorn.chat.post_order import KEPT_FREE, PostOrder


async def test_a_refused_post_comes_before_those_that_follow_it_in_its_conversation() -> None:
    order = PostOrder()
    order.refuse("c", "1")
    order.refuse("c", "2")
    assert order.must_wait("c", "2")
    assert order.must_wait("c", "3")
    assert not order.must_wait("c", "1")
    assert not order.must_wait("other", "3")
    order.refuse("c", "1")  # again: it keeps its place
    assert order.must_wait("c", "2")
    order.settle("c", "1")
    assert not order.must_wait("c", "2")
    assert order.must_wait("c", "3")
    order.settle("c", "2")
    assert not order.must_wait("c", "3")


async def test_a_refused_post_that_does_not_come_again_holds_up_the_others_for_a_while_only(
    autojump_clock: trio.testing.MockClock,
) -> None:
    order = PostOrder()
    order.refuse("c", "1")
    await trio.sleep(KEPT_FREE / 2)
    order.refuse("c", "2")
    await trio.sleep(KEPT_FREE / 2)
    assert not order.must_wait("c", "2")
    assert order.must_wait("c", "3")
    await trio.sleep(KEPT_FREE / 2)
    assert not order.must_wait("c", "3")
