"""Both kinds of readiness tell a socket's owner the same, but for a hang-up that nobody asked about."""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tricorn.transport.poller import RESUMED_AT_ONCE, Epoll, PerSocket, best_poller

KINDS = [pytest.param(Epoll, marks=pytest.mark.skipif(not hasattr(select, "epoll"), reason="no epoll")), PerSocket]


class Owner:
    """Notes what it is told. Reads what there is; once it may write it does not want to any more."""

    def __init__(self, readiness: Any, sock: socket.socket, **wants: bool) -> None:
        self.readiness = readiness
        self.socket = sock
        self.wants_read = True
        self.wants_write = False
        self.at_eof = False
        self.told: list[object] = []
        self.error: Exception | None = None
        self.__dict__.update(wants)
        readiness.register(self)

    def want(self, **wants: bool) -> None:
        self.__dict__.update(wants)
        self.readiness.change(self)

    def fileno(self) -> int:
        return self.socket.fileno()

    def readable(self) -> None:
        self.note(self.socket.recv(1000))
        if self.told[-1] == b"":
            self.want(at_eof=True)

    def writable(self) -> None:
        self.note("writable")
        self.want(wants_write=False)

    def flush(self) -> None:
        self.note("flush")

    def resume(self) -> None:
        self.note("resume")
        self.readiness.resume_soon(self)

    def note(self, what: object) -> None:
        if self.error is not None:
            raise self.error
        self.told.append(what)

    def failed(self, error: Exception) -> None:
        self.told.append(error)
        self.want(at_eof=True, wants_write=False)


@pytest.fixture(params=KINDS)
async def readiness(request: pytest.FixtureRequest, nursery: trio.Nursery) -> Any:
    readiness = request.param()
    await nursery.start(readiness.run)
    return readiness


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The owner's and the peer's, connected by TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    ours.setblocking(False)
    with ours, peer:
        yield ours, peer


@pytest.fixture
async def idle() -> AsyncGenerator[None]:
    """In the end every task waits: none is kept busy by what it was told already."""
    yield
    with trio.fail_after(10):
        await wait_all_tasks_blocked(0.01)


Sockets = tuple[socket.socket, socket.socket]


@pytest.mark.usefixtures("idle")
async def test_what_can_be_read_is_told_each_time(readiness: Any, sockets: Sockets) -> None:
    ours, peer = sockets
    owner = Owner(readiness, ours)
    for data in (b"one", b"two"):
        peer.send(data)
        await wait_all_tasks_blocked()
    assert owner.told == [b"one", b"two"]


@pytest.mark.usefixtures("idle")
async def test_reading_pauses_and_goes_on(readiness: Any, sockets: Sockets) -> None:
    ours, peer = sockets
    owner = Owner(readiness, ours)
    await wait_all_tasks_blocked()
    owner.want(wants_read=False)
    peer.send(b"later")
    await wait_all_tasks_blocked()
    assert owner.told == []
    owner.want(wants_read=True)
    await wait_all_tasks_blocked()
    peer.send(b"again")
    await wait_all_tasks_blocked()
    assert owner.told == [b"later", b"again"]


@pytest.mark.usefixtures("idle")
async def test_room_is_told_when_it_is_wanted(readiness: Any, sockets: Sockets) -> None:
    ours, peer = sockets
    owner = Owner(readiness, ours)
    await wait_all_tasks_blocked()
    assert owner.told == []
    with suppress(BlockingIOError):
        while True:
            ours.send(bytes(100_000))
    owner.want(wants_write=True)
    await wait_all_tasks_blocked()
    assert owner.told == []
    reader = trio.socket.from_stdlib_socket(peer)
    while not owner.told:
        await reader.recv(100_000)
    assert owner.told == ["writable"]


@pytest.mark.usefixtures("idle")
async def test_both_at_once(readiness: Any, sockets: Sockets) -> None:
    ours, peer = sockets
    peer.send(b"data")
    owner = Owner(readiness, ours, wants_write=True)
    await wait_all_tasks_blocked()
    assert sorted(owner.told, key=str) == [b"data", "writable"]


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("wait", [False, True])
async def test_a_socket_that_is_unregistered_is_told_nothing(readiness: Any, sockets: Sockets, wait: bool) -> None:
    ours, peer = sockets
    owner = Owner(readiness, ours)
    if wait:
        await wait_all_tasks_blocked()
    peer.send(b"data")
    readiness.unregister(owner)
    owner.at_eof = True
    ours.close()
    await wait_all_tasks_blocked()
    assert owner.told == []


@pytest.mark.usefixtures("idle")
async def test_the_end_is_told_once(readiness: Any, sockets: Sockets) -> None:
    ours, peer = sockets
    owner = Owner(readiness, ours)
    await wait_all_tasks_blocked()
    peer.close()
    await wait_all_tasks_blocked()
    assert owner.told == [b""]


@pytest.mark.usefixtures("idle")
async def test_room_is_told_behind_the_end(readiness: Any, sockets: Sockets) -> None:
    """The peer may have ended only its half of the stream."""
    ours, peer = sockets
    owner = Owner(readiness, ours)
    peer.shutdown(socket.SHUT_WR)
    await wait_all_tasks_blocked()
    for _ in range(2):
        owner.want(wants_write=True)
        await wait_all_tasks_blocked()
    assert owner.told == [b"", "writable", "writable"]


@pytest.mark.usefixtures("idle")
async def test_a_hang_up_that_nobody_asked_about(readiness: Any, sockets: Sockets) -> None:
    ours, peer = sockets
    owner = Owner(readiness, ours, wants_read=False)
    peer.send(b"left")
    await wait_all_tasks_blocked()
    assert owner.told == []
    peer.close()
    await wait_all_tasks_blocked()
    assert owner.told == ([b"left", b""] if isinstance(readiness, Epoll) else [])


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("what", ["read", "write", "flush"])
async def test_an_error_is_its_owners_and_nobody_elses(readiness: Any, sockets: Sockets, what: str) -> None:
    ours, peer = sockets
    bad = Owner(readiness, ours, wants_read=False)
    mine, others = socket.socketpair()
    with mine, others:
        good = Owner(readiness, mine)
        await wait_all_tasks_blocked()
        bad.error = MemoryError("no memory")
        if what == "flush":
            readiness.flush_soon(bad)
            readiness.flush_soon(good)
        else:
            peer.send(b"data")
            bad.want(**{f"wants_{what}": True})
        await wait_all_tasks_blocked()
        assert bad.told == [bad.error]
        others.send(b"data")
        readiness.flush_soon(good)
        await wait_all_tasks_blocked()
        assert set(good.told) == {b"data", "flush"}
        readiness.unregister(good)


@pytest.mark.usefixtures("idle")
async def test_flush_comes_once_when_the_tasks_that_are_ready_have_run(readiness: Any, sockets: Sockets) -> None:
    owner = Owner(readiness, sockets[0])

    async def put_off() -> None:
        assert owner.told == []
        readiness.flush_soon(owner)

    await wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(put_off)
    await wait_all_tasks_blocked()
    assert owner.told == ["flush"]


def test_best(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        assert isinstance(best_poller(), Epoll)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert isinstance(best_poller(), PerSocket)


async def test_whoever_has_much_to_do_gets_turns_and_keeps_nobody_waiting(nursery: trio.Nursery) -> None:
    poller = PerSocket()
    await nursery.start(poller.run)
    pairs = [socket.socketpair() for _ in range(3 * RESUMED_AT_ONCE + 1)]
    owners = [Owner(poller, ours, wants_read=False) for ours, _ in pairs]
    for owner in owners:
        poller.resume_soon(owner)
    for tick in range(1, 40):
        await trio.lowlevel.checkpoint()
        turns = [len(owner.told) for owner in owners]
        assert (tick - 1) * RESUMED_AT_ONCE <= sum(turns) <= (tick + 1) * RESUMED_AT_ONCE
        assert max(turns) - min(turns) <= 1
    nursery.cancel_scope.cancel()
    for pair in pairs:
        for each in pair:
            each.close()
