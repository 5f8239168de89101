"""psycopg's asynchronous connection on Trio: psycopg's generators say what to wait for, and here Trio waits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, cast

import trio
from psycopg import AsyncConnection
from psycopg.abc import RV, PQGen, PQGenConn
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import OperationalError
from psycopg.generators import connect
from psycopg.rows import TupleRow
from psycopg.waiting import READY_R, READY_RW, READY_W, WAIT_R, WAIT_W, Ready, Wait
from trio.lowlevel import wait_readable, wait_writable

Row = TupleRow


class TrioConnection(AsyncConnection[Row]):
    """A connection for one task. Waiting for the server is a checkpoint; if cancelled, the connection is closed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.lock = cast(Any, trio.Lock())
        # `connect` sets it like this; the public `set_autocommit` is a checkpoint, which could lose the connection.
        self._autocommit = True

    @classmethod
    async def open(cls, conninfo: str) -> Self:
        """Connect, in autocommit mode, to the first of the hosts that takes it.

        Raises:
            psycopg.OperationalError: none did; the text is why the last one refused.
            OSError: a host name cannot be found.
        """
        problem = OperationalError("there is no host to connect to")
        for attempt in await _attempts(conninfo):
            try:
                return cls(await _drive_connecting(connect(attempt)))
            except OperationalError as error:
                problem = error
        raise problem

    async def wait(self, gen: PQGen[RV], interval: float = 0, timeout: float | None = None) -> RV:  # noqa: ASYNC109 (psycopg's)
        try:
            return await _drive(gen, self.pgconn.socket)
        except (trio.Cancelled, KeyboardInterrupt):
            self.pgconn.finish()  # the next answer on it would belong to this statement
            raise


def hosts(parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the hosts, or directories of sockets, that a connection string names, with their ports."""
    names = str(parameters.get("host") or "").split(",")
    ports = str(parameters.get("port") or "").split(",")
    if len(ports) == 1:
        ports *= len(names)
    return [(name, port or "5432") for name, port in zip(names, ports, strict=True)]


async def _attempts(conninfo: str) -> list[str]:
    """Return a connection string for each address. libpq would block while it looks names up."""
    parameters: dict[str, Any] = conninfo_to_dict(conninfo)
    attempts = []
    for host, port in hosts(parameters):
        one = {**parameters, "host": host, "port": port}
        if not host or host.startswith(("/", "@")) or "hostaddr" in parameters:
            attempts.append(make_conninfo("", **one))
        else:
            for *_, address in await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM):
                attempts.append(make_conninfo("", **one, hostaddr=address[0]))
    return attempts


async def _drive(generator: PQGen[RV], descriptor: int) -> RV:
    try:
        wanted = next(generator)
        while True:
            wanted = generator.send(await _ready(descriptor, wanted))
    except StopIteration as end:
        return cast(RV, end.value)


async def _drive_connecting(generator: PQGenConn[RV]) -> RV:
    try:
        descriptor, wanted = next(generator)
        while True:
            descriptor, wanted = generator.send(await _ready(descriptor, wanted))
    except StopIteration as end:
        return cast(RV, end.value)


async def _ready(descriptor: int, wanted: Wait) -> Ready:
    if wanted == WAIT_R:
        await wait_readable(descriptor)
        return READY_R
    if wanted == WAIT_W:
        await wait_writable(descriptor)
        return READY_W
    ready: set[Ready] = set()

    async def wait(until: Any, what: Ready) -> None:
        await until(descriptor)
        ready.add(what)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, wait_readable, READY_R)
        nursery.start_soon(wait, wait_writable, READY_W)
    return READY_RW if len(ready) == 2 else ready.pop()
