"""What reading a log backwards makes of entries that are unusual."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tricorn.chat.history import read_history
from tricorn.chat.logs.base import Entry, Unavailable


class Written:
    """A log with these events, of which the last is the start of the run that asks."""

    def __init__(self, *events: dict[str, Any], first: int = 1) -> None:
        defaults = {"conversation": "c", "at": 0.0, "id": "p", "user": "ann", "seconds": 0.0, "agent": "a", "post": "p"}
        self.first = first
        stamped = [{"type": "", "seq": seq, **defaults, **event} for seq, event in enumerate(events, 1)]
        self.entries = [Entry(each["seq"], json.dumps(each, separators=(",", ":")).encode()) for each in stamped]
        self.read_seqs: list[int] = []

    async def find(self, key: str) -> Entry | None:
        return self.entries[-1] if key == "start" else None

    async def read(self, after: int, limit: int) -> list[Entry]:
        found = [each for each in self.entries if each.seq > max(after, self.first - 1)][:limit]
        self.read_seqs += [each.seq for each in found]
        return found


def post(text: str) -> dict[str, Any]:
    return {"type": "user_message", "text": text}


def started(run: str, post_seq: int) -> dict[str, Any]:
    return {"type": "agent_started", "run": run, "post_seq": post_seq}


def message(run: str, text: str) -> dict[str, Any]:
    return {"type": "agent_message", "run": run, "text": text}


def completed(run: str, **fields: Any) -> dict[str, Any]:
    return {"type": "agent_completed", "run": run, "outcome": "success", **fields}


async def texts(log: Written, turns: int = 10, characters: int = 1000) -> list[tuple[str, str]]:
    return [(turn.text, turn.answer) for turn in await read_history(log, "start", turns, characters)]


async def test_events_of_another_run_between_those_of_a_run_are_not_its_own() -> None:
    log = Written(
        post("one"),
        started("r", 1),
        message("r", "a"),
        started("child", 1),
        message("child", "x"),
        completed("child"),
        message("r", "b"),
        completed("r"),
        post("two"),
        started("now", 9),
    )
    assert await texts(log) == [("one", "ab")]


async def test_events_of_a_later_version_are_skipped() -> None:
    later = {"type": "agent_dancing", "run": "r", "text": "tango", "arguments": {"steps": 3}}
    log = Written(post("one"), {"type": "titled"}, started("r", 1), later, completed("r"), started("now", 1))
    assert await texts(log) == [("one", "")]


async def test_posts_that_came_long_before_their_runs_are_read_one_by_one() -> None:
    posts = [post(str(number)) for number in range(300)]
    runs = [event for number in (1, 2, 3) for event in (started(f"r{number}", number), completed(f"r{number}"))]
    log = Written(*posts, *runs, started("now", 4))
    assert await texts(log, turns=3) == [("0", ""), ("1", ""), ("2", "")]
    assert len(log.read_seqs) < 140
    log.first = 3
    assert await texts(log, turns=3) == [("2", "")], "the log has forgotten the posts of the others"


async def test_a_run_whose_start_the_log_has_forgotten_is_no_turn() -> None:
    log = Written(post("one"), started("r", 1), message("r", "a"), completed("r"), started("now", 1), first=3)
    assert await texts(log) == []


async def test_a_long_answer_that_does_not_fit_is_not_read_to_its_start() -> None:
    pieces = [message("long", "x" * 10) for _ in range(3000)]
    log = Written(
        post("one"), started("long", 1), *pieces, completed("long"), post("two"),
        started("r", 3004), message("r", "b"), completed("r"), started("now", 3004),
    )  # fmt: skip
    assert await texts(log, characters=100) == [("two", "b")]
    assert len(log.read_seqs) < 300


async def test_a_run_that_the_log_has_lost_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="the log has lost the start of this run"):
        await read_history(Written(post("one")), "another", 1, 1)
