"""A log in a file, by SQLite: durable, and nothing to set up. One process has the file at a time.

Tasks put their calls into a queue. One task takes all that wait, carries them out in a thread in one transaction, and
answers when that is on the disk. So a thousand writers cost one flush, a single writer waits for nobody, and a caller
that is cancelled leaves nothing half done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import count
from math import isinf
from os.path import exists
from sqlite3 import SQLITE_BUSY, DatabaseError
from time import time_ns
from typing import Any

from trio import Nursery, sleep, to_thread
from trio.lowlevel import checkpoint

from tricorn.chat.logs.base import (
    RESTORED,
    Append,
    Entry,
    Examined,
    Lease,
    LeaseLost,
    LogState,
    OnChange,
    PastLost,
    draft,
)
from tricorn.chat.logs.calls import CallQueue
from tricorn.chat.logs.engine import SWEEP_PERIOD, Engine
from tricorn.chat.logs.sqlite_file import File
from tricorn.chat.settings import ChatSettings
from tricorn.errors.report import report, report_error
from tricorn.settings import SettingError

AT_ONCE = 500  # calls in one transaction
LOOK_AGAIN = 0.1  # seconds between two attempts to open a file that another process has

WANTED = "log: must be sqlite:///PATH; a fourth slash begins an absolute path, like sqlite:////var/lib/tricorn.db"


class SQLiteLog(Engine):
    """The log in a file. `connect` makes it."""

    shared = False
    immediate = False
    punctual = True

    def __init__(self, path: str, settings: ChatSettings) -> None:
        super().__init__(f"SQLite file {path}", settings)
        self._path = path
        self._calls = CallQueue(self._timeout)
        self._leases: dict[str, int] = {}
        self._tokens = count(time_ns())  # higher than those of the process before
        self._problem = "another process has it"
        self._file: File

    async def check(self) -> None:
        await self._calls.call(File.check)

    async def open(self, conversation: str) -> LogState:
        state: LogState = await self._calls.call(File.open, conversation, self._retention)
        return state

    async def append(self, conversation: str, epoch: str, append: Append) -> tuple[Entry, bool]:
        if append.lease is not None and self._leases.get(conversation) != append.lease.token:
            await checkpoint()
            raise LeaseLost
        what = conversation, epoch, draft(append.event), append, self._retention
        appended: tuple[Entry, bool] | None = await self._calls.call(File.append, *what)
        if appended is None:
            raise PastLost
        return appended

    async def find(self, conversation: str, key: str) -> Entry | None:
        found: Entry | None = await self._calls.call(File.find, conversation, key)
        return found

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        entries: list[Entry] = await self._calls.call(File.read, conversation, after, limit)
        return entries

    async def watch(self, conversation: str, on_change: OnChange) -> None:
        await checkpoint()  # there are no other instances

    def unwatch(self, conversation: str) -> None:
        pass

    async def claim(self, conversation: str) -> Lease | None:
        await checkpoint()
        token = self._leases[conversation] = next(self._tokens)
        return Lease(token)

    async def release(self, conversation: str, lease: Lease, *, unanswered: bool = False) -> bool:
        is_due = await self._calls.call(File.is_unanswered, conversation)
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
        keys = await self._calls.call(File.unanswered, limit + len(self._leases))
        return [key for key in keys if key not in self._leases][:limit]

    # For operators

    async def examine(self) -> Examined:
        examined: Examined = await self._maintain(File.examine)
        return examined

    async def renew_epochs(self) -> None:
        await self._maintain(File.renew_epochs)

    async def _maintain(self, step: Callable[[File], Any]) -> Any:
        """Take a step in a thread, however long that takes, with the file open for it."""

        def work() -> Any:
            if not exists(self._path):  # else it would be made
                raise DatabaseError("there is no such file")
            with closing(File(self._path)) as file:
                return step(file)

        try:
            return await to_thread.run_sync(work)
        except DatabaseError as error:
            raise self._unavailable(self._problem if _is_busy(error) else str(error)) from None

    # The file

    async def _open_store(self) -> None:
        while True:
            try:
                self._file = await to_thread.run_sync(File, self._path)
                self._works()
                break
            except DatabaseError as error:
                if not _is_busy(error):
                    raise self._unavailable(str(error)) from None
            await sleep(LOOK_AGAIN)
        if self._file.is_restored:
            report("WARNING", f"{self._where}: {RESTORED}")
        if self._file.is_open_to_all:
            report("WARNING", f"{self._where}: every user of this machine can open it; `chmod 600` ends that")

    def _start(self, nursery: Nursery) -> None:
        nursery.start_soon(self._serve)
        nursery.start_soon(self._calls.watch)
        if not isinf(self._retention.seconds):
            nursery.start_soon(self._every, SWEEP_PERIOD, self._sweep)

    async def _serve(self) -> None:
        try:
            while True:
                calls = await self._calls.take(AT_ONCE)
                # Not abandoned if cancelled: it takes only as long as the disk does, and somebody asked for it.
                results: Sequence[Any]
                try:
                    results = await to_thread.run_sync(self._file.serve, [call.arguments for call in calls])
                except Exception as error:  # no thread, or no memory
                    results = [error] * len(calls)
                reported = None
                for call, result in zip(calls, results, strict=True):
                    if isinstance(result, DatabaseError):
                        call.fail(self._unavailable(str(result)))
                    elif isinstance(result, Exception):  # not SQLite's: nobody must take it for an outage
                        if result is not reported:
                            reported = result
                            report_error(result)
                        call.fail(self._broken(result))
                    else:
                        call.succeed(result)
        finally:
            self._file.close()

    async def _sweep(self) -> None:
        last: int | None = 0
        while last is not None:
            last = await self._calls.call(File.sweep, last, self._retention)


def connect(url: str, settings: ChatSettings) -> SQLiteLog:
    """Make the log in the file of `sqlite:///PATH`. `PATH` is taken literally, relative to the working directory.

    Raises SettingError if there is no path.
    """
    path = url.removeprefix("sqlite:///")
    if path in (url, "") or path.endswith("/") or "\0" in path:
        raise SettingError(WANTED)
    return SQLiteLog(path, settings)


def _is_busy(error: DatabaseError) -> bool:
    """Return whether another process has the file."""
    return getattr(error, "sqlite_errorcode", None) == SQLITE_BUSY
