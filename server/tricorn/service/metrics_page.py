"""`/metrics`, in Prometheus's text format, as an ASGI 3.0 application for HTTP.

Whoever gets there may read it, so it is served on an address of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import inf
from os import getpid
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tricorn.metrics import Counter, Gauge, Histogram, Metrics, Numbers, total
from tricorn.service.pages import TEXT, Receive, Scope, Send, respond

if TYPE_CHECKING:
    from tricorn.listening.http import ASGIApp
    from tricorn.websocket import WebSocket

Scrape = Callable[[], Awaitable[tuple[Numbers, Mapping[str, int]]]]


class _Counted(Collector):
    """Turns what was counted into what `prometheus_client` writes."""

    def __init__(self, metrics: Iterable[Counter | Histogram], numbers: Numbers) -> None:
        self._metrics = metrics
        self._numbers = {**numbers.grown, **numbers.current}

    def collect(self) -> Iterator[Metric]:
        for metric in {metric.name: metric for metric in self._metrics}.values():  # two sets may have one in common
            labels = [metric.label] if metric.label else []
            if isinstance(metric, Histogram):
                yield self._histogram(metric, labels)
            else:
                yield self._family(metric, labels)

    def _family(self, counter: Counter, labels: list[str]) -> Metric:
        kind = GaugeMetricFamily if isinstance(counter, Gauge) else CounterMetricFamily
        family = kind(f"tricorn_{counter.name}", counter.text, labels=labels)
        for value, [number] in self._numbers.get(counter.name, {}).items():
            family.add_metric([value] if labels else [], number)
        return family

    def _histogram(self, histogram: Histogram, labels: list[str]) -> Metric:
        family = HistogramMetricFamily(f"tricorn_{histogram.name}", histogram.text, labels=labels)
        names = ["+Inf" if bound == inf else str(bound) for bound in histogram.bounds]
        for value, [*buckets, size] in self._numbers.get(histogram.name, {}).items():
            family.add_metric([value] if labels else [], list(zip(names, accumulate(buckets), strict=True)), size)
        return family


class _Processes(Collector):
    """Processor time, memory and open descriptors, with several processes by `worker`."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for worker, pid in self._pids.items():
            for family in ProcessCollector(pid=partial(str, pid), registry=None).collect():
                labels = {"worker": worker} if len(self._pids) > 1 else {}
                family.samples = [sample._replace(labels=labels) for sample in family.samples]
                if family.name in families:
                    families[family.name].samples += family.samples
                else:
                    families[family.name] = family
        yield from families.values()


def of_this_process(counted: Sequence[Metrics]) -> Scrape:
    """Make a scrape of what this process has counted, if no other serves."""

    async def scrape() -> tuple[Numbers, Mapping[str, int]]:
        return total([each.numbers() for each in counted]), {"": getpid()}

    return scrape


def metrics_page(described: Sequence[Metrics], scrape: Scrape) -> ASGIApp:
    """Make the app.

    Args:
        described: the sets of metrics to show. Those of the same name in several sets are shown once.
        scrape: returns what was counted, of all sets together, and the ids of the processes that did so.
    """
    metrics = {metric.name: metric for each in described for metric in each.metrics()}.values()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """Answer GET and HEAD of `/metrics`."""
        method = scope["method"]
        if scope["path"] != "/metrics":
            await respond(send, method, 404, TEXT, b"not found")
        elif method not in ("GET", "HEAD"):
            await respond(send, method, 405, TEXT, b"method not allowed", [(b"allow", b"GET, HEAD")])
        else:
            counted, pids = await scrape()
            registry = CollectorRegistry()
            registry.register(_Counted(metrics, counted))
            registry.register(_Processes(pids))
            await respond(send, method, 200, CONTENT_TYPE_PLAIN_0_0_4.encode(), generate_latest(registry))

    return app


async def no_websocket(ws: WebSocket) -> None:
    """Be the handler beside the page: there is nothing to hear."""
