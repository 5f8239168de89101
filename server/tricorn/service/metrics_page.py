"""`/metrics`, in Prometheus's text format, as an ASGI 3.0 application for HTTP.

Whoever gets there may read it, so it is served on an address of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from math import inf
from os import getpid
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tricorn.connection import WebSocket
from tricorn.metrics import METRICS, Counter, Gauge, Histogram, Numbers, numbers
from tricorn.service.pages import TEXT, Event, Receive, Send, respond

if TYPE_CHECKING:
    from tricorn.listening.http import ASGIApp

Scrape = Callable[[], Awaitable[tuple[Numbers, Mapping[str, int]]]]


class _Counted(Collector):
    """Turns what was counted into what `prometheus_client` writes."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = {**numbers.grown, **numbers.current}

    def collect(self) -> Iterator[Metric]:
        for metric in METRICS:
            labels = [metric.label] if metric.label else []
            if isinstance(metric, Histogram):
                yield self._histogram(metric, labels)
            else:
                yield self._family(metric, labels)

    def _family(self, counter: Counter, labels: list[str]) -> Metric:
        kind = GaugeMetricFamily if isinstance(counter, Gauge) else CounterMetricFamily
        family = kind(f"tricorn_{counter.name}", counter.text, labels=labels)
        for value, [number] in self._numbers[counter.name].items():
            family.add_metric([value] if labels else [], number)
        return family

    def _histogram(self, histogram: Histogram, labels: list[str]) -> Metric:
        family = HistogramMetricFamily(f"tricorn_{histogram.name}", histogram.text, labels=labels)
        names = ["+Inf" if bound == inf else str(bound) for bound in histogram.bounds]
        for value, [*buckets, size] in self._numbers[histogram.name].items():
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


async def this_process() -> tuple[Numbers, Mapping[str, int]]:
    """What there is to show where there is one process. Not a checkpoint."""
    return numbers(), {"": getpid()}


def application(scrape: Scrape) -> ASGIApp:
    """An app that shows what `scrape` gives: what was counted, and the ids of the processes that did so."""

    async def app(scope: Event, receive: Receive, send: Send) -> None:
        """Answer GET and HEAD of `/metrics`."""
        method = scope["method"]
        if scope["path"] != "/metrics":
            await respond(send, method, 404, TEXT, b"not found")
        elif method not in ("GET", "HEAD"):
            await respond(send, method, 405, TEXT, b"method not allowed", [(b"allow", b"GET, HEAD")])
        else:
            counted, pids = await scrape()
            registry = CollectorRegistry()
            registry.register(_Counted(counted))
            registry.register(_Processes(pids))
            await respond(send, method, 200, CONTENT_TYPE_PLAIN_0_0_4.encode(), generate_latest(registry))

    return app


app = application(this_process)


async def no_websocket(ws: WebSocket) -> None:
    """The handler beside `app`: there is nothing to hear."""
