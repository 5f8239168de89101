"""The memory log: what every log promises."""

from __future__ import annotations

import json

import pytest
import trio
import trio.testing

from tricorn.chat.log.memory import MemoryLog
from tricorn.chat.protocol import AgentThinking, ToolExecuting, UserMessage


def message(text: str) -> UserMessage:
    return UserMessage(conversation="c", seq=0, at=0.0, id="p", text=text)


async def test_a_new_conversation_is_empty_and_keeps_its_epoch() -> None:
    log = MemoryLog()
    epoch, head = await log.open("c")
    assert head == 0
    assert await log.open("c") == (epoch, 0)
    other, _ = await log.open("d")
    assert other != epoch
    assert await log.read("c", 0, 10) == []


async def test_the_log_sets_seq_and_time_and_encodes() -> None:
    log = MemoryLog()
    first, repeated = await log.append("c", message("one"))
    second, _ = await log.append("c", message("two"))
    assert (first.seq, repeated, second.seq) == (1, False, 2)
    event = json.loads(second.json)
    assert event.pop("at") > 1_700_000_000
    assert event == {"type": "user_message", "conversation": "c", "seq": 2, "id": "p", "text": "two"}
    assert (await log.open("c"))[1] == 2


async def test_a_repeated_key_gets_the_first_entry_again() -> None:
    log = MemoryLog()
    first, _ = await log.append("c", message("one"), "k")
    assert await log.append("c", message("other"), "k") == (first, True)
    assert (await log.append("d", message("one"), "k"))[1] is False  # keys are a conversation's own
    assert await log.read("c", 0, 10) == [first]


async def test_read_gives_what_follows_up_to_the_limit() -> None:
    log = MemoryLog()
    entries = [(await log.append("c", message(str(n))))[0] for n in range(5)]
    assert await log.read("c", 0, 10) == entries
    assert await log.read("c", 2, 2) == entries[2:4]
    assert await log.read("c", 5, 10) == []


async def test_what_is_handed_out_is_the_callers() -> None:
    log = MemoryLog()
    await log.append("c", message("one"))
    (await log.read("c", 0, 10)).clear()
    assert len(await log.read("c", 0, 10)) == 1


async def test_every_method_is_a_checkpoint() -> None:
    log = MemoryLog()
    with trio.testing.assert_checkpoints():
        await log.open("c")
    with trio.testing.assert_checkpoints():
        await log.append("c", message("one"))
    with trio.testing.assert_checkpoints():
        await log.read("c", 0, 1)


async def test_a_cancelled_append_did_nothing() -> None:
    log = MemoryLog()
    with trio.CancelScope() as scope:
        scope.cancel()
        await log.append("c", message("one"), "k")
    assert await log.open("c") == (await log.open("c"))
    assert (await log.append("c", message("one"), "k"))[1] is False


async def test_what_is_not_json_is_refused_and_leaves_no_gap() -> None:
    log = MemoryLog()
    stamp = {"conversation": "c", "seq": 0, "at": 0.0, "run": "r"}
    with pytest.raises(TypeError):
        await log.append("c", ToolExecuting(**stamp, call="1", tool="t", arguments={"x": object()}), "k")
    with pytest.raises(UnicodeEncodeError):
        await log.append("c", AgentThinking(**stamp, text="\ud800"))
    assert (await log.append("c", message("one"), "k"))[0].seq == 1
