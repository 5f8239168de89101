"""The page of metrics, and what is documented of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest

from tricorn import metrics
from tricorn.chat import close_codes, protocol
from tricorn.chat import metrics as chat_metrics
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.settings import ChatSettings
from tricorn.metrics import Metrics, ProcessMetrics, ServerMetrics
from tricorn.protocol import close
from tricorn.service.metrics_page import metrics_page, of_this_process
from tricorn.service.workers import WorkerMetrics

OPERATIONS = Path(__file__).parents[3].joinpath("docs/operations.md").read_text()


def test_the_labels_are_those_of_the_protocol_and_of_the_settings() -> None:
    counted = ChatMetrics()
    assert tuple(counted.run_seconds.buckets) == get_args(protocol.Outcome)
    assert set(counted.appended.values) == {each.__struct_config__.tag for each in get_args(protocol.AnyEvent)}
    limits = {*metrics.LIMITS, *chat_metrics.LIMITS}
    assert limits <= {field.name for field in dataclasses.fields(ChatSettings)}
    assert {1000, 1006, 1013, 4003} <= close.KNOWN
    assert {4002, 4503} <= close_codes.KNOWN


def all_sets() -> list[Metrics]:
    return [ServerMetrics(), ChatMetrics(), ProcessMetrics(), WorkerMetrics()]


async def shown(method: str = "GET", path: str = "/metrics", sets: list[Metrics] | None = None) -> tuple[int, str]:
    sent: list[dict] = []

    async def send(event: dict) -> None:
        sent.append(event)

    sets = sets or all_sets()
    app = metrics_page(sets, of_this_process(sets))
    await app({"type": "http", "method": method, "path": path}, None, send)  # type: ignore[arg-type]
    return sent[0]["status"], sent[1]["body"].decode()


@pytest.mark.parametrize(
    ("method", "path", "status"), [("HEAD", "/metrics", 200), ("POST", "/metrics", 405), ("GET", "/", 404)]
)
async def test_it_answers_get_and_head_of_one_path(method: str, path: str, status: int) -> None:
    assert (await shown(method, path))[0] == status


async def test_two_sets_with_one_metric_are_shown_as_one() -> None:
    server, chat = ServerMetrics(), ChatMetrics()
    server.limit_hits.add("max_connections")
    chat.limit_hits.add("outbox", 2)
    _, body = await shown(sets=[server, chat])
    assert body.count("# TYPE tricorn_limit_hits_total") == 1
    assert 'tricorn_limit_hits_total{limit="max_connections"} 1.0\n' in body
    assert 'tricorn_limit_hits_total{limit="outbox"} 2.0\n' in body


async def test_what_is_shown_of_a_histogram_is_cumulative() -> None:
    """With a label and without."""
    server, chat = ServerMetrics(), ChatMetrics()
    chat.run_seconds.buckets = {"success": [2, 1, 0, 0, 0, 0, 0, 0, 1]}
    chat.run_seconds.sums = {"success": 400.5}
    server.teardown_seconds.buckets = {"": [1, 0, 0, 0, 0, 0, 0, 0, 1]}
    _, body = await shown(sets=[server, chat])
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
        name: getattr(ChatSettings(), name) for name in {*metrics.LIMITS, *chat_metrics.LIMITS}
    }
