"""What a benchmark has found, as Markdown."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.report import BEGIN, END, Results, number, write_readme


@pytest.fixture
def results(tmp_path: Path) -> Results:
    results = Results(tmp_path / "results.json")
    results.begin("echo")
    for server, values in {"tricorn": (10, 12, 11), "c-epoll": (5, 5.5, 6)}.items():
        for value in values:
            busy = {"server busy %": 80.0, "load busy %": 99.0 if server == "c-epoll" else 50.0}
            results.add("echo", "100 × 64 B", server, {"µs CPU": value, **busy})
    return results


def test_a_cell_is_median_minimum_maximum_and_ratio(results: Results) -> None:
    assert "| tricorn | 11.0 (10.0–12.0) |\n| c-epoll | 5.50 (5.00–6.00) 0.50× |" in results.table()


def test_a_server_that_the_load_kept_waiting_is_named(results: Results) -> None:
    assert "may have waited for it: c-epoll, 100 × 64 B\n" in results.table()


def test_a_server_that_failed_once_has_a_sentence_and_no_figures(results: Results) -> None:
    results.note("echo", "100 × 64 B", "c-epoll", "closes a connection")
    assert "| c-epoll |" not in results.table()
    assert "- c-epoll: closes a connection\n" in results.table()


def test_a_sentence_says_who_is_ahead_and_by_how_much(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    results.begin("echo")
    found = {
        "ahead": {"tricorn": 10, "tricorn-hypercorn": 1, "aiohttp": 25, "node-ws": 15, "c-epoll": 1},
        "behind": {"tricorn": 10, "aiohttp": 6, "node-ws": 4},
        "again": {"tricorn": 10, "aiohttp": 5},
        "level": {"tricorn": 10, "node-ws": 10.4},
        "alone": {"tricorn": 10},
    }
    for case, servers in found.items():
        for server, value in servers.items():
            results.add("echo", case, server, {"µs CPU": value})
    assert results.verdict("echo") == (
        "tricorn is ahead in “ahead” (node-ws takes 1.50 of it); node-ws is ahead in “behind” (0.40 of tricorn); "
        "aiohttp is ahead in “again” (0.50 of tricorn); nobody is ahead in “level” (node-ws takes 1.04 of tricorn)."
    )
    assert f"\n\n{results.verdict('echo')}\n" in results.table()
    assert f"- echo: {results.verdict('echo')}\n" in results.readme()


def test_the_chat_is_compared_with_the_asyncio_version(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    results.begin("chat")
    for server, value in {"tricorn-serve": 8, "tricorn-serve-sqlite": 80, "asyncio-version-uvloop": 4}.items():
        results.add("chat", "burst", server, {"µs CPU": value})
    assert results.verdict("chat") == "asyncio-version-uvloop is ahead in “burst” (0.50 of tricorn-serve)."
    assert "| tricorn-serve-sqlite | 80.0 10.00× |" in results.table()


def test_who_ends_faster_because_it_tells_nobody_is_not_ahead(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    results.begin("teardown")
    for server, seconds, told in (("tricorn", 1.0, 100), ("aiohttp", 2.0, 100), ("node-ws", 0.1, 0)):
        results.add("teardown", "SIGTERM", server, {"s": seconds, "told %": told})
    assert results.verdict("teardown") == "tricorn is ahead in “SIGTERM” (aiohttp takes 2.00 of it)."


def test_a_suite_that_does_not_run_again_stays(results: Results, tmp_path: Path) -> None:
    results.save()
    later = Results(tmp_path / "results.json")
    later.begin("growth")
    later.save()
    assert set(Results(tmp_path / "results.json").suites) == {"echo", "growth"}
    assert "## echo" in (tmp_path / "results.md").read_text()


def test_the_readme_has_it_in_its_place_and_nowhere_else(results: Results, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}old\n{END}after\n")
    write_readme(results.readme(), readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}")
    assert text.endswith(f"{END}after\n")
    assert "old" not in text
    assert "| c-epoll | 5.50 0.50× |\n" in text
    readme.write_text("no place\n")
    with pytest.raises(ValueError, match="no place"):
        write_readme(results.readme(), readme)


def test_numbers_have_three_digits_or_more() -> None:
    assert [number(value) for value in (0.123, 1.234, 12.34, 123.4, 12345.6)] == [
        "0.12",
        "1.23",
        "12.3",
        "123",
        "12,346",
    ]
