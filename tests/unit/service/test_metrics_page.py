"""The page of metrics, and what is documented of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest

from tricorn import metrics
from tricorn.chat import close_codes, protocol
from tricorn.chat.settings import ChatSettings
from tricorn.protocol import close
from tricorn.service.metrics_page import metrics_page, of_this_process
from tricorn.service.workers import WorkerMetrics

OPERATIONS = Path(__file__).parents[3].joinpath("docs/operations.md").read_text()


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
