"""Looking after the connections of a server, now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio import current_time, sleep

if TYPE_CHECKING:
    from collections.abc import Collection

    from tricorn.connection import Connection
    from tricorn.settings import Settings

LOOKS_PER_TIMEOUT = 4  # looks in the shortest timeout: a look may be late by a quarter of it


async def keep_alive(connections: Collection[Connection], settings: Settings) -> None:
    """Keep the connections alive that there are at any time, or give them up. Runs until cancelled."""
    period = min(settings.ping_interval, settings.ping_timeout, settings.stall_timeout) / LOOKS_PER_TIMEOUT
    while True:
        await sleep(period)
        now = current_time()
        for connection in list(connections):
            try:
                connection.transport.keep_alive(now)
            except Exception as error:
                connection.transport.failed(error)
