"""Counters for operators; docs/operations.md says what each number is good for.

These are plain numbers and not `prometheus_client`'s own, which take a lock: counting must be possible on the error
path. All counting happens in Trio's thread. Nothing is counted for each message: a connection knows how many it had,
and is asked when somebody wants to know.

Each server and each chat has a set of its own. The values of labels are few and known beforehand: never a user, a
conversation or anything else that a peer can choose.
"""

from __future__ import annotations

from bisect import bisect_left
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Protocol

from trio.lowlevel import current_statistics

from tricorn.errors.report import counted
from tricorn.protocol.close import KNOWN
from tricorn.protocol.phase import Phase

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

Family = dict[str, list[float]]  # by a label's value: a number, or those of a histogram's buckets and then its sum

OTHER = "other"
CODES_MAX = 100  # close codes that are counted by themselves


class Counter:
    """A number that grows, or one for each value of a label."""

    def __init__(self, name: str, text: str, label: str = "", known: Iterable[str] = ("",)) -> None:
        self.name = name
        self.text = text
        self.label = label
        self.values = dict.fromkeys(known, 0.0)

    def add(self, value: str = "", amount: float = 1) -> None:
        """Count `amount` for a value of the label. An unknown value counts as `other`."""
        try:
            self.values[value] += amount
        except KeyError:
            self.values[OTHER] += amount

    def family(self) -> Family:
        return {value: [number] for value, number in self.values.items()}


class Gauge(Counter):
    """A number that grows and shrinks."""


class Histogram:
    """How many were how large, for each value of a label.

    Attributes:
        bounds: of the buckets, each included in the bucket below it; the last is infinity.
        buckets: for each value of the label, how many are in each bucket and in none before it.
        sums: for each value of the label, how large all of them are together.
    """

    def __init__(
        self, name: str, text: str, bounds: tuple[float, ...], label: str = "", known: Iterable[str] = ("",)
    ) -> None:
        self.name = name
        self.text = text
        self.label = label
        self.bounds = bounds
        self.sums = dict.fromkeys(known, 0.0)
        self.buckets = {value: [0] * len(bounds) for value in self.sums}

    def observe(self, size: float, value: str = "") -> None:
        """Count something of this size for a value of the label."""
        self.sums[value] += size
        self.buckets[value][bisect_left(self.bounds, size)] += 1

    def family(self) -> Family:
        return {value: [*buckets, self.sums[value]] for value, buckets in self.buckets.items()}


class Numbers(NamedTuple):
    """All that one process has counted, or several have."""

    grown: dict[str, Family]  # by the metric's name: numbers that only grow, which are counters and histograms
    current: dict[str, Family]  # gauges


NOTHING = Numbers({}, {})


class Metrics:
    """A set of counters: the attributes of an instance."""

    def metrics(self) -> tuple[Counter | Histogram, ...]:
        """Return the counters of the set, in the order in which they were made."""
        return tuple(value for value in vars(self).values() if isinstance(value, Counter | Histogram))

    def numbers(self) -> Numbers:
        """Return the numbers as they are now."""
        found = Numbers({}, {})
        for metric in self.metrics():
            families = found.current if isinstance(metric, Gauge) else found.grown
            families[metric.name] = metric.family()
        return found


def total(parts: Iterable[Numbers]) -> Numbers:
    """Return the sum of the numbers of several sets or processes."""
    grown, current = zip(*parts, strict=True)
    return Numbers(_add(grown), _add(current))


def _add(parts: Iterable[dict[str, Family]]) -> dict[str, Family]:
    sums: dict[str, Family] = {}
    for families in parts:
        for name, family in families.items():
            into = sums.setdefault(name, {})
            for value, each in family.items():
                into[value] = [*map(sum, zip(into[value], each, strict=True))] if value in into else each
    return sums


class Totals(NamedTuple):
    """The traffic of a connection, or of several."""

    messages_received: int = 0
    messages_sent: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0


def _sum(parts: Iterable[Totals]) -> Totals:
    return Totals(*map(sum, zip(*parts, strict=True)))


class Counted(Protocol):
    """A connection, as far as it is counted."""

    @property
    def phase(self) -> Phase: ...

    def totals(self) -> Totals: ...


PHASES = tuple(phase.value for phase in Phase if phase is not Phase.CLOSED)
DIRECTIONS = ("received", "sent")
LIMITS = (  # by the names of their settings
    "max_connections",
    "peer_connections",
    "max_handshakes",
    "max_head_bytes",
    "max_message_bytes",
    "messages_per_second",
    "bytes_per_second",
)


class ServerMetrics(Metrics):
    """The counters of one server.

    `connections` are those that are open: a collection that the server keeps up to date.
    """

    def __init__(self, connections: Collection[Counted] = ()) -> None:
        self.connections = Gauge(
            "connections", "WebSockets, and sockets in their handshake, by phase.", "phase", PHASES
        )
        self.opened = Counter("connections_opened", "WebSockets that were opened.")
        self.closed = Counter(
            "connections_closed",
            "WebSockets that were closed, by the code of the first cause.",
            "code",
            (*map(str, sorted(KNOWN)), OTHER),
        )
        self.teardown_seconds = Histogram(
            "teardown_seconds",
            "Seconds from the cause of a WebSocket's end to its closed socket.",
            (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, inf),
        )
        self.messages = Counter("messages", "WebSocket messages.", "direction", DIRECTIONS)
        self.bytes = Counter("bytes", "Bytes of WebSockets after their handshakes.", "direction", DIRECTIONS)
        self.send_stalls = Counter("send_stalls", "Sends that had to wait for a peer that does not keep up.")
        self.limit_hits = Counter("limit_hits", "Times that a limit was met, by its setting.", "limit", LIMITS)
        self.connecting = 0  # sockets in their handshake
        self._open = connections
        self._over = Totals()  # of connections that have been closed

    def know_code(self, code: int) -> None:
        """Count a close code of the program's own by itself, not as `other`."""
        if len(self.closed.values) < CODES_MAX:
            self.closed.values.setdefault(str(code), 0.0)

    def count_end(self, connection: Counted, code: int, seconds: float) -> None:
        """Count the end of a connection, whose phase is CLOSED by now. `seconds` is what its teardown took."""
        self.closed.add(str(code))
        self.teardown_seconds.observe(seconds)
        self._over = _sum((self._over, connection.totals()))

    def numbers(self) -> Numbers:
        phases = dict.fromkeys(PHASES, 0.0) | {Phase.CONNECTING.value: self.connecting}
        parts = [self._over]
        for connection in self._open:
            if connection.phase is not Phase.CLOSED:
                phases[connection.phase.value] += 1
                parts.append(connection.totals())
        traffic = _sum(parts)
        self.connections.values = phases
        self.messages.values = dict(zip(DIRECTIONS, (traffic.messages_received, traffic.messages_sent), strict=True))
        self.bytes.values = dict(zip(DIRECTIONS, (traffic.bytes_received, traffic.bytes_sent), strict=True))
        return super().numbers()


class ProcessMetrics(Metrics):
    """The counters of the process, which all servers in it share."""

    def __init__(self) -> None:
        self.tasks = Gauge("tasks", "Trio's tasks that are alive.")
        self.errors = Counter("errors_reported", "Errors that were reported.")
        self.dropped = Counter("records_dropped", "Records that stderr did not take.")
        self.late_imports = Counter("late_imports", "Modules that were imported after start-up.")

    def numbers(self) -> Numbers:
        """Return the numbers as they are now. To be called in a task."""
        self.tasks.values = {"": current_statistics().tasks_living}
        self.errors.values = {"": counted["errors"]}
        self.dropped.values = {"": counted["records_dropped"]}
        self.late_imports.values = {"": counted["late_imports"]}
        return super().numbers()
