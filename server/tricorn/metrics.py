"""What is counted for operators; docs/operations.md says what each number is good for.

These are plain numbers and not `prometheus_client`'s own, which take a lock: counting must be possible on the error
path. All of it happens in Trio's thread. Nothing is counted for each message: connections know how many they had, and
are asked when somebody wants to know.

Values of labels are few and known beforehand: never a user, a conversation or anything else that a peer can choose.
"""

from __future__ import annotations

from bisect import bisect_left
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Protocol

from trio.lowlevel import current_statistics

from tricorn.errors.report import counted
from tricorn.protocol.close import KNOWN
from tricorn.protocol.phase import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Family = dict[str, list[float]]  # by a label's value: a number, or those of a histogram's buckets and then its sum

OTHER = "other"


class Counter:
    """A number that grows, or one for each value of a label."""

    def __init__(self, name: str, text: str, label: str = "", known: Iterable[str] = ("",)) -> None:
        self.name = name
        self.text = text
        self.label = label
        self.values = dict.fromkeys(known, 0.0)

    def add(self, value: str = "", amount: float = 1) -> None:
        """Count `amount` for a value of the label; one that is not known counts as `other`."""
        try:
            self.values[value] += amount
        except KeyError:
            self.values[OTHER] += amount

    def family(self) -> Family:
        return {value: [number] for value, number in self.values.items()}

    def forget(self) -> None:
        """Begin anew."""
        self.values = dict.fromkeys(self.values, 0.0)


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
        self.forget()

    def observe(self, size: float, value: str = "") -> None:
        """Count something of this size for a value of the label."""
        self.sums[value] += size
        self.buckets[value][bisect_left(self.bounds, size)] += 1

    def family(self) -> Family:
        return {value: [*buckets, self.sums[value]] for value, buckets in self.buckets.items()}

    def forget(self) -> None:
        """Begin anew."""
        self.buckets = {value: [0] * len(self.bounds) for value in self.sums}
        self.sums = dict.fromkeys(self.sums, 0.0)


class Totals(NamedTuple):
    """What went over a connection, or over all."""

    messages_received: int = 0
    messages_sent: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0


class Counted(Protocol):
    """A connection, as far as it is counted."""

    @property
    def phase(self) -> Phase: ...

    def totals(self) -> Totals: ...


class Connections:
    """The connections that are open, what went over those that no longer are, and how many are on their way in."""

    def __init__(self) -> None:
        self._connecting = 0
        self._open: set[Counted] = set()
        self._over = Totals()

    def __len__(self) -> int:
        return len(self._open)

    def forget(self) -> None:
        self._over = Totals()

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Count a socket until the end of the block, for as long as it has not said what it wants."""
        self._connecting += 1
        try:
            yield
        finally:
            self._connecting -= 1

    def opened(self, connection: Counted) -> None:
        OPENED.add()
        self._open.add(connection)

    def closed(self, connection: Counted, code: int) -> None:
        """Count the end of a connection, whose traffic is then no longer asked for."""
        CLOSED.add(str(code))
        self._open.discard(connection)
        self._over = _sum((self._over, connection.totals()))

    def by_phase(self) -> dict[str, float]:
        """How many there are now in each phase."""
        found = dict.fromkeys(PHASES, 0.0) | {Phase.CONNECTING.value: self._connecting}
        for connection in self._open:
            found[connection.phase.value] += 1
        return found

    def totals(self) -> Totals:
        """What went over all connections so far."""
        return _sum((self._over, *(connection.totals() for connection in self._open)))


def _sum(parts: Iterable[Totals]) -> Totals:
    return Totals(*map(sum, zip(*parts, strict=True)))


PHASES = tuple(phase.value for phase in Phase if phase is not Phase.CLOSED)
DIRECTIONS = ("received", "sent")
OUTCOMES = ("success", "failed", "cancelled", "timeout", "interrupted")
EVENTS = (
    "user_message",
    "agent_started",
    "agent_thinking",
    "tool_executing",
    "tool_completed",
    "agent_message",
    "agent_completed",
)
# By the names of their settings.
LIMITS = (
    "max_connections",
    "peer_connections",
    "max_handshakes",
    "max_head_bytes",
    "max_message_bytes",
    "messages_per_second",
    "bytes_per_second",
    "user_connections",
    "user_runs",
    "posts_per_minute",
    "waiting_posts",
    "outbox",
    "open_conversations",
    "text_characters",
    "event_bytes",
)

OF_THE_CHAT = {4002, 4004, 4500, 4501, 4503}  # close codes, until the chat names its own

OPENED = Counter("connections_opened", "WebSockets that were opened.")
CLOSED = Counter(
    "connections_closed",
    "WebSockets that were closed, by the code of what ended them first.",
    "code",
    (*map(str, sorted(KNOWN | OF_THE_CHAT)), OTHER),
)
TEARDOWN_SECONDS = Histogram(
    "teardown_seconds",
    "From what ended a WebSocket to its closed socket.",
    (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, inf),
)
SEND_STALLS = Counter("send_stalls", "Sends that had to wait for a peer that does not keep up.")
CONVERSATIONS = Gauge("conversations", "Conversations in memory: followed, answered or lingering.")
RUNS = Gauge("runs", "Runs that go on.")
WAITING = Gauge("runs_waiting", "Posts that wait for the agent.")
RUN_SECONDS = Histogram(
    "run_seconds",
    "Runs that ended and how long they took, by outcome.",
    (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, inf),
    "outcome",
    OUTCOMES,
)
APPENDED = Counter("events_appended", "Events put into logs, by type.", "type", EVENTS)
APPEND_SECONDS = Histogram(
    "log_append_seconds",
    "How long the log took to put an event in.",
    (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, inf),
)
DELIVERED = Counter("events_delivered", "Events given to connections to send, each as often as it is followed.")
LIMIT_HITS = Counter("limit_hits", "How often somebody ran into a limit, by its setting.", "limit", LIMITS)
_LATE_IMPORTS = Counter("late_imports", "Modules that were imported after start-up.")

# What `numbers` asks for, and nobody counts.
CONNECTIONS = Connections()
_CONNECTIONS = Gauge("connections", "WebSockets, and sockets on their way to be one, by phase.", "phase", PHASES)
_MESSAGES = Counter("messages", "WebSocket messages.", "direction", DIRECTIONS)
_BYTES = Counter("bytes", "Bytes of WebSockets, behind their handshakes.", "direction", DIRECTIONS)
_TASKS = Gauge("tasks", "Trio's tasks that are alive.")
_ERRORS = Counter("errors_reported", "Errors that were reported.")
_DROPPED = Counter("records_dropped", "Records that stderr did not take.")

METRICS: tuple[Counter | Histogram, ...] = (
    _CONNECTIONS,
    OPENED,
    CLOSED,
    TEARDOWN_SECONDS,
    _MESSAGES,
    _BYTES,
    SEND_STALLS,
    CONVERSATIONS,
    RUNS,
    WAITING,
    RUN_SECONDS,
    APPENDED,
    APPEND_SECONDS,
    DELIVERED,
    LIMIT_HITS,
    _TASKS,
    _ERRORS,
    _DROPPED,
    _LATE_IMPORTS,
)


class Numbers(NamedTuple):
    """All that one process has counted, or several have."""

    grown: dict[str, Family]  # by the metric's name: what only grows, which are counters and histograms
    current: dict[str, Family]  # gauges


NOTHING = Numbers({}, {})


def metrics() -> tuple[Counter | Histogram, ...]:
    """All of them: with `numbers`, this module is one set of metrics, until each server and chat has its own."""
    return METRICS


def numbers() -> Numbers:
    """What this process has counted. To be called in a task."""
    traffic = CONNECTIONS.totals()
    _CONNECTIONS.values = CONNECTIONS.by_phase()
    _MESSAGES.values = dict(zip(DIRECTIONS, (traffic.messages_received, traffic.messages_sent), strict=True))
    _BYTES.values = dict(zip(DIRECTIONS, (traffic.bytes_received, traffic.bytes_sent), strict=True))
    _TASKS.values = {"": current_statistics().tasks_living}
    _ERRORS.values = {"": counted["errors"]}
    _DROPPED.values = {"": counted["records_dropped"]}
    _LATE_IMPORTS.values = {"": counted["late_imports"]}
    found = Numbers({}, {})
    for metric in METRICS:
        families = found.current if isinstance(metric, Gauge) else found.grown
        families[metric.name] = metric.family()
    return found


def total(parts: Iterable[Numbers]) -> Numbers:
    """The sum of what several processes have counted."""
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


def forget() -> None:
    """Begin anew, as if nothing had been counted: after a rehearsal, when all is over."""
    for metric in METRICS:
        metric.forget()
    CONNECTIONS.forget()
    counted.update(dict.fromkeys(counted, 0))
