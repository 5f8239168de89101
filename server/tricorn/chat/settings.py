"""What the chat can be told, besides what its server can."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Annotated

from tricorn.settings import Count, Limit, Rule, Seconds, Settings, decimal, is_number, is_whole, whole

Linger = Annotated[
    float,
    Rule(
        description="a number of seconds, 0 or more", test=lambda value: is_number(value) and value >= 0, parse=decimal
    ),
]
# JSON has no infinity, and every client is told the heartbeat.
Heartbeat = Annotated[
    float,
    Rule(
        description="a number of seconds above 0, at most 3600",
        test=lambda value: is_number(value) and 0 < value <= 3600,
        parse=decimal,
    ),
]
EventBytes = Annotated[
    int,
    Rule(description="a whole number, 4096 or more", test=lambda value: is_whole(value) and value >= 4096, parse=whole),
]


@dataclass(frozen=True, kw_only=True)
class ChatSettings(Settings):
    """What the chat can be told, checked when it is made: raises `SettingError`.

    Times are in seconds, and `inf` means never; `heartbeat` has no `inf`.
    """

    auth_timeout: Seconds = 10.0
    """Seconds that a client has to show its token; then the connection is closed with 4500."""

    run_timeout: Seconds = 300.0
    """Seconds that a run may take; then it is cancelled, and its outcome is `timeout`."""

    lease: Seconds = 15.0
    """Seconds for which a run of an instance that died keeps others from answering in its conversation."""

    log_timeout: Seconds = 10.0
    """Seconds that the log may take to do what it is asked; then a post is refused as `unavailable`."""

    retention_events: Limit = inf
    """Events of a conversation that the log keeps; it may forget older ones."""

    retention_seconds: Seconds = inf
    """Seconds for which the log keeps an event. What is not answered yet stays."""

    abandon_after: Linger = 600.0
    """Seconds for which a run goes on with nobody attached; then it ends, and its outcome is `abandoned`.

    0 ends it at once, and `inf` lets it run to the end. By default there is an answer for somebody whose phone was
    locked or had no network for up to ten minutes.
    """

    linger: Linger = 30.0
    """Seconds for which a conversation stays in memory with nobody attached and nothing to answer."""

    heartbeat: Heartbeat = 20.0
    """Seconds between two messages to a client that has nothing else to hear."""

    text_characters: Count = 32000
    """Characters (Unicode code points) of one post."""

    open_conversations: Count = 100
    """Conversations that one connection may have open. As many that a user has left stay in memory for `linger`."""

    user_connections: Count = 20
    """Connections of one user; the next is closed with 4503."""

    user_runs: Count = 20
    """Runs, waiting or going on, that the posts of one user have led to."""

    posts_per_minute: Count = 60
    """Posts of one user in a minute; as many may come at once."""

    waiting_posts: Count = 50
    """Posts that may wait in one conversation, whoever sent them."""

    outbox: Count = 256
    """Replies that may wait for one client to read; past it the close code is 4004."""

    event_bytes: EventBytes = 262144
    """Bytes of one event as it is sent: a piece of an agent's text, a tool's arguments, or its result."""
