"""`/metrics`, in Prometheus's text format, as an ASGI 3.0 application for HTTP.

Whoever gets there may read it, so it is served on an address of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tricorn.connection import WebSocket
from tricorn.metrics import CONNECTIONS, COUNTERS, RUN_SECONDS, Counter, Gauge, Histogram
from tricorn.report import counted
from tricorn.web.pages import TEXT, Event, Receive, Send, respond


class _Counted(Collector):
    """Turns what was counted into what `prometheus_client` writes."""

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("tricorn_connections", "WebSockets that are open.", len(CONNECTIONS))
        yield from _traffic()
        yield CounterMetricFamily("tricorn_errors_reported", "Errors that were reported.", counted["errors"])
        yield CounterMetricFamily(
            "tricorn_records_dropped", "Records that stderr did not take.", counted["records_dropped"]
        )
        yield from map(_family, COUNTERS)
        yield _histogram(RUN_SECONDS)


def _traffic() -> Iterator[Metric]:
    traffic = CONNECTIONS.totals()
    messages = CounterMetricFamily("tricorn_messages", "WebSocket messages.", labels=["direction"])
    messages.add_metric(["received"], traffic.messages_received)
    messages.add_metric(["sent"], traffic.messages_sent)
    yield messages
    sizes = CounterMetricFamily("tricorn_bytes", "Bytes of WebSockets, behind their handshakes.", labels=["direction"])
    sizes.add_metric(["received"], traffic.bytes_received)
    sizes.add_metric(["sent"], traffic.bytes_sent)
    yield sizes


def _family(counter: Counter) -> Metric:
    kind = GaugeMetricFamily if isinstance(counter, Gauge) else CounterMetricFamily
    family = kind(f"tricorn_{counter.name}", counter.text, labels=[counter.label] if counter.label else [])
    for value, number in counter.values.items():
        family.add_metric([value] if counter.label else [], number)
    return family


def _histogram(histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(f"tricorn_{histogram.name}", histogram.text, labels=[histogram.label])
    for value, buckets in histogram.buckets.items():
        named = [
            ("+Inf" if bound == inf else str(bound), count)
            for bound, count in zip(histogram.bounds, buckets, strict=True)
        ]
        family.add_metric([value], named, histogram.sums[value])
    return family


_registry = CollectorRegistry()
_registry.register(_Counted())
ProcessCollector(registry=_registry)  # processor time, memory, open descriptors


async def app(scope: Event, receive: Receive, send: Send) -> None:
    """Answer GET and HEAD of `/metrics`. Waits only in `send`."""
    method = scope["method"]
    if scope["path"] != "/metrics":
        await respond(send, method, 404, TEXT, b"not found")
    elif method not in ("GET", "HEAD"):
        await respond(send, method, 405, TEXT, b"method not allowed", [(b"allow", b"GET, HEAD")])
    else:
        await respond(send, method, 200, CONTENT_TYPE_PLAIN_0_0_4.encode(), generate_latest(_registry))


async def no_websocket(ws: WebSocket) -> None:
    """The handler beside `app`: there is nothing to hear."""
