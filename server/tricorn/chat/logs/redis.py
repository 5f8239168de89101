"""A log in Redis, which several instances can share.

An instance has one connection, which answers in order and also carries notifications. Commands of many tasks go out in
one write, no task waits for a free connection, and a cancelled command does not confuse the next one. A lost connection
is replaced, and commands without an answer are sent again until the caller gives up: each step is atomic (`redis.lua`),
and Redis recognizes an append that it gets twice.

We use coredis 6.9 from its connections up, because its pool loses a slot for good with each connection that ends while
it is lent out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from hashlib import sha1
from importlib.resources import files
from logging import CRITICAL, getLogger
from math import isinf
from re import MULTILINE, compile
from secrets import token_hex
from ssl import create_default_context
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from coredis.connection import (
    BaseConnection,
    TCPConnection,
    TCPLocation,
    UnixDomainSocketConnection,
    UnixDomainSocketLocation,
)
from coredis.exceptions import BusyLoadingError, ConnectionError, NoScriptError, ReadOnlyError, RedisError
from trio import Event, Nursery, TooSlowError, move_on_after, open_nursery, sleep
from trio.lowlevel import checkpoint_if_cancelled

from tricorn.chat.logs.base import (
    PROBLEMS,
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
from tricorn.chat.logs.engine import Engine
from tricorn.chat.logs.watching import Watchers
from tricorn.chat.settings import ChatSettings
from tricorn.errors.reason import reason
from tricorn.errors.report import report_error
from tricorn.errors.text import title
from tricorn.settings import SettingError

_SCRIPT = files("tricorn.chat.logs").joinpath("redis.lua").read_bytes()
_SHA = sha1(_SCRIPT, usedforsecurity=False).hexdigest()

OLDEST = (6, 2)  # the first version that has XTRIM MINID
NOTHING = b""
ROW, ENTRIES = b"tricorn:conversation:", b"tricorn:entries:"  # before the key of a conversation, as in redis.lua
_ENDS = (b"XRANGE", b"-", b"+"), (b"XREVRANGE", b"+", b"-")
_POLICY = compile(rb"^maxmemory_policy:(\S+)", MULTILINE)

WANTED = (
    "log: must be redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss:// with the same, or "
    "unix://[USER:PASSWORD@]/PATH[?db=DB]"
)

# coredis logs each failed connection with a traceback; we report why in `Unavailable`.
getLogger("coredis").setLevel(CRITICAL + 1)


class RedisLog(Engine):
    """One instance's log in Redis. `connect` makes it."""

    shared = True
    immediate = False
    punctual = False

    def __init__(self, make: Callable[[], BaseConnection], where: str, settings: ChatSettings, channels: str) -> None:
        super().__init__(f"Redis at {where}", settings)
        self._make = make
        self._ttl = settings.lease * 2 / 3
        self._channels = channels
        self._instance = token_hex(8)
        self._watchers = Watchers()
        self._connection: BaseConnection | None = None
        self._connected = Event()

    async def __aenter__(self) -> Self:
        """Raises Unavailable if Redis cannot be used within `log_timeout`."""
        await super().__aenter__()
        try:
            await self._in_time(self.check)
        except BaseException:
            self._running.cancel()
            await self._tasks.__aexit__(None, None, None)
            raise
        return self

    async def check(self) -> None:
        await self._ask(b"SET", f"tricorn:instance:{self._instance}", NOTHING, b"PX", self._milliseconds())

    async def open(self, conversation: str) -> LogState:
        epoch, first, head, answered = await self._step("open", conversation, *self._kept())
        return LogState(epoch.decode(), int(first), int(head), int(answered))

    async def append(self, conversation: str, epoch: str, append: Append) -> tuple[Entry, bool]:
        what = (*draft(append.event), *append.identify(), int(append.is_post), append.answered)
        arguments = [NOTHING if each is None else each for each in what]
        answer = await self._step("append", conversation, epoch, *arguments, *self._kept())
        if answer == b"past":
            raise PastLost
        if answer == b"lease":
            raise LeaseLost
        (seq, json), repeated = answer
        entry = Entry(int(seq), json)
        self._watchers.saw(conversation, entry.seq)
        return entry, bool(repeated)

    async def find(self, conversation: str, key: str) -> Entry | None:
        found = await self._step("find", conversation, key)
        return Entry(int(found[0]), found[1]) if found else None

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        found = await self._ask(b"XRANGE", f"tricorn:entries:{conversation}", after + 1, b"+", b"COUNT", limit)
        entries = [Entry(int(id.partition(b"-")[0]), fields[1]) for id, fields in found]
        if entries:
            self._watchers.saw(conversation, entries[-1].seq)
        return entries

    async def watch(self, conversation: str, on_change: OnChange) -> None:
        self._watchers.watch(conversation, on_change)
        self._send(b"SUBSCRIBE", conversation)
        await self._step("stand", conversation, 0)  # answered after the subscription

    def unwatch(self, conversation: str) -> None:
        if self._watchers.unwatch(conversation):
            self._send(b"UNSUBSCRIBE", conversation)

    async def claim(self, conversation: str) -> Lease | None:
        token = await self._step("claim", conversation, self._milliseconds())
        return None if token is None else Lease(int(token))

    async def release(self, conversation: str, lease: Lease, *, unanswered: bool = False) -> bool:
        return bool(await self._step("release", conversation, lease.token, int(unanswered)))

    async def cancel(self, conversation: str, run: str) -> None:
        await self._step("cancel", conversation, run)

    async def attend(self, conversation: str, attending: bool) -> None:
        await self._step("attend", conversation, int(attending))

    async def attended(self, conversation: str) -> bool:
        return bool(await self._step("attended", conversation))

    async def unanswered(self, limit: int) -> list[str]:
        return [key.decode() for key in await self._step("unanswered", "", limit)]

    # Asking

    async def _step(self, step: str, conversation: str, *arguments: Any) -> Any:
        asked = (0, step, conversation, self._instance, self._channels, *arguments)
        with suppress(NoScriptError):  # Redis was restarted, or another one took over
            return await self._ask(b"EVALSHA", _SHA, *asked)
        return await self._ask(b"EVAL", _SCRIPT, *asked)

    async def _ask(self, command: bytes, *arguments: Any) -> Any:
        """Ask until there is an answer. Raises Unavailable if Redis answers with an error that will not pass."""
        await checkpoint_if_cancelled()
        while True:
            connection = self._connection
            if connection is None:
                await self._connected.wait()
                continue
            try:
                return await _request(connection, command, *arguments)
            except (ReadOnlyError, BusyLoadingError) as error:
                self._problem = reason(error)
                connection.invalidate()
                self._drop(connection)
            except ConnectionError:
                self._drop(connection)
            except NoScriptError:
                raise
            except RedisError as error:
                raise self._unavailable(reason(error)) from None
            except Exception as error:  # not Redis's; nobody knows how far the connection has come
                report_error(error)
                connection.invalidate()
                self._drop(connection)
                raise self._broken(error) from error

    # For operators

    async def examine(self) -> Examined:
        async with self:
            conversations = entries = 0
            problems: list[str] = []
            async for key in self._keys():
                first, head = await self._ask(b"HMGET", ROW + key, b"first", b"head")
                stream = ENTRIES + key
                count = await self._ask(b"XLEN", stream)
                conversations += 1
                entries += count
                first, head = int(first or 1), int(head or 0)
                if count == head - first + 1 or (not count and not isinf(self._retention.seconds)):
                    continue  # a stream whose time is over is gone before anybody looks
                ends = [await self._ask(each, stream, *ends, b"COUNT", 1) for each, *ends in _ENDS] if count else []
                found: list[int | None] = [int(id.partition(b"-")[0]) for ((id, _),) in ends] or [None, None]
                if len(problems) < PROBLEMS:
                    problems.append(incomplete(key.decode(), first, head, count, *found))
            return Examined(conversations, entries, problems)

    async def renew_epochs(self) -> None:
        async with self:
            await self._ask(b"SET", b"tricorn:store", token_hex(20))
            async for key in self._keys():
                await self._ask(b"HDEL", ROW + key, b"epoch")

    async def _keys(self) -> AsyncGenerator[bytes]:
        """Yield the key of each conversation, some maybe twice."""
        cursor = b"0"
        while True:
            cursor, rows = await self._ask(b"SCAN", cursor, b"MATCH", ROW + b"*", b"COUNT", 1000)
            for row in rows:
                yield row.removeprefix(ROW)
            if cursor in (b"0", 0):
                return

    def _send(self, command: bytes, conversation: str) -> None:
        """Change a subscription. Without a connection there is nothing to do: the next one begins with all of them."""
        if self._connection is not None:
            with suppress(ConnectionError):
                self._connection.send_command(command, self._channels + conversation)

    def _kept(self) -> tuple[str, str]:
        return f"{self._retention.events}", f"{self._retention.seconds}"

    def _milliseconds(self) -> int:
        return 10**12 if isinf(self._ttl) else max(1, int(self._ttl * 1000))

    # The connection

    def _start(self, nursery: Nursery) -> None:
        nursery.start_soon(self._stay_connected)
        nursery.start_soon(self._every, self._ttl / 3, self._renew)

    async def _let_go(self) -> None:
        if self._connection is not None:
            await self._ask(b"DEL", f"tricorn:instance:{self._instance}")

    async def _renew(self) -> None:
        """Renew what this instance has. A connection that does not answer before the next time is given up."""
        with move_on_after(self._ttl / 3) as scope:
            await self.check()
        if scope.cancelled_caught and self._connection is not None:
            self._problem = "it does not answer"
            self._connection.invalidate()

    async def _stay_connected(self) -> None:
        backoff = self._backoff()
        while True:
            try:
                async with self._connection_made() as connection:
                    backoff.reset()
                    pushed: Any
                    async for pushed in connection.push_messages:
                        if pushed[0] == b"message":
                            self._notified(pushed[1].decode().removeprefix(self._channels), pushed[2])
            except* (RedisError, OSError, TooSlowError, TimeoutError) as errors:
                self._problem = reason(errors)
            except* Exception as errors:  # not Redis's
                self._problem = title(errors)
                report_error(errors)
            await sleep(backoff.next())

    @asynccontextmanager
    async def _connection_made(self) -> AsyncIterator[BaseConnection]:
        async with open_nursery() as nursery:
            connection = self._make()
            await nursery.start(connection.run)
            try:
                await self._set_up(connection)
                yield connection
            finally:
                self._drop(connection)
                nursery.cancel_scope.cancel()

    async def _set_up(self, connection: BaseConnection) -> None:
        """Go on with this connection, and tell the watchers what they may have missed."""
        version = tuple(map(int, (connection.server_version or "0").split(".")[:2]))
        if version < OLDEST:
            raise ConnectionError(f"its version is {connection.server_version}; 6.2 or newer is needed")
        await _request(connection, b"SCRIPT LOAD", _SCRIPT)
        # A replica would answer reads and refuse writes.
        role = await _request(connection, b"ROLE")
        if role[0] != b"master":
            raise ConnectionError("it is a replica; give the address of the one that takes writes")
        # Not CONFIG GET, which hosted ones do not allow.
        policy = _POLICY.search(await _request(connection, b"INFO", b"memory"))
        if policy is not None and policy[1] != b"noeviction":
            raise ConnectionError(
                f"its maxmemory-policy is {policy[1].decode()}, which loses entries; it must be noeviction"
            )
        known, told = self._watchers.known, set[str]()
        while new := [each for each in known if each not in told]:  # more may have come meanwhile
            told.update(new)
            for conversation in new:
                connection.send_command(b"SUBSCRIBE", self._channels + conversation)
            for conversation in new:
                arguments = ("stand", conversation, self._instance, self._channels, known.get(conversation, 0))
                head, cancelled = await _request(connection, b"EVALSHA", _SHA, 0, *arguments)
                self._watchers.tell(conversation, int(head), cancelled.decode())
        self._connection = connection
        self._connected.set()

    def _drop(self, connection: BaseConnection) -> None:
        if self._connection is connection:
            self._connection = None
            self._connected = Event()

    def _notified(self, conversation: str, message: bytes) -> None:
        head, _, cancelled = message.partition(b" ")
        self._watchers.saw(conversation, int(head))
        self._watchers.tell(conversation, int(head), cancelled.decode())


def connect(url: str, settings: ChatSettings) -> RedisLog:
    """Make the log at `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, `rediss://…` (TLS) or `unix://[USER:PASSWORD@]/PATH[?db=DB]`.

    Raises SettingError if it is no such URL.
    """
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        port = parts.port or 6379
        database = query.pop("db", [""])[0] if parts.scheme == "unix" else parts.path.strip("/")
        db = int(database or 0)
    except ValueError:
        raise SettingError(WANTED) from None
    place = parts.path if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in ("redis", "rediss", "unix") or not place or query or parts.fragment or db < 0:
        raise SettingError(WANTED)
    options: dict[str, Any] = {
        "username": unquote(parts.username) if parts.username else None,
        "password": unquote(parts.password) if parts.password else None,
        "db": db,
        "connect_timeout": settings.log_timeout,
    }
    make: Callable[[], BaseConnection]
    if parts.scheme == "unix":
        make = partial(UnixDomainSocketConnection, UnixDomainSocketLocation(place), **options)
        where = place
    else:
        if parts.scheme == "rediss":
            options["ssl_context"] = create_default_context()
        make = partial(TCPConnection, TCPLocation(place, port), **options)
        where = f"[{place}]:{port}" if ":" in place else f"{place}:{port}"
    return RedisLog(make, where, settings, f"tricorn:{db}:")


async def _request(connection: BaseConnection, command: bytes, *arguments: Any) -> Any:
    return await connection.create_request(command, *arguments, decode=False)
