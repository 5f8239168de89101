"""Pages over HTTP/2, inside TLS, by Hypercorn's codec. `H2Protocol` is not its public interface: see `http.py`."""

from __future__ import annotations

from contextlib import suppress
from math import inf
from typing import Any

from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from h2.settings import Settings as Http2Settings
from hypercorn.events import RawData
from hypercorn.protocol.h2 import H2Protocol
from trio import CancelScope, current_time, sleep
from trio.lowlevel import checkpoint

from tricorn.listening.http import Exchange
from tricorn.protocol.http2 import FrameCounter
from tricorn.transport.flow_control import READ_SIZE
from tricorn.transport.keep_alive import LOOKS_PER_TIMEOUT
from tricorn.transport.rate_limit import RateLimit

FRAMES_AT_ONCE = 32  # then others get their turn


class Http2(Exchange):
    """The requests of an HTTP/2 connection."""

    _protocol: H2Protocol

    async def _start(self) -> H2Protocol:
        self._protocol = _PagesOnly(*self._arguments())
        self._idle_until = current_time() + self._http.config.keep_alive_timeout
        self._watching = CancelScope()
        await self._protocol.initiate()
        return self._protocol

    async def serve(self, data: bytes) -> None:
        """Serve until the connection is over. `data` came already."""
        frames = FrameCounter()
        rate_limit = RateLimit(self._http.settings, self._http.metrics)
        self._tasks.spawn(self._watch_streams)
        while not self._over:
            if not data:
                with CancelScope(deadline=self._idle_until) as self._reading:
                    data = await self._read(READ_SIZE)
                if not data:
                    break
            size, begun = frames.cut(data, FRAMES_AT_ONCE)
            if rate_limit.exceeded(begun, size):
                self._go_away(ErrorCodes.ENHANCE_YOUR_CALM)
                break
            await self._protocol.handle(RawData(data[:size]))
            data = data[size:]
            await checkpoint()
        self._watching.cancel()

    def drain(self) -> None:
        if self._protocol.idle:
            self._go_away(ErrorCodes.NO_ERROR)
            self._end()

    def _updated(self, *, idle: bool) -> None:
        self._idle_until = current_time() + self._http.config.keep_alive_timeout if idle else inf
        self._reading.deadline = self._idle_until
        if idle and self._http.context.terminated.is_set():
            self._end()

    def _go_away(self, why: ErrorCodes) -> None:
        self._protocol.connection.close_connection(why)
        if not self._writing.locked():
            with suppress(OSError):
                self._wire.send(self._protocol.connection.data_to_send())

    async def _watch_streams(self) -> None:
        """Abort the connection if the peer takes nothing of a response for `stall_timeout`."""
        waiting: dict[int, tuple[int, float]] = {}  # by stream: how many bytes, and since when as many
        with self._watching:
            while not self._over:
                await sleep(self._stall_timeout / LOOKS_PER_TIMEOUT)
                now = current_time()
                buffers = self._protocol.stream_buffers
                sizes = {number: len(each.buffer) for number, each in buffers.items() if each.buffer}
                waiting = {
                    number: waiting[number] if number in waiting and waiting[number][0] == size else (size, now)
                    for number, size in sizes.items()
                }
                if any(now - since >= self._stall_timeout for _, since in waiting.values()):
                    self._abort()


class _PagesOnly(H2Protocol):
    """HTTP/2 that does not offer WebSockets (RFC 8441): browsers and proxies then use HTTP/1.1 for them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connection.local_settings = Http2Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: self.config.h2_max_concurrent_streams,
                SettingCodes.MAX_HEADER_LIST_SIZE: self.config.h2_max_header_list_size,
            },
        )
