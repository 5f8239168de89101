"""A log in Redis, which several instances can share.

All that an instance asks goes over one connection, which answers in order and also carries the news: so what many tasks
ask at the same time goes out in one write, nothing has to wait for a free connection, and no cancelled command can
leave one in disorder. Where the connection is lost it is made anew, and what was asked is asked again until the caller
gives up: each step is atomic (`redis.lua`), and an append that is said again is known again.

coredis 6.9 is used from its connections up: its pool loses a slot for good with each connection that ends while it is
lent out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from hashlib import sha1
from importlib.resources import files
from logging import CRITICAL, getLogger
from math import isinf
from secrets import token_hex
from ssl import create_default_context
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from coredis.connection import (
    BaseConnection,
    TCPConnection,
    TCPLocation,
    UnixDomainSocketConnection,
    UnixDomainSocketLocation,
)
from coredis.exceptions import (
    BusyLoadingError,
    ConnectionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
)
from trio import CancelScope, Event, TooSlowError, move_on_after, open_nursery, sleep
from trio.lowlevel import checkpoint_if_cancelled

from tricorn.chat.logs.base import (
    Draft,
    Entry,
    Hear,
    Lease,
    LeaseLost,
    LogState,
    PastLost,
    Retention,
    Unavailable,
    draft,
)
from tricorn.chat.protocol import AnyEvent, UserMessage
from tricorn.chat.settings import ChatSettings
from tricorn.settings import SettingError

_SCRIPT = files("tricorn.chat.logs").joinpath("redis.lua").read_bytes()
_SHA = sha1(_SCRIPT, usedforsecurity=False).hexdigest()

OLDEST = (6, 2)  # knows XTRIM MINID
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds between two tries to connect
FAREWELL = 1.0  # seconds to let go of everything at the end
NOTHING = b""

WANTED = (
    "log: must be redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss:// with the same, or "
    "unix://[USER:PASSWORD@]/PATH[?db=DB]"
)

# It reports each failed connection with a traceback; what there is to say of that is said here, once.
getLogger("coredis").setLevel(CRITICAL + 1)


class RedisLog:
    """An instance's log in a Redis. `connect` makes it."""

    shared = True
    immediate = False

    def __init__(self, make: Callable[[], BaseConnection], where: str, settings: ChatSettings, channels: str) -> None:
        self._make = make
        self._where = where
        self._timeout = settings.log_timeout
        self._ttl = settings.lease * 2 / 3
        self._retention = Retention(settings.retention_events, settings.retention_seconds)
        self._channels = channels
        self._instance = token_hex(8)
        self._watchers: dict[str, Hear] = {}
        self._known: dict[str, int] = {}  # of what is watched: the last entry that was ever seen
        self._connection: BaseConnection | None = None
        self._connected = Event()
        self._problem = "it does not answer"
        self._running = CancelScope(shield=True)  # until the block is left: last words come late

    async def __aenter__(self) -> Self:
        """Raises Unavailable where Redis cannot be used within `log_timeout`."""
        self._opening = open_nursery()
        nursery = await self._opening.__aenter__()
        nursery.start_soon(self._run)
        try:
            with move_on_after(self._timeout) as scope:
                await self.check()
            if scope.cancelled_caught:
                raise self._unavailable(self._problem)
        except BaseException as error:
            self._running.cancel()
            await self._opening.__aexit__(None, None, None)
            raise error from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._connection is not None:
            with move_on_after(FAREWELL, shield=True):
                await self._say_farewell()
        self._running.cancel()
        return await self._opening.__aexit__(kind, error, traceback)

    async def check(self) -> None:
        await self._ask(b"SET", f"tricorn:instance:{self._instance}", NOTHING, b"PX", self._milliseconds())

    async def open(self, conversation: str) -> LogState:
        epoch, first, head, answered = await self._step("open", conversation, *self._kept())
        return LogState(epoch.decode(), int(first), int(head), int(answered))

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
        stamped: Draft = draft(event)
        token: object = NOTHING
        number: object = NOTHING
        if lease is not None:
            lease.appended += 1
            token, number = lease.token, lease.appended
        elif key is None:
            key = f"once:{token_hex(8)}"  # to be known again if it has to be said again
        answer = await self._step(
            "append",
            conversation,
            epoch,
            stamped.before,
            stamped.behind,
            key or NOTHING,
            token,
            number,
            int(isinstance(event, UserMessage)),
            NOTHING if answered is None else answered,
            *self._kept(),
        )
        if answer == b"past":
            raise PastLost
        if answer == b"lease":
            raise LeaseLost
        (seq, json), repeated = answer
        entry = Entry(int(seq), json)
        self._saw(conversation, entry.seq)
        return entry, bool(repeated)

    async def find(self, conversation: str, key: str) -> Entry | None:
        found = await self._step("find", conversation, key)
        return Entry(int(found[0]), found[1]) if found else None

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        found = await self._ask(b"XRANGE", f"tricorn:entries:{conversation}", after + 1, b"+", b"COUNT", limit)
        entries = [Entry(int(id.partition(b"-")[0]), fields[1]) for id, fields in found]
        if entries:
            self._saw(conversation, entries[-1].seq)
        return entries

    async def watch(self, conversation: str, hear: Hear) -> None:
        self._watchers[conversation] = hear
        self._known[conversation] = 0
        if self._connection is not None:
            with suppress(ConnectionError):  # the next connection begins with it
                self._connection.send_command(b"SUBSCRIBE", self._channels + conversation)
        await self._step("stand", conversation, 0)  # answered behind it

    def unwatch(self, conversation: str) -> None:
        if self._watchers.pop(conversation, None) is None:
            return
        del self._known[conversation]
        if self._connection is not None:
            with suppress(ConnectionError):
                self._connection.send_command(b"UNSUBSCRIBE", self._channels + conversation)

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
        try:
            return await self._ask(b"EVALSHA", _SHA, *asked)
        except NoScriptError:  # it was started anew, or another one took over
            return await self._ask(b"EVAL", _SCRIPT, *asked)

    async def _ask(self, command: bytes, *arguments: Any) -> Any:
        """Ask until there is an answer. Raises Unavailable where that is an error that waiting does not mend."""
        await checkpoint_if_cancelled()
        while True:
            connection = self._connection
            if connection is None:
                await self._connected.wait()
                continue
            try:
                return await _ask(connection, command, *arguments)
            except (ReadOnlyError, BusyLoadingError) as error:
                self._problem = _line(error)
                connection.invalidate()
                self._lost(connection)
            except ConnectionError:
                self._lost(connection)
            except NoScriptError:
                raise
            except RedisError as error:
                raise self._unavailable(_line(error)) from None

    def _unavailable(self, problem: str) -> Unavailable:
        return Unavailable(f"Redis at {self._where}: {problem}")

    def _kept(self) -> tuple[str, str]:
        return f"{self._retention.events}", f"{self._retention.seconds}"

    def _milliseconds(self) -> int:
        return 10**12 if isinf(self._ttl) else max(1, int(self._ttl * 1000))

    def _saw(self, conversation: str, seq: int) -> None:
        if seq > self._known.get(conversation, seq):
            self._known[conversation] = seq

    # The connection

    async def _run(self) -> None:
        with self._running:
            async with open_nursery() as nursery:
                nursery.start_soon(self._stay_connected)
                nursery.start_soon(self._stay_alive)

    async def _say_farewell(self) -> None:
        with suppress(Unavailable):
            await self._ask(b"DEL", f"tricorn:instance:{self._instance}")

    async def _stay_alive(self) -> None:
        """Renew what this instance has. A connection that does not answer in time is given up."""
        period = self._ttl / 3
        while True:
            with move_on_after(period) as scope:
                await self._renew()
            if scope.cancelled_caught and self._connection is not None:
                self._problem = "it does not answer"
                self._connection.invalidate()
            await sleep(period)

    async def _renew(self) -> None:
        with suppress(Unavailable):  # who asks for something will be told
            await self.check()

    async def _stay_connected(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                async with self._connection_made() as connection:
                    pause = FIRST_PAUSE
                    pushed: Any
                    async for pushed in connection.push_messages:
                        if pushed[0] == b"message":
                            self._heard(pushed[1].decode().removeprefix(self._channels), pushed[2])
            except* (RedisError, OSError, TooSlowError, TimeoutError) as errors:
                self._problem = _line(_first(errors))
            await sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    @asynccontextmanager
    async def _connection_made(self) -> AsyncIterator[BaseConnection]:
        async with open_nursery() as nursery:
            connection = self._make()
            await nursery.start(connection.run)
            try:
                await self._take_up(connection)
                yield connection
            finally:
                self._lost(connection)
                nursery.cancel_scope.cancel()

    async def _take_up(self, connection: BaseConnection) -> None:
        """Go on with this connection, and tell the watchers what they may have missed."""
        version = tuple(map(int, (connection.server_version or "0").split(".")[:2]))
        if version < OLDEST:
            raise ConnectionError(f"its version is {connection.server_version}; 6.2 or newer is needed")
        await _ask(connection, b"SCRIPT LOAD", _SCRIPT)
        # A replica would answer what is read, and let writes fail.
        role = await _ask(connection, b"ROLE")
        if role[0] != b"master":
            raise ConnectionError("it is a replica; give the address of the one that takes writes")
        told: set[str] = set()
        while new := [each for each in self._watchers if each not in told]:  # some come meanwhile
            told.update(new)
            for conversation in new:
                connection.send_command(b"SUBSCRIBE", self._channels + conversation)
            for conversation in new:
                arguments = ("stand", conversation, self._instance, self._channels, self._known.get(conversation, 0))
                head, cancelled = await _ask(connection, b"EVALSHA", _SHA, 0, *arguments)
                self._tell(conversation, int(head), cancelled.decode())
        self._connection = connection
        self._connected.set()

    def _lost(self, connection: BaseConnection) -> None:
        if self._connection is connection:
            self._connection = None
            self._connected = Event()

    def _heard(self, conversation: str, message: bytes) -> None:
        head, _, cancelled = message.partition(b" ")
        self._saw(conversation, int(head))
        self._tell(conversation, int(head), cancelled.decode())

    def _tell(self, conversation: str, head: int, cancelled: str) -> None:
        hear = self._watchers.get(conversation)
        if hear is not None:
            hear(head, cancelled)


def connect(url: str, settings: ChatSettings) -> RedisLog:
    """The log at `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, `rediss://…` (TLS) or `unix://[USER:PASSWORD@]/PATH[?db=DB]`.

    Raises SettingError where the URL is none of these.
    """
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    try:
        port = parts.port or 6379
        database = query.pop("db", [""])[0] if parts.scheme == "unix" else parts.path.strip("/")
        db = int(database or 0)
    except ValueError:
        raise SettingError(WANTED) from None
    place = parts.path if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in ("redis", "rediss", "unix") or not place or query or db < 0:
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


async def _ask(connection: BaseConnection, command: bytes, *arguments: Any) -> Any:
    return await connection.create_request(command, *arguments, decode=False)


def _first(errors: BaseException) -> BaseException:
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors


def _line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, ConnectionError) and error.__cause__ is not None else error
    return " ".join(str(_first(cause)).split()) or type(cause).__name__
