"""A log in a file, by SQLite: durable, and nothing to set up. One process has the file at a time.

All that tasks ask goes to one task, which takes whatever waits, does it in a thread in one transaction, and answers
when that is on the disk: so a thousand writers cost one flush, one writer alone waits for nobody, and who is cancelled
leaves nothing half done.
"""

from __future__ import annotations

from itertools import count
from math import isinf
from sqlite3 import SQLITE_BUSY, DatabaseError
from time import time_ns
from types import TracebackType
from typing import Self

from trio import CancelScope, current_time, open_nursery, sleep, to_thread
from trio.lowlevel import checkpoint

from tricorn.chat.logs.base import Entry, Hear, Lease, LeaseLost, LogState, PastLost, Retention, Unavailable, draft
from tricorn.chat.logs.calls import Calls
from tricorn.chat.logs.sqlite_file import File
from tricorn.chat.protocol import AnyEvent, UserMessage
from tricorn.chat.settings import ChatSettings
from tricorn.errors.report import report_error
from tricorn.settings import SettingError

AT_ONCE = 500  # requests in one transaction
LOOK_AGAIN = 0.1  # seconds between two looks whether a predecessor has left the file
SWEEP_PERIOD = 600.0  # seconds between two looks for what has grown old

WANTED = "log: must be sqlite:///PATH; a fourth slash begins an absolute path, like sqlite:////var/lib/tricorn.db"


class SQLiteLog:
    """The log in a file. `connect` makes it."""

    shared = False
    immediate = False

    def __init__(self, path: str, settings: ChatSettings) -> None:
        self._path = path
        self._patience = settings.log_timeout
        self._retention = Retention(settings.retention_events, settings.retention_seconds)
        self._requests = Calls()
        self._leases: dict[str, int] = {}
        self._tokens = count(time_ns())  # nobody is left who has one of another process, but they rise all the same
        self._running = CancelScope(shield=True)  # until the block is left: last words come late
        self._file: File

    async def __aenter__(self) -> Self:
        """Raises Unavailable where the file cannot be used, or another process has it for longer than `log_timeout`."""
        self._file = await self._open_when_free()
        self._opening = open_nursery()
        nursery = await self._opening.__aenter__()
        nursery.start_soon(self._run)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._running.cancel()
        return await self._opening.__aexit__(kind, error, traceback)

    async def check(self) -> None:
        await self._requests.ask(File.check)

    async def open(self, conversation: str) -> LogState:
        state: LogState = await self._requests.ask(File.open, conversation, self._retention)
        return state

    async def append(
        self,
        conversation: str,
        epoch: str,
        event: AnyEvent,
        key: str | None = None,
        *,
        lease: Lease | None = None,
        answered: int | None = None,
    ) -> tuple[Entry, bool]:
        if lease is not None and self._leases.get(conversation) != lease.token:
            await checkpoint()
            raise LeaseLost
        asks = isinstance(event, UserMessage)
        what = conversation, epoch, draft(event), key, asks, answered, self._retention
        appended: tuple[Entry, bool] | None = await self._requests.ask(File.append, *what)
        if appended is None:
            raise PastLost
        return appended

    async def find(self, conversation: str, key: str) -> Entry | None:
        found: Entry | None = await self._requests.ask(File.find, conversation, key)
        return found

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        entries: list[Entry] = await self._requests.ask(File.read, conversation, after, limit)
        return entries

    async def watch(self, conversation: str, hear: Hear) -> None:
        await checkpoint()  # there is nobody else to hear of

    def unwatch(self, conversation: str) -> None:
        pass

    async def claim(self, conversation: str) -> Lease | None:
        await checkpoint()
        token = self._leases[conversation] = next(self._tokens)
        return Lease(token)

    async def release(self, conversation: str, lease: Lease, *, unanswered: bool = False) -> bool:
        is_due = await self._requests.ask(File.is_unanswered, conversation)
        if self._leases.get(conversation) != lease.token:
            return True
        if is_due and not unanswered:
            return False
        del self._leases[conversation]
        return True

    async def cancel(self, conversation: str, run: str) -> None:
        await checkpoint()

    async def attend(self, conversation: str, attending: bool) -> None:
        await checkpoint()

    async def attended(self, conversation: str) -> bool:
        await checkpoint()
        return False

    async def unanswered(self, limit: int) -> list[str]:
        keys = await self._requests.ask(File.unanswered, limit + len(self._leases))
        return [key for key in keys if key not in self._leases][:limit]

    # The file

    async def _open_when_free(self) -> File:
        deadline = current_time() + self._patience
        while True:
            try:
                return await to_thread.run_sync(File, self._path)
            except DatabaseError as error:
                if getattr(error, "sqlite_errorcode", None) != SQLITE_BUSY:
                    raise self._unavailable(error) from None
                if current_time() >= deadline:
                    raise Unavailable(f"SQLite file {self._path}: another process has it") from None
            await sleep(LOOK_AGAIN)

    async def _run(self) -> None:
        try:
            with self._running:
                async with open_nursery() as nursery:
                    nursery.start_soon(self._serve)
                    if not isinf(self._retention.seconds):
                        nursery.start_soon(self._sweep)
        finally:
            self._file.close()

    async def _serve(self) -> None:
        while True:
            requests = await self._requests.take(AT_ONCE)
            # Not abandoned when cancelled: it takes as long as the disk does, and what it does is asked for.
            answers = await to_thread.run_sync(self._file.serve, [request.what for request in requests])
            for request, answer in zip(requests, answers, strict=True):
                if isinstance(answer, DatabaseError):
                    request.fail(self._unavailable(answer))
                elif isinstance(answer, Exception):  # a bug: it must not pass for a log that is away
                    request.fail(answer)
                else:
                    request.answer(answer)

    async def _sweep(self) -> None:
        while True:
            last: int | None = 0
            while last is not None:
                try:
                    last = await self._requests.ask(File.sweep, last, self._retention)
                except Unavailable:  # who asks for something will be told
                    break
                except Exception as error:
                    report_error(error)
                    break
            await sleep(SWEEP_PERIOD)

    def _unavailable(self, error: Exception) -> Unavailable:
        return Unavailable(f"SQLite file {self._path}: {error}")


def connect(url: str, settings: ChatSettings) -> SQLiteLog:
    """The log in the file that `sqlite:///PATH` names; `PATH` stands as it is, relative to the working directory.

    Raises SettingError where it names none.
    """
    path = url.removeprefix("sqlite:///")
    if path in (url, "") or path.endswith("/") or "\0" in path:
        raise SettingError(WANTED)
    return SQLiteLog(path, settings)
