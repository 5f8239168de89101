"""The dashboard asks for what there is, in PromQL that parses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import VectorSelector

from tricorn.chat.metrics import ChatMetrics
from tricorn.metrics import Metrics, ProcessMetrics, ServerMetrics
from tricorn.service.metrics_page import metrics_page, of_this_process
from tricorn.service.workers import WorkerMetrics

DASHBOARD = json.loads(Path(__file__).parents[3].joinpath("docs/grafana.json").read_text())
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"]}
QUERIES = [target["expr"] for panel in PANELS.values() for target in panel["targets"]]
ADDED = {"job", "worker"}  # labels that Prometheus adds, and the supervisor of several workers


def parse(query: str) -> promql_parser.Expr:
    """What Grafana makes of a query."""
    return promql_parser.parse(query.replace("$__rate_interval", "1m").replace("$job", "tricorn"))


def nodes(node: object) -> Iterator[object]:
    """A part of a query and all that is in it."""
    yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "args"):
        inner = getattr(node, name, None)
        for each in inner if isinstance(inner, list) else [inner]:
            if each is not None:
                yield from nodes(each)


@pytest.fixture
async def samples() -> dict[str, set[str]]:
    """The labels of every sample that there is, by its name."""
    sent: list[dict] = []

    async def send(event: dict) -> None:
        sent.append(event)

    sets: list[Metrics] = [ServerMetrics(), ChatMetrics(), ProcessMetrics(), WorkerMetrics()]
    app = metrics_page(sets, of_this_process(sets))
    await app({"type": "http", "method": "GET", "path": "/metrics"}, None, send)  # type: ignore[arg-type]
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(sent[1]["body"].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def selectors(query: str) -> list[VectorSelector]:
    return [node for node in nodes(parse(query)) if isinstance(node, VectorSelector)]


@pytest.mark.parametrize("query", QUERIES)
async def test_a_query_asks_for_what_there_is(query: str, samples: dict[str, set[str]]) -> None:
    asked = selectors(query)
    assert asked
    for selector in asked:
        assert selector.name in samples
        assert [matcher.name for matcher in selector.matchers.matchers] == ["job"]
    known = ADDED.union(*(samples[selector.name] for selector in asked))
    for labels in re.findall(r"by \((.*?)\)", query):
        assert set(labels.split(", ")) <= known


@pytest.mark.parametrize("title", PANELS)
def test_a_legend_shows_the_labels_that_a_query_keeps(title: str) -> None:
    for target in PANELS[title]["targets"]:
        kept = set(re.findall(r"by \((?!le\))(.*?)\)", target["expr"]))
        assert set(re.findall(r"{{(.*?)}}", target["legendFormat"])) == kept


async def test_every_metric_of_ours_is_shown(samples: dict[str, set[str]]) -> None:
    asked = {selector.name for query in QUERIES for selector in selectors(query)}
    families = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in samples if name.startswith("tricorn_")}
    assert families == {re.sub(r"_(bucket|count)$", "", name) for name in asked if name.startswith("tricorn_")}


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    cells: list[tuple[int, int]] = []
    for place in (panel["gridPos"] for panel in PANELS.values()):
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells += product(columns, rows)
    assert len(set(cells)) == len(cells)
    assert len({panel["id"] for panel in PANELS.values()}) == len(PANELS) == len(DASHBOARD["panels"])


def test_a_query_that_is_wrong_would_be_noticed() -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        parse("sum by (code (rate(tricorn_connections_closed_total[1m]))")
    with pytest.raises(ValueError, match="expected type matrix"):
        parse("rate(tricorn_tasks)")
