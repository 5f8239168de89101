"""What is counted: plain numbers whose labels nobody outside can choose."""

from __future__ import annotations

import dataclasses
import re
from math import inf
from pathlib import Path
from typing import get_args

import pytest

from tricorn import metrics
from tricorn.chat import close_codes, protocol
from tricorn.chat.settings import ChatSettings
from tricorn.metrics import NOTHING, Connections, Counter, Histogram, Numbers, Totals, total
from tricorn.protocol import close
from tricorn.protocol.phase import Phase
from tricorn.service.metrics_page import metrics_page, of_this_process
from tricorn.service.workers import WorkerMetrics

OPERATIONS = Path(__file__).parents[2].joinpath("docs/operations.md").read_text()


class Connection:
    def __init__(self) -> None:
        self.phase = Phase.OPEN
        self.messages = 0

    def totals(self) -> Totals:
        return Totals(self.messages, 0, 10 * self.messages, 0)


def test_what_is_not_known_counts_as_other() -> None:
    counter = Counter("closed", "", "code", ("1000", "other"))
    counter.add("1000")
    counter.add("3999")
    counter.add("4999", 2)
    assert counter.values == {"1000": 1, "other": 3}


def test_a_bucket_of_a_histogram_includes_its_bound() -> None:
    histogram = Histogram("seconds", "", (1.0, 2.0, inf), "outcome", ("success",))
    for seconds in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(seconds, "success")
    assert histogram.buckets == {"success": [2, 1, 1]}
    assert histogram.sums == {"success": 12.0}
    histogram.forget()
    assert histogram.family() == {"success": [0, 0, 0, 0.0]}


def test_connections_are_counted_in_the_phase_that_they_are_in() -> None:
    connections, one, other = Connections(), Connection(), Connection()
    connections.opened(one)
    connections.opened(other)
    other.phase = Phase.CLOSING
    with connections.connecting(), connections.connecting():
        assert connections.by_phase() == {"connecting": 2, "accepted": 0, "open": 1, "closing": 1}
    assert connections.by_phase()["connecting"] == 0


def test_traffic_never_shrinks_when_a_connection_ends() -> None:
    connections, first, second = Connections(), Connection(), Connection()
    connections.opened(first)
    connections.opened(second)
    first.messages, second.messages = 3, 4
    assert connections.totals() == (7, 0, 70, 0)
    connections.closed(first, 1000)
    assert len(connections) == 1
    second.messages = 5
    assert connections.totals() == (8, 0, 80, 0)


def test_of_several_processes_everything_is_summed_and_of_those_that_ended_what_only_grows() -> None:
    one = Numbers({"closed": {"1000": [1], "other": [2]}, "seconds": {"success": [1, 2, 2.5]}}, {"runs": {"": [3]}})
    other = Numbers({"closed": {"1000": [10], "other": [0]}, "seconds": {"success": [0, 1, 9.5]}}, {"runs": {"": [4]}})
    ended = Numbers(one.grown, {})
    assert total([NOTHING, one, other, ended]) == Numbers(
        {"closed": {"1000": [12], "other": [4]}, "seconds": {"success": [2, 5, 14.5]}}, {"runs": {"": [7]}}
    )


def test_the_labels_are_those_of_the_protocol_and_of_the_settings() -> None:
    assert get_args(protocol.Outcome) == metrics.OUTCOMES
    assert set(metrics.EVENTS) == {each.__struct_config__.tag for each in get_args(protocol.AnyEvent)}
    assert set(metrics.LIMITS) <= {field.name for field in dataclasses.fields(ChatSettings)}
    assert {1000, 1006, 1013, 4003} <= close.KNOWN
    assert set(map(str, close_codes.KNOWN)) <= metrics.CLOSED.values.keys()


async def shown(method: str = "GET", path: str = "/metrics") -> tuple[int, str]:
    sent: list[dict] = []

    async def send(event: dict) -> None:
        sent.append(event)

    sets = [metrics, WorkerMetrics()]
    app = metrics_page(sets, of_this_process(sets))
    await app({"type": "http", "method": method, "path": path}, None, send)  # type: ignore[arg-type]
    return sent[0]["status"], sent[1]["body"].decode()


@pytest.mark.parametrize(
    ("method", "path", "status"), [("HEAD", "/metrics", 200), ("POST", "/metrics", 405), ("GET", "/", 404)]
)
async def test_it_answers_get_and_head_of_one_path(method: str, path: str, status: int) -> None:
    assert (await shown(method, path))[0] == status


async def test_what_is_shown_of_a_histogram_is_cumulative(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a label and without."""
    monkeypatch.setattr(metrics.RUN_SECONDS, "buckets", {"success": [2, 1, 0, 0, 0, 0, 0, 0, 1]})
    monkeypatch.setattr(metrics.RUN_SECONDS, "sums", {"success": 400.5})
    monkeypatch.setattr(metrics.TEARDOWN_SECONDS, "buckets", {"": [1, 0, 0, 0, 0, 0, 0, 0, 1]})
    _, body = await shown()
    for line in (
        'run_seconds_bucket{le="0.1",outcome="success"} 2.0',
        'run_seconds_bucket{le="300.0",outcome="success"} 3.0',
        'run_seconds_bucket{le="+Inf",outcome="success"} 4.0',
        'run_seconds_count{outcome="success"} 4.0',
        'run_seconds_sum{outcome="success"} 400.5',
        'teardown_seconds_bucket{le="10.0"} 1.0',
        "teardown_seconds_count 2.0",
    ):
        assert f"tricorn_{line}\n" in body


async def test_every_metric_is_described_and_no_other() -> None:
    _, body = await shown()
    names = set(re.findall(r"^# TYPE (tricorn_\w+)", body, re.MULTILINE))
    assert set(re.findall(r"^\| `(tricorn_\w+)` \|", OPERATIONS, re.MULTILINE)) == names


def test_every_limit_is_described_with_its_default() -> None:
    limits = OPERATIONS.partition("## Limits\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+|inf) \|", limits, re.MULTILINE))
    assert {name: float(number.replace(",", "")) for name, number in rows.items()} == {
        name: getattr(ChatSettings(), name) for name in metrics.LIMITS
    }
