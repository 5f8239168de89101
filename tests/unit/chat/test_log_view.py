"""What a conversation's transcript does with a log that waits for nothing."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tricorn.chat.conversation.log_view import LogView
from tricorn.chat.logs.conformance import post
from tricorn.chat.logs.memory import MemoryLog


def transcript(log: MemoryLog) -> LogView:
    return LogView("c", log, 1.0, lambda: None)


class Waiting(MemoryLog):
    immediate = False


async def test_without_waiting_an_event_is_there_at_once_also_behind_those_of_others() -> None:
    log = MemoryLog()
    one, other = transcript(log), transcript(log)
    await one.open()
    await other.open()
    with trio.testing.assert_no_checkpoints():
        assert one.append_nowait(post())[0].seq == one.head == 1
    entry, _ = other.append_nowait(post())
    assert (entry.seq, other.head, other.is_behind) == (2, 0, True)
    with pytest.raises(trio.WouldBlock):
        other.append_nowait(post())
    await other.catch_up()
    assert other.head == 2
    one.append_nowait(post())
    await other.append(post())
    assert (other.head, other.is_behind) == (4, False)
    assert [entry.seq for entry in await other.read(0, 10)] == [1, 2, 3, 4]


async def test_where_something_is_to_be_waited_for_nothing_is_done() -> None:
    for log in (Waiting(), MemoryLog()):
        one = transcript(log)
        if log.immediate:
            one.doubt()
        else:
            await one.open()
        with pytest.raises(trio.WouldBlock):
            one.append_nowait(post())
        assert not await log.read("c", 0, 1)
