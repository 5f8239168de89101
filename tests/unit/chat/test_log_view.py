"""What a view of a log does if the log waits for nothing."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tricorn.chat.conversation.log_view import LogView
from tricorn.chat.logs.base import Append
from tricorn.chat.logs.conformance import post
from tricorn.chat.logs.memory import MemoryLog
from tricorn.chat.metrics import ChatMetrics


def view(log: MemoryLog) -> LogView:
    return LogView("c", log, 1.0, ChatMetrics())


class Waiting(MemoryLog):
    immediate = False


async def test_without_waiting_an_event_is_there_at_once_also_behind_those_of_others() -> None:
    log = MemoryLog()
    one, other = view(log), view(log)
    await one.open()
    await other.open()
    with trio.testing.assert_no_checkpoints():
        assert one.append_nowait(Append(post()))[0].seq == one.head == 1
    entry, _ = other.append_nowait(Append(post()))
    assert (entry.seq, other.head, other.behind) == (2, 0, True)
    with pytest.raises(trio.WouldBlock):
        other.append_nowait(Append(post()))
    await other.catch_up()
    assert other.head == 2
    one.append_nowait(Append(post()))
    await other.append(Append(post()))
    assert (other.head, other.behind) == (4, False)
    assert [entry.seq for entry in await other.read(0, 10)] == [1, 2, 3, 4]


async def test_where_something_is_to_be_waited_for_nothing_is_done() -> None:
    for log in (Waiting(), MemoryLog()):
        one = view(log)
        if log.immediate:
            one.doubt()
        else:
            await one.open()
        with pytest.raises(trio.WouldBlock):
            one.append_nowait(Append(post()))
        assert not await log.read("c", 0, 1)
