"""What is counted for operators. `tricorn.web.metrics` shows it, docs/operations.md says what each is good for.

These are plain numbers and not `prometheus_client`'s own, which take a lock: counting must be possible on the error
path. All of it happens in Trio's thread. Nothing is counted for each message: connections know how many they had, and
are asked when somebody wants to know.

Values of labels are few and known beforehand: never a user, a conversation or anything else that a peer can choose.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .close import KNOWN
from .report import counted

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        if value not in self.values:
            value = OTHER
        self.values[value] += amount


class Gauge(Counter):
    """A number that grows and shrinks."""


class Histogram:
    """How many were at most so large, for each value of a label. The last of `bounds` is infinity."""

    def __init__(self, name: str, text: str, label: str, known: Iterable[str], bounds: tuple[float, ...]) -> None:
        self.name = name
        self.text = text
        self.label = label
        self.bounds = bounds
        self.sums = dict.fromkeys(known, 0.0)
        self.forget()

    def forget(self) -> None:
        self.buckets = {value: [0] * len(self.bounds) for value in self.sums}
        self.sums = dict.fromkeys(self.sums, 0.0)

    def observe(self, value: str, size: float) -> None:
        """Count something of this size for a value of the label."""
        self.sums[value] += size
        for index, bound in enumerate(self.bounds):
            if size <= bound:
                self.buckets[value][index] += 1


class Totals(NamedTuple):
    """What went over a connection, or over all."""

    messages_received: int = 0
    messages_sent: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0


class Counted(Protocol):
    """A connection, as far as it is counted."""

    def totals(self) -> Totals: ...


class Connections:
    """The connections that are open, and what went over those that no longer are."""

    def __init__(self) -> None:
        self._open: set[Counted] = set()
        self._over = Totals()

    def forget(self) -> None:
        self._over = Totals()

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, connection: Counted) -> None:
        OPENED.add()
        self._open.add(connection)

    def closed(self, connection: Counted, code: int) -> None:
        """Count the end of a connection, whose traffic is then no longer asked for."""
        CLOSED.add(str(code))
        self._open.discard(connection)
        self._over = _sum((self._over, connection.totals()))

    def totals(self) -> Totals:
        """What went over all connections so far."""
        return _sum((self._over, *(connection.totals() for connection in self._open)))


def _sum(parts: Iterable[Totals]) -> Totals:
    return Totals(*map(sum, zip(*parts, strict=True)))


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
    "max_head_bytes",
    "max_message_bytes",
    "user_connections",
    "user_runs",
    "posts_per_minute",
    "waiting_posts",
    "outbox",
    "open_conversations",
    "text_characters",
    "event_bytes",
)

OPENED = Counter("connections_opened", "WebSockets that were opened.")
CLOSED = Counter(
    "connections_closed",
    "WebSockets that were closed, by the code of what ended them first.",
    "code",
    (*map(str, sorted(KNOWN)), OTHER),
)
CONVERSATIONS = Gauge("conversations", "Conversations in memory: followed, answered or lingering.")
RUNS = Gauge("runs", "Runs that go on.")
WAITING = Gauge("runs_waiting", "Posts that wait for the agent.")
RUN_SECONDS = Histogram(
    "run_seconds",
    "Runs that ended and how long they took, by outcome.",
    "outcome",
    OUTCOMES,
    (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, inf),
)
APPENDED = Counter("events_appended", "Events put into logs, by type.", "type", EVENTS)
LIMIT_HITS = Counter("limit_hits", "How often somebody ran into a limit, by its setting.", "limit", LIMITS)
LATE_IMPORTS = Counter("late_imports", "Modules that were imported after start-up.")
WORKER_ENDS = Counter("worker_ends", "Workers that ended by themselves and were replaced.")

CONNECTIONS = Connections()
COUNTERS = (OPENED, CLOSED, CONVERSATIONS, RUNS, WAITING, APPENDED, LIMIT_HITS, LATE_IMPORTS, WORKER_ENDS)
HISTOGRAMS = (RUN_SECONDS,)

Families = dict[str, dict[str, list[float]]]  # numbers by a label's value, by the metric's name


class Numbers(NamedTuple):
    """All that one process has counted, or several have."""

    grown: Families  # what only grows: counters, and histograms as buckets with the sum behind
    current: Families  # gauges


NOTHING = Numbers({}, {})


def numbers() -> Numbers:
    """What this process has counted."""
    traffic = CONNECTIONS.totals()
    grown: Families = {
        "errors_reported": {"": [counted["errors"]]},
        "records_dropped": {"": [counted["records_dropped"]]},
        "messages": {"received": [traffic.messages_received], "sent": [traffic.messages_sent]},
        "bytes": {"received": [traffic.bytes_received], "sent": [traffic.bytes_sent]},
    }
    current: Families = {"connections": {"": [len(CONNECTIONS)]}}
    for counter in COUNTERS:
        families = current if isinstance(counter, Gauge) else grown
        families[counter.name] = {value: [number] for value, number in counter.values.items()}
    for histogram in HISTOGRAMS:
        grown[histogram.name] = {
            value: [*buckets, histogram.sums[value]] for value, buckets in histogram.buckets.items()
        }
    return Numbers(grown, current)


def total(parts: Iterable[Numbers]) -> Numbers:
    """The sum of what several processes have counted."""
    grown, current = zip(*parts, strict=True)
    return Numbers(_add(grown), _add(current))


def _add(parts: Iterable[Families]) -> Families:
    sums: Families = {}
    for families in parts:
        for name, family in families.items():
            into = sums.setdefault(name, {})
            for value, each in family.items():
                into[value] = [*map(sum, zip(into[value], each, strict=True))] if value in into else each
    return sums


def forget() -> None:
    """Begin anew, as if nothing had been counted: after a rehearsal, when all is over."""
    for counter in COUNTERS:
        counter.values = dict.fromkeys(counter.values, 0.0)
    for histogram in HISTOGRAMS:
        histogram.forget()
    CONNECTIONS.forget()
    counted.update(dict.fromkeys(counted, 0))
