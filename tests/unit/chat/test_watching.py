"""Who hears of what other instances do."""

from __future__ import annotations

from tricorn.chat.logs.watching import Watchers


def test_a_watcher_is_told_until_it_is_unwatched() -> None:
    told: list[tuple[int, str]] = []
    watchers = Watchers()
    watchers.watch("c", lambda head, cancelled: told.append((head, cancelled)))
    watchers.tell("c", 1, "")
    watchers.tell("d", 2, "")
    watchers.tell("c", 3, "run")
    assert watchers.unwatch("c")
    watchers.tell("c", 4, "")
    assert not watchers.unwatch("c")
    assert told == [(1, ""), (3, "run")]


def test_the_highest_seq_of_what_is_watched_is_known() -> None:
    watchers = Watchers()
    watchers.saw("c", 9)
    watchers.watch("c", lambda head, cancelled: None)
    assert watchers.known == {"c": 0}
    for seq in (3, 5, 4):
        watchers.saw("c", seq)
    watchers.saw("d", 6)
    assert watchers.known == {"c": 5}
    watchers.unwatch("c")
    assert watchers.known == {}
