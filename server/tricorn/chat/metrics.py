"""What a chat counts."""

from __future__ import annotations

from math import inf
from typing import get_args

from tricorn.chat.protocol import AnyEvent, Outcome
from tricorn.metrics import Counter, Gauge, Histogram, Metrics

EVENT_TYPES = {event: str(event.__struct_config__.tag) for event in get_args(AnyEvent)}
# By the names of their settings.
LIMITS = (
    "user_connections",
    "user_runs",
    "posts_per_minute",
    "waiting_posts",
    "outbox",
    "open_conversations",
    "text_characters",
    "event_bytes",
    "messages_per_second",
)


class ChatMetrics(Metrics):
    """The numbers of one `Chat`."""

    def __init__(self) -> None:
        self.conversations = Gauge("conversations", "Conversations in memory: followed, answered or lingering.")
        self.runs = Gauge("runs", "Runs in progress.")
        self.waiting = Gauge("runs_waiting", "Posts that wait for the agent.")
        self.run_seconds = Histogram(
            "run_seconds",
            "Runs that ended and how long they took, by outcome.",
            (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, inf),
            "outcome",
            get_args(Outcome),
        )
        self.appended = Counter(
            "events_appended",
            "Events appended to logs, by type.",
            "type",
            EVENT_TYPES.values(),
        )
        self.append_seconds = Histogram(
            "log_append_seconds",
            "How long the log took to append an event.",
            (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, inf),
        )
        self.delivered = Counter(
            "events_delivered", "Events given to connections to send, each as often as it is followed."
        )
        self.limit_hits = Counter("limit_hits", "How often somebody ran into a limit, by its setting.", "limit", LIMITS)
