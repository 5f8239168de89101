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
