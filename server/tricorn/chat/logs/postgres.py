"""A log in PostgreSQL, which several instances can share.

Tasks put their calls into a queue, and a few connections with a task each carry them out: one appends, taking all calls
that wait into one transaction; some do the rest; one listens. So a caller that is cancelled leaves no connection half
way through an answer. A lost connection is replaced, and calls without an answer are sent again until the caller gives
up: each step is one function (`postgres.sql`), and the database recognizes an append that it gets twice.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from logging import CRITICAL, getLogger
from math import isinf
from secrets import token_hex
from typing import Any

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
from trio import Event, Nursery, TooSlowError, fail_after, move_on_after, sleep
from trio.lowlevel import checkpoint_if_cancelled, wait_readable

from tricorn.chat.logs.base import (
    PROBLEMS,
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
    incomplete,
)
from tricorn.chat.logs.calls import Call, CallQueue
from tricorn.chat.logs.engine import SWEEP_PERIOD, Engine
from tricorn.chat.logs.psycopg_trio import Row, TrioConnection, hosts
from tricorn.chat.logs.watching import Watchers
from tricorn.chat.settings import ChatSettings
from tricorn.errors.reason import reason
from tricorn.errors.report import report, report_error
from tricorn.errors.text import title
from tricorn.settings import SettingError

VERSION = 1
_SCHEMA = files("tricorn.chat.logs").joinpath("postgres.sql").read_text()
_MIGRATING = 7428, 1  # the advisory lock under which the schema is made

OTHERS = 2  # connections for everything but appends
CONNECTIONS = 1 + OTHERS + 1  # with those that append and listen
AT_ONCE = 500  # appends in one transaction

WANTED = "log: must be postgresql://[USER:PASSWORD@]HOST[:PORT]/DATABASE"

_APPEND = (
    "SELECT * FROM tricorn.append(%s, %b::text[], %b::text[], %b::bytea[], %b::bytea[], %b::text[], %b::bigint[],"
    " %b::bigint[], %b::boolean[], %b::bigint[], %s, %s)"
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
_INCOMPLETE = (
    "SELECT c.key, c.first, c.head, count(e.seq), min(e.seq), max(e.seq)"
    " FROM tricorn.conversation c LEFT JOIN tricorn.entry e ON e.conversation = c.id GROUP BY c.id"
    " HAVING count(e.seq) <> c.head - c.first + 1 OR min(e.seq) <> c.first OR max(e.seq) <> c.head LIMIT %s"
)
_COUNT = "SELECT (SELECT count(*) FROM tricorn.conversation), (SELECT count(*) FROM tricorn.entry)"
# The table that a dump makes when it is restored is another one than that which it was made of.
_MADE_AS = """
DO $$ BEGIN
    ALTER TABLE tricorn.store ADD COLUMN IF NOT EXISTS made_as oid;
    UPDATE tricorn.store SET made_as = 'tricorn.store'::regclass::oid WHERE made_as IS NULL;
EXCEPTION WHEN insufficient_privilege THEN  -- then a restored dump is not noticed
END $$
"""
_HAS_MADE_AS = (
    "SELECT EXISTS (SELECT FROM pg_attribute"
    " WHERE attrelid = 'tricorn.store'::regclass AND attname = 'made_as' AND NOT attisdropped)"
)
_IS_RESTORED = "SELECT EXISTS (SELECT FROM tricorn.store WHERE made_as <> 'tricorn.store'::regclass::oid)"
_RENEW_STORE = (
    "UPDATE tricorn.store SET id = md5(random()::text || clock_timestamp()::text),"
    " made_as = 'tricorn.store'::regclass::oid"
)
_RENEW_EPOCHS = "UPDATE tricorn.conversation SET epoch = left(md5(epoch || (SELECT id FROM tricorn.store)), 16)"
_STAND = "SELECT * FROM tricorn.stand(%b::text[], %b::bigint[])"

# This server cannot serve us now; another connection may lead to one that can.
_PASSING = (AdminShutdown, CannotConnectNow, CrashShutdown, ReadOnlySqlTransaction)

# psycopg logs what goes wrong with a connection; we report it in `Unavailable`.
getLogger("psycopg").setLevel(CRITICAL + 1)


class PostgresLog(Engine):
    """One instance's log in a PostgreSQL database. `connect` makes it."""

    shared = True
    immediate = False
    punctual = True

    def __init__(self, conninfo: str, where: str, settings: ChatSettings) -> None:
        super().__init__(f"PostgreSQL at {where}", settings)
        self._conninfo = conninfo
        self._ttl = settings.lease * 2 / 3
        self._instance = token_hex(8)
        self._appends = CallQueue(self._timeout)
        self._others = CallQueue(self._timeout)
        self._watchers = Watchers()
        self._listening = Event()
        self._heard_all = True
        self._connections = 0
        self._complete = Event()  # all of them are there

    async def check(self) -> None:
        await self._complete.wait()  # without one of them, something would wait in vain
        await self._renew()

    async def _renew(self) -> None:
        await self._ask("SELECT tricorn.renew(%s, %s)", self._instance, self._ttl)

    async def open(self, conversation: str) -> LogState:
        (row,) = await self._ask("SELECT * FROM tricorn.open(%s, %s, %s)", conversation, *self._retention)
        return LogState(*row)

    async def append(self, conversation: str, epoch: str, append: Append) -> tuple[Entry, bool]:
        what = (*draft(append.event), *append.identify(), append.is_post, append.answered)
        outcome, seq, json = await self._appends.call(conversation, epoch, *what)
        if outcome == "past":
            raise PastLost
        if outcome == "lease":
            raise LeaseLost
        self._watchers.saw(conversation, seq)
        return Entry(seq, json), outcome == "repeated"

    async def find(self, conversation: str, key: str) -> Entry | None:
        rows = await self._ask(_FIND, conversation, key)
        return Entry(*rows[0]) if rows else None

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        entries = [Entry(*row) for row in await self._ask(_READ, conversation, after, limit)]
        if entries:
            self._watchers.saw(conversation, entries[-1].seq)
        return entries

    async def watch(self, conversation: str, on_change: OnChange) -> None:
        self._watchers.watch(conversation, on_change)
        await checkpoint_if_cancelled()
        await self._listening.wait()

    def unwatch(self, conversation: str) -> None:
        self._watchers.unwatch(conversation)

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

    # For operators

    async def examine(self) -> Examined:
        async with self._maintaining() as connection:
            ((conversations, entries),) = await _fetch(connection, _COUNT, ())
            rows = await _fetch(connection, _INCOMPLETE, (PROBLEMS,))
            return Examined(conversations, entries, [incomplete(*row) for row in rows])

    async def renew_epochs(self) -> None:
        async with self._maintaining() as connection:
            await connection.execute("BEGIN")
            await self._renew_all(connection)
            await connection.execute("COMMIT")

    @asynccontextmanager
    async def _maintaining(self) -> AsyncGenerator[TrioConnection]:
        """Have a connection whose statements may take as long as they need."""
        await self._in_time(self._open_store)
        try:
            connection = await TrioConnection.open(self._conninfo)
            try:
                await connection.execute("SET statement_timeout = 0")
                yield connection
            finally:
                connection.pgconn.finish()
        except (Error, OSError) as error:
            raise self._unavailable(reason(error)) from None

    # Asking

    async def _ask(self, statement: str, *parameters: Any) -> list[Row]:
        rows: list[Row] = await self._others.call(statement, *parameters)
        return rows

    # The connections

    async def _open_store(self) -> None:
        backoff = self._backoff()
        while True:
            try:
                connection = await TrioConnection.open(self._conninfo)
                try:
                    return await self._migrate(connection)
                finally:
                    connection.pgconn.finish()
            except (OperationalError, OSError) as error:
                self._problem = reason(error)
            except Error as error:
                raise self._unavailable(reason(error)) from None
            await sleep(backoff.next())

    async def _migrate(self, connection: TrioConnection) -> None:
        """Make the schema if there is none. An instance that starts at the same time waits."""
        await connection.execute("BEGIN")
        await connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", _MIGRATING)
        ((there,),) = await _fetch(connection, "SELECT to_regclass('tricorn.version') IS NOT NULL", ())
        if there:
            ((version,),) = await _fetch(connection, "SELECT number FROM tricorn.version", ())
            if version != VERSION:
                raise self._unavailable(f"its schema has version {version}, and this Tricorn knows {VERSION}")
        else:
            await connection.execute(_SCHEMA)
        ((has_made_as,),) = await _fetch(connection, _HAS_MADE_AS, ())
        if not has_made_as:
            await connection.execute(_MADE_AS)
        elif (await _fetch(connection, _IS_RESTORED, ()))[0][0]:
            await self._renew_all(connection)
            report("WARNING", f"{self._where}: {RESTORED}")
        await connection.execute("COMMIT")

    async def _renew_all(self, connection: TrioConnection) -> None:
        await connection.execute(_RENEW_STORE)
        await connection.execute(_RENEW_EPOCHS)

    def _start(self, nursery: Nursery) -> None:
        nursery.start_soon(self._appends.watch)
        nursery.start_soon(self._others.watch)
        nursery.start_soon(self._stay_connected, self._serve_appends)
        for _ in range(OTHERS):
            nursery.start_soon(self._stay_connected, self._serve_others)
        nursery.start_soon(self._stay_connected, self._listen)
        nursery.start_soon(self._every, self._ttl / 3, self._renew)
        nursery.start_soon(self._every, SWEEP_PERIOD, self._sweep)

    async def _let_go(self) -> None:
        await self._ask("DELETE FROM tricorn.instance WHERE id = %s", self._instance)

    async def _stay_connected(self, serve: Callable[[TrioConnection], Awaitable[None]]) -> None:
        """Have a connection and serve on it, again and again."""
        backoff = self._backoff()
        while True:
            try:
                with fail_after(self._timeout):
                    connection = await TrioConnection.open(self._conninfo)
                backoff.reset()
                try:
                    self._has_come()
                    await serve(connection)
                finally:
                    self._has_gone()
                    connection.pgconn.finish()
            except (Error, OSError, TooSlowError) as error:
                self._failed(reason(error))
            except Exception as error:  # not PostgreSQL's
                self._problem = title(error)
                report_error(error)
            await sleep(backoff.next())

    def _has_come(self) -> None:
        self._connections += 1
        if self._connections == CONNECTIONS:
            self._works()
            self._complete.set()

    def _has_gone(self) -> None:
        self._connections -= 1
        if self._complete.is_set():
            self._complete = Event()

    async def _serve_others(self, connection: TrioConnection) -> None:
        while True:
            calls = await self._others.take(1)
            statement, *parameters = calls[0].arguments
            rows = await self._answers(connection, self._others, calls, statement, parameters)
            if rows is not None:
                calls[0].succeed(rows)

    async def _serve_appends(self, connection: TrioConnection) -> None:
        alone = 0  # how many to try one by one, because one of a group that failed may be to blame
        while True:
            calls = sorted(await self._appends.take(1 if alone else AT_ONCE), key=_conversation)
            alone = max(0, alone - 1)
            if not await self._append(connection, calls):
                self._appends.put_back(calls)
                alone = len(calls)

    async def _append(self, connection: TrioConnection, calls: list[Call]) -> bool:
        """Carry out appends in one transaction. False if several failed together."""
        columns = map(list, zip(*(call.arguments for call in calls), strict=True))
        parameters = (self._instance, *columns, *self._retention)
        rows = await self._answers(connection, self._appends, calls, _APPEND, parameters)
        for call, row in zip(calls, rows or (), strict=False):
            call.succeed(row)
        return rows is not None or len(calls) == 1

    async def _answers(
        self, connection: TrioConnection, queue: CallQueue, calls: list[Call], statement: str, parameters: Sequence[Any]
    ) -> list[Row] | None:
        """Return the server's answer, or None if that is an error: then a single call has failed, and of several none.

        If the connection is to blame, the calls go back into the queue and the error is raised.
        """
        while True:
            try:
                with fail_after(self._timeout):
                    return await _fetch(connection, statement, parameters)
            except (DeadlockDetected, SerializationFailure):
                pass
            except TooSlowError:
                queue.put_back(calls)
                raise
            except Error as error:
                if connection.pgconn.status != ConnStatus.OK or isinstance(error, _PASSING):
                    queue.put_back(calls)
                    raise
                if len(calls) == 1:
                    calls[0].fail(self._unavailable(reason(error)))
                return None
            except Exception as error:  # not PostgreSQL's; nobody knows how far the connection has come
                for call in calls:
                    call.fail(self._broken(error))
                raise

    async def _sweep(self) -> None:
        await self._ask("SELECT tricorn.sweep(%s)", self._retention.seconds)

    # Notifications

    async def _listen(self, connection: TrioConnection) -> None:
        connection.add_notify_handler(self._notified)
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
                        break  # is the server still there?
                    await connection.wait(notifies(connection.pgconn))
        finally:
            self._listening = Event()

    def _notified(self, notice: Notify) -> None:
        if not notice.payload:
            self._heard_all = False
            return
        head, cancelled, conversation = notice.payload.split("\n", 2)
        self._watchers.saw(conversation, int(head))
        self._watchers.tell(conversation, int(head), cancelled)

    async def _tell_all(self, connection: TrioConnection) -> None:
        """Tell all watchers what they may have missed."""
        known = self._watchers.known
        with fail_after(self._timeout):
            rows = await _fetch(connection, _STAND, (list(known), list(known.values())))
        for conversation, head, cancelled in rows:
            self._watchers.tell(conversation, head, cancelled)


def connect(url: str, settings: ChatSettings) -> PostgresLog:
    """Make the log at `postgresql://[USER:PASSWORD@]HOST[:PORT]/DATABASE`, or another URL that libpq takes.

    Raises SettingError if it is no such URL.
    """
    try:
        given: dict[str, Any] = conninfo_to_dict(url)
        places = hosts(given)
    except (Error, ValueError):
        raise SettingError(WANTED) from None
    if (
        not url.startswith(("postgresql://", "postgres://"))
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


def _conversation(call: Call) -> str:
    key: str = call.arguments[0]
    return key
