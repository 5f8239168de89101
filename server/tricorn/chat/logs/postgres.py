"""A log in PostgreSQL, which several instances can share.

What tasks ask is put before a few connections, each with a task of its own: one appends, and takes all that waits in
one transaction; some do the rest; one listens. So a caller that is cancelled leaves no connection in disorder. Where
one is lost it is made anew, and what was asked is asked again until the caller gives up: each step is one function
(`postgres.sql`), and an append that is said again is known again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from importlib.resources import files
from logging import CRITICAL, getLogger
from math import isinf
from secrets import token_hex
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from psycopg import Error, Notify
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import (
    AdminShutdown,
    CannotConnectNow,
    CrashShutdown,
    DeadlockDetected,
    OperationalError,
    ReadOnlySqlTransaction,
    SerializationFailure,
)
from psycopg.generators import notifies
from psycopg.pq import ConnStatus
from trio import CancelScope, Event, TooSlowError, fail_after, move_on_after, open_nursery, sleep
from trio.lowlevel import checkpoint_if_cancelled, wait_readable

from tricorn.chat.logs.base import Entry, Hear, Lease, LeaseLost, LogState, PastLost, Retention, Unavailable, draft
from tricorn.chat.logs.calls import Call, Calls
from tricorn.chat.logs.psycopg_trio import Row, TrioConnection, hosts
from tricorn.chat.protocol import AnyEvent, UserMessage
from tricorn.chat.settings import ChatSettings
from tricorn.settings import SettingError

VERSION = 1
_SCHEMA = files("tricorn.chat.logs").joinpath("postgres.sql").read_text()
_MIGRATING = 7428, 1  # the advisory lock of who makes the schema

OTHERS = 2  # connections for what is no append
AT_ONCE = 500  # appends in one transaction
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds between two tries to connect
FAREWELL = 1.0  # seconds to let go of everything at the end
SWEEP_PERIOD = 600.0  # seconds between two looks for what has grown old

WANTED = "log: must be postgresql://[USER:PASSWORD@]HOST[:PORT]/DATABASE"

_APPEND = (
    "SELECT * FROM tricorn.append(%s, %s::text[], %s::text[], %s::bytea[], %s::bytea[], %s::text[], %s::bigint[],"
    " %s::bigint[], %s::boolean[], %s::bigint[], %s, %s)"
)
_READ = (
    "SELECT e.seq, e.json FROM tricorn.entry e JOIN tricorn.conversation c ON c.id = e.conversation"
    " WHERE c.key = %s AND e.seq > %s ORDER BY e.seq LIMIT %s"
)
_FIND = (
    "SELECT e.seq, e.json FROM tricorn.entry e JOIN tricorn.conversation c ON c.id = e.conversation"
    " WHERE c.key = %s AND e.key = %s"
)
_ATTENDED = (
    "SELECT EXISTS (SELECT FROM tricorn.attending"
    " WHERE conversation = %s AND instance <> %s AND tricorn.alive(instance))"
)
_UNANSWERED = (
    "SELECT key FROM tricorn.conversation"
    " WHERE asked > answered AND (holder IS NULL OR NOT tricorn.alive(holder)) LIMIT %s"
)
_STAND = "SELECT * FROM tricorn.stand(%s::text[], %s::bigint[])"

# The server, or what is between, cannot serve us now: another connection may be to one that can.
_PASSING = (AdminShutdown, CannotConnectNow, CrashShutdown, ReadOnlySqlTransaction)

# What goes wrong with a connection is said here, once.
getLogger("psycopg").setLevel(CRITICAL + 1)


class PostgresLog:
    """An instance's log in a PostgreSQL database. `connect` makes it."""

    shared = True
    immediate = False

    def __init__(self, conninfo: str, where: str, settings: ChatSettings) -> None:
        self._conninfo = conninfo
        self._where = where
        self._timeout = settings.log_timeout
        self._ttl = settings.lease * 2 / 3
        self._retention = Retention(settings.retention_events, settings.retention_seconds)
        self._instance = token_hex(8)
        self._appends = Calls()
        self._others = Calls()
        self._watchers: dict[str, Hear] = {}
        self._known: dict[str, int] = {}  # of what is watched: the last entry that was ever seen
        self._listening = Event()
        self._heard_all = True
        self._problem = "it does not answer"
        self._running = CancelScope(shield=True)  # until the block is left: last words come late

    async def __aenter__(self) -> Self:
        """Raises Unavailable where the database cannot be used within `log_timeout`."""
        with move_on_after(self._timeout) as scope:
            await self._migrate_when_there()
        if scope.cancelled_caught:
            raise self._unavailable(self._problem)
        self._opening = open_nursery()
        nursery = await self._opening.__aenter__()
        nursery.start_soon(self._run)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        with move_on_after(FAREWELL, shield=True):
            await self._say_farewell()
        self._running.cancel()
        return await self._opening.__aexit__(kind, error, traceback)

    async def check(self) -> None:
        await self._ask("SELECT tricorn.renew(%s, %s)", self._instance, self._ttl)

    async def open(self, conversation: str) -> LogState:
        (row,) = await self._ask("SELECT * FROM tricorn.open(%s, %s, %s)", conversation, *self._retention)
        return LogState(*row)

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
        before, behind = draft(event)
        token = number = None
        if lease is not None:
            lease.appended += 1
            token, number = lease.token, lease.appended
        elif key is None:
            key = f"once:{token_hex(8)}"  # to be known again if it has to be said again
        is_post = isinstance(event, UserMessage)
        outcome, seq, json = await self._appends.ask(
            conversation, epoch, before, behind, key, token, number, is_post, answered
        )
        if outcome == "past":
            raise PastLost
        if outcome == "lease":
            raise LeaseLost
        self._saw(conversation, seq)
        return Entry(seq, json), outcome == "repeated"

    async def find(self, conversation: str, key: str) -> Entry | None:
        rows = await self._ask(_FIND, conversation, key)
        return Entry(*rows[0]) if rows else None

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        entries = [Entry(*row) for row in await self._ask(_READ, conversation, after, limit)]
        if entries:
            self._saw(conversation, entries[-1].seq)
        return entries

    async def watch(self, conversation: str, hear: Hear) -> None:
        self._watchers[conversation] = hear
        self._known[conversation] = 0
        await checkpoint_if_cancelled()
        await self._listening.wait()

    def unwatch(self, conversation: str) -> None:
        self._watchers.pop(conversation, None)
        self._known.pop(conversation, None)

    async def claim(self, conversation: str) -> Lease | None:
        ((token,),) = await self._ask("SELECT tricorn.claim(%s, %s, %s)", conversation, self._instance, self._ttl)
        return None if token is None else Lease(token)

    async def release(self, conversation: str, lease: Lease, *, unanswered: bool = False) -> bool:
        arguments = conversation, self._instance, lease.token, unanswered
        ((released,),) = await self._ask("SELECT tricorn.release(%s, %s, %s, %s)", *arguments)
        return bool(released)

    async def cancel(self, conversation: str, run: str) -> None:
        await self._ask("SELECT tricorn.cancel(%s, %s)", conversation, run)

    async def attend(self, conversation: str, attending: bool) -> None:
        arguments = conversation, self._instance, attending, self._ttl
        await self._ask("SELECT tricorn.attend(%s, %s, %s, %s)", *arguments)

    async def attended(self, conversation: str) -> bool:
        ((attended,),) = await self._ask(_ATTENDED, conversation, self._instance)
        return bool(attended)

    async def unanswered(self, limit: int) -> list[str]:
        return [key for (key,) in await self._ask(_UNANSWERED, limit)]

    # Asking

    async def _ask(self, statement: str, *parameters: Any) -> list[Row]:
        rows: list[Row] = await self._others.ask(statement, *parameters)
        return rows

    def _unavailable(self, problem: str) -> Unavailable:
        return Unavailable(f"PostgreSQL at {self._where}: {problem}")

    def _saw(self, conversation: str, seq: int) -> None:
        if seq > self._known.get(conversation, seq):
            self._known[conversation] = seq

    # The connections

    async def _migrate_when_there(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                connection = await TrioConnection.open(self._conninfo)
                try:
                    await self._migrate(connection)
                finally:
                    connection.pgconn.finish()
            except (OperationalError, OSError) as error:
                self._problem = _line(error)
            except Error as error:
                raise self._unavailable(_line(error)) from None
            else:
                return
            await sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _migrate(self, connection: TrioConnection) -> None:
        """Make the schema where there is none; who comes at the same time waits."""
        await connection.execute("BEGIN")
        await connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", _MIGRATING)
        ((there,),) = await _fetch(connection, "SELECT to_regclass('tricorn.version') IS NOT NULL", ())
        if there:
            ((version,),) = await _fetch(connection, "SELECT number FROM tricorn.version", ())
            if version != VERSION:
                raise self._unavailable(f"its schema has version {version}, and this Tricorn knows {VERSION}")
        else:
            await connection.execute(_SCHEMA)
        await connection.execute("COMMIT")

    async def _run(self) -> None:
        with self._running:
            async with open_nursery() as nursery:
                nursery.start_soon(self._stay_connected, self._serve_appends)
                for _ in range(OTHERS):
                    nursery.start_soon(self._stay_connected, self._serve_others)
                nursery.start_soon(self._stay_connected, self._listen)
                nursery.start_soon(self._stay_alive)
                nursery.start_soon(self._sweep)

    async def _say_farewell(self) -> None:
        with suppress(Unavailable):
            await self._ask("DELETE FROM tricorn.instance WHERE id = %s", self._instance)

    async def _stay_connected(self, serve: Callable[[TrioConnection], Awaitable[None]]) -> None:
        """Have a connection and serve on it, again and again."""
        pause = FIRST_PAUSE
        while True:
            try:
                with fail_after(self._timeout):
                    connection = await TrioConnection.open(self._conninfo)
                pause = FIRST_PAUSE
                try:
                    await serve(connection)
                finally:
                    connection.pgconn.finish()
            except (Error, OSError, TooSlowError) as error:
                self._problem = _line(error)
            await sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _serve_others(self, connection: TrioConnection) -> None:
        while True:
            requests = await self._others.take(1)
            statement, *parameters = requests[0].what
            rows = await self._answers(connection, self._others, requests, statement, parameters)
            if rows is not None:
                requests[0].answer(rows)

    async def _serve_appends(self, connection: TrioConnection) -> None:
        alone = 0  # how many to try one by one: of a group that failed, one may be to blame
        while True:
            requests = sorted(await self._appends.take(1 if alone else AT_ONCE), key=_conversation)
            alone = max(0, alone - 1)
            if not await self._append(connection, requests):
                self._appends.put_back(requests)
                alone = len(requests)

    async def _append(self, connection: TrioConnection, requests: list[Call]) -> bool:
        columns = map(list, zip(*(request.what for request in requests), strict=True))
        parameters = (self._instance, *columns, *self._retention)
        rows = await self._answers(connection, self._appends, requests, _APPEND, parameters)
        for request, row in zip(requests, rows or (), strict=False):
            request.answer(row)
        return rows is not None or len(requests) == 1

    async def _answers(
        self,
        connection: TrioConnection,
        queue: Calls,
        requests: list[Call],
        statement: str,
        parameters: Sequence[Any],
    ) -> list[Row] | None:
        """What the server answers, or None. A request alone has failed then, of several none.

        Where the connection is to blame they go back into the queue, and the error goes on.
        """
        try:
            with fail_after(self._timeout):
                return await _fetch(connection, statement, parameters)
        except (DeadlockDetected, SerializationFailure):
            return await self._answers(connection, queue, requests, statement, parameters)
        except TooSlowError:
            queue.put_back(requests)
            raise
        except Error as error:
            if connection.pgconn.status != ConnStatus.OK or isinstance(error, _PASSING):
                queue.put_back(requests)
                raise
            if len(requests) == 1:
                requests[0].fail(self._unavailable(_line(error)))
            return None

    # Being alive, and hearing of others

    async def _stay_alive(self) -> None:
        while True:
            with suppress(Unavailable):  # who asks for something will be told
                await self.check()
            await sleep(self._ttl / 3)

    async def _sweep(self) -> None:
        while True:
            with suppress(Unavailable):
                await self._ask("SELECT tricorn.sweep(%s)", self._retention.seconds)
            await sleep(SWEEP_PERIOD)

    async def _listen(self, connection: TrioConnection) -> None:
        connection.add_notify_handler(self._heard)
        try:
            await connection.execute("LISTEN tricorn")
            self._listening.set()
            while True:
                self._heard_all = True
                await self._tell_all(connection)
                while self._heard_all:
                    with move_on_after(self._ttl) as silence:
                        await wait_readable(connection.pgconn.socket)
                    if silence.cancelled_caught:
                        break  # is it still there?
                    await connection.wait(notifies(connection.pgconn))
        finally:
            self._listening = Event()

    def _heard(self, notice: Notify) -> None:
        if not notice.payload:
            self._heard_all = False
            return
        head, cancelled, conversation = notice.payload.split("\n", 2)
        self._saw(conversation, int(head))
        self._tell(conversation, int(head), cancelled)

    async def _tell_all(self, connection: TrioConnection) -> None:
        """Tell all watchers what they may have missed."""
        with fail_after(self._timeout):
            rows = await _fetch(connection, _STAND, (list(self._known), list(self._known.values())))
        for conversation, head, cancelled in rows:
            self._tell(conversation, head, cancelled)

    def _tell(self, conversation: str, head: int, cancelled: str) -> None:
        hear = self._watchers.get(conversation)
        if hear is not None:
            hear(head, cancelled)


def connect(url: str, settings: ChatSettings) -> PostgresLog:
    """The log in the database at `postgresql://[USER:PASSWORD@]HOST[:PORT]/DATABASE`, or another URL that libpq takes.

    Raises SettingError where the URL is none.
    """
    try:
        given: dict[str, Any] = conninfo_to_dict(url)
        places = hosts(given)
    except (Error, ValueError):
        raise SettingError(WANTED) from None
    if (
        urlsplit(url).scheme not in ("postgresql", "postgres")
        or not given
        or not all(port.isdecimal() for _, port in places)
    ):
        raise SettingError(WANTED)
    milliseconds = 0 if isinf(settings.log_timeout) else max(1, int(settings.log_timeout * 1000))
    options = f"-c statement_timeout={milliseconds} {given.pop('options', '')}".strip()
    defaults: dict[str, Any] = {
        "application_name": "tricorn",
        "target_session_attrs": "read-write",
        "tcp_user_timeout": milliseconds,
    }
    where = ",".join(f"{host}:{port}" for host, port in places)
    return PostgresLog(make_conninfo("", **{**defaults, **given, "options": options}), where, settings)


async def _fetch(connection: TrioConnection, statement: str, parameters: Sequence[Any]) -> list[Row]:
    async with connection.cursor(binary=True) as cursor:
        await cursor.execute(statement, parameters)
        return await cursor.fetchall()


def _conversation(request: Call) -> str:
    key: str = request.what[0]
    return key


def _line(error: BaseException) -> str:
    """What is wrong, without the notes on where and how."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
