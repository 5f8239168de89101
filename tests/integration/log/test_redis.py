"""The log in Redis, on real Redis servers: what every log promises, and what becomes of it when Redis goes."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from json import loads
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
import trio.testing

from fixtures.cutting_proxy import CuttingProxy, cutting_proxy
from fixtures.logs import PATIENCE, Told, texts
from fixtures.real_services import RedisServer
from tricorn.chat.logs import conformance
from tricorn.chat.logs.base import KEEP_EVERYTHING, Append, Lease, Log, PastLost, Retention, Unavailable
from tricorn.chat.logs.conformance import LEASE, completed, post, thought
from tricorn.chat.logs.redis import RedisLog, connect
from tricorn.chat.settings import ChatSettings
from tricorn.settings import SettingError


def log_at(path: str, **settings: Any) -> RedisLog:
    return connect(f"unix://{path}", ChatSettings(**{"lease": 1.5 * LEASE, **settings}))


async def vanish(log: Log) -> None:
    assert isinstance(log, RedisLog)
    log._running.cancel()  # its connection, and what it renews
    await trio.testing.wait_all_tasks_blocked()


@pytest.fixture
def start(pytestconfig: pytest.Config) -> Iterator[Callable[..., RedisServer]]:
    """Start a Redis in a directory of its own."""
    with ExitStack() as stack:

        def start(**options: bool) -> RedisServer:
            directory = stack.enter_context(TemporaryDirectory(prefix="redis-"))
            server = RedisServer(pytestconfig, directory, **options)
            stack.callback(server.kill)
            server.start()
            return server

        yield start


@pytest.fixture
def server(start: Callable[..., RedisServer]) -> RedisServer:
    return start()


@pytest.fixture
async def proxy(server: RedisServer) -> AsyncIterator[CuttingProxy]:
    async with cutting_proxy(f"{server.path}.proxy", server.path) as proxy:
        yield proxy


# What every log promises


class Stores:
    def __init__(self, path: str) -> None:
        self.path = path

    @asynccontextmanager
    async def connect(self, retention: Retention = KEEP_EVERYTHING) -> AsyncIterator[Log]:
        async with log_at(self.path, retention_events=retention.events, retention_seconds=retention.seconds) as log:
            yield log

    async def vanish(self, log: Log) -> None:
        await vanish(log)


@pytest.mark.parametrize("case", conformance.CASES + conformance.SHARED_CASES, ids=lambda case: case.__name__)
async def test_conformance(case: conformance.Case, redis_server: RedisServer) -> None:
    redis_server.ask("FLUSHALL")
    with trio.fail_after(3 * PATIENCE):
        await case(Stores(redis_server.path))


# When Redis goes


async def test_a_restart_is_waited_for_and_loses_nothing(server: RedisServer) -> None:
    told = Told()
    async with log_at(server.path) as one, log_at(server.path) as other:
        epoch = (await one.open("c")).epoch
        await other.watch("c", told.hear)
        await one.append("c", epoch, Append(post("1"), "1"))
        await told.until(1)
        server.kill()
        async with trio.open_nursery() as nursery:
            for n in range(2, 30):
                nursery.start_soon(one.append, "c", epoch, Append(post(str(n)), str(n)))
            await trio.testing.wait_all_tasks_blocked()
            server.start()
        await told.until(29)
        assert sorted(await texts(other), key=int) == [str(n) for n in range(1, 30)]
        assert (await one.open("c"))[:3] == (epoch, 1, 29)


async def test_who_watches_hears_after_a_cut_what_was_missed(server: RedisServer, proxy: CuttingProxy) -> None:
    told = Told()
    async with log_at(server.path) as one, log_at(proxy.address) as other:
        epoch = (await one.open("c")).epoch
        await other.watch("c", told.hear)
        proxy.target = "/nowhere"
        proxy.cut()
        await one.append("c", epoch, Append(post("1")))
        proxy.target = server.path
        await told.until(1)
        await one.append("c", epoch, Append(post("2")))
        await told.until(2)


async def test_a_connection_that_says_nothing_any_more_is_given_up(server: RedisServer, proxy: CuttingProxy) -> None:
    async with log_at(proxy.address) as log:
        epoch = (await log.open("c")).epoch
        proxy.stalled = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(log.append, "c", epoch, Append(post("1")))
            await trio.testing.wait_all_tasks_blocked()
            proxy.stalled = False  # for the next connection
        assert await texts(log) == ["1"]


@pytest.mark.parametrize("leased", [True, False])
async def test_what_is_said_again_is_known_again(server: RedisServer, proxy: CuttingProxy, leased: bool) -> None:
    """The answer is lost after Redis has done what was asked, for each kind of append, with what follows it."""
    async with log_at(proxy.address) as log:
        epoch = (await log.open("c")).epoch
        lease: Lease | None = await log.claim("c") if leased else None
        for n in range(6):
            proxy.answers_left = 0 if n % 2 else None
            with trio.fail_after(PATIENCE):
                entry, _ = await log.append("c", epoch, Append(thought(str(n)), lease=lease))
            assert entry.seq == n + 1
            assert loads(entry.json)["text"] == str(n)
        assert await texts(log) == [str(n) for n in range(6)]


async def test_an_empty_redis_is_another_past(server: RedisServer) -> None:
    async with log_at(server.path) as log:
        epoch = (await log.open("c")).epoch
        lease = await log.claim("c")
        await log.append("c", epoch, Append(post("1")))
        server.ask("FLUSHALL")
        with pytest.raises(PastLost):
            await log.append("c", epoch, Append(post("2")))
        with pytest.raises(PastLost):
            await log.append("c", epoch, Append(completed(), lease=lease, answered=1))
        assert (await log.open("c")).head == 0
        assert (await log.open("c")).epoch != epoch


async def test_a_redis_that_lost_its_last_writes_is_found_out(start: Callable[..., RedisServer]) -> None:
    server = start(durable=False)
    told = Told()
    async with log_at(server.path) as log:
        epoch = (await log.open("c")).epoch
        await log.watch("c", told.hear)
        await log.append("c", epoch, Append(post("1")))
        server.ask("SAVE")
        await log.append("c", epoch, Append(post("2")))
        told.heads.clear()
        server.kill()
        server.start()
        await told.until(1)
        with pytest.raises(PastLost):
            await log.append("c", epoch, Append(post("3")))


async def test_a_replica_is_waited_for_until_it_is_promoted(
    server: RedisServer,
) -> None:
    async with log_at(server.path) as log:
        epoch = (await log.open("c")).epoch
        await log.append("c", epoch, Append(post("1"), "1"))
        server.ask("REPLICAOF", "127.0.0.1", "1")  # writes are refused, as in a failover
        async with trio.open_nursery() as nursery:
            nursery.start_soon(log.append, "c", epoch, Append(post("2"), "2"))
            await trio.testing.wait_all_tasks_blocked()
            assert server.ask("ROLE").startswith("slave")
            server.ask("REPLICAOF", "NO", "ONE")
        assert await texts(log) == ["1", "2"]


async def test_another_server_takes_over(
    server: RedisServer, start: Callable[..., RedisServer], proxy: CuttingProxy, tmp_path: Path
) -> None:
    """As behind an address that moves: the other one has the data, and not the scripts."""
    async with log_at(proxy.address) as log:
        epoch = (await log.open("c")).epoch
        await log.append("c", epoch, Append(post("1"), "1"))
        lease = await log.claim("c")
        server.kill()
        other = start(durable=True)
        other.kill()
        shutil.copytree(
            Path(server.path).parent / "appendonlydir", Path(other.path).parent / "appendonlydir", dirs_exist_ok=True
        )
        other.start()
        other.ask("SCRIPT", "FLUSH")
        proxy.target = other.path
        proxy.cut()
        with trio.fail_after(PATIENCE):
            assert (await log.append("c", epoch, Append(post("1"), "1")))[1]
            await log.append("c", epoch, Append(thought("2"), lease=lease))
        other.ask("SCRIPT", "FLUSH")
        with trio.fail_after(PATIENCE):
            await log.append("c", epoch, Append(completed(), lease=lease, answered=1))
        assert len(await texts(log)) == 3


async def test_no_memory_is_told_at_once_and_over_when_there_is_some(server: RedisServer) -> None:
    async with log_at(server.path) as log:
        epoch = (await log.open("c")).epoch
        server.ask("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(Unavailable, match="memory"):
            await log.append("c", epoch, Append(post("1")))
        with pytest.raises(Unavailable):
            await log.check()
        server.ask("CONFIG", "SET", "maxmemory", "0")
        await log.check()
        assert (await log.append("c", epoch, Append(post("1"))))[0].seq == 1


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_redis_that_evicts_keys_is_refused_until_it_does_not(server: RedisServer, policy: str) -> None:
    server.ask("CONFIG", "SET", "maxmemory-policy", policy)
    with pytest.raises(Unavailable) as refused:
        async with log_at(server.path, log_timeout=0.5):
            pass
    assert str(refused.value) == (
        f"Redis at {server.path}: its maxmemory-policy is {policy}, which loses entries; it must be noeviction"
    )
    server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    async with log_at(server.path) as log:
        await log.check()


async def test_an_examination_tells_what_is_missing_and_epochs_can_be_renewed(server: RedisServer) -> None:
    async with log_at(server.path) as log:
        for key in ("a", "b"):
            epoch = (await log.open(key)).epoch
            for n in range(3):
                await log.append(key, epoch, Append(post(str(n))))
        assert await log_at(server.path).examine() == (2, 6, [])
        epochs = [(await log.open(key)).epoch for key in "ab"]
        await log_at(server.path).renew_epochs()
        state = await log.open("a")
        assert state.head == 3
        assert state.epoch != epochs[0]
        with pytest.raises(PastLost):
            await log.append("b", epochs[1], Append(post("late")))
        server.ask("XDEL", "tricorn:entries:a", "2-0")
        server.ask("DEL", "tricorn:entries:b")
        examined = await log_at(server.path).examine()
        assert examined[:2] == (2, 2)
        assert sorted(examined.problems) == [
            "conversation 'a' should have the entries 1 to 3, and has 2 from 1 to 3",
            "conversation 'b' should have the entries 1 to 3, and has none",
        ]


async def test_who_gives_up_waits_no_longer(server: RedisServer) -> None:
    async with log_at(server.path) as log:
        epoch = (await log.open("c")).epoch
        server.kill()
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: log.append("c", epoch, Append(post())),
            lambda: log.read("c", 0, 1),
            lambda: log.claim("c"),
            log.check,
        ]
        for call in calls:
            with trio.move_on_after(0.01) as scope:
                await call()
            assert scope.cancelled_caught
        server.start()
        assert await log.read("c", 0, 10) == []


async def test_cancelled_calls_leave_nothing_behind(server: RedisServer) -> None:
    """More of them than any pool has connections, each cancelled a little later on its way."""
    async with log_at(server.path) as log:
        epoch = (await log.open("c")).epoch
        for turns in range(300):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(log.append, "c", epoch, Append(post(f"{turns}"), f"{turns}"))
                nursery.start_soon(log.read, "c", 0, 10)
                for _ in range(turns % 7):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        with trio.fail_after(PATIENCE):
            for turns in range(300):
                await log.append("c", epoch, Append(post(f"{turns}"), f"{turns}"))
        assert sorted(await texts(log), key=int) == [f"{turns}" for turns in range(300)]
        clients = [line for line in server.ask("CLIENT", "LIST").splitlines() if "cmd=client" not in line]
        assert len(clients) == 1


async def test_a_watcher_that_left_while_there_was_no_connection(server: RedisServer) -> None:
    told = Told()
    async with log_at(server.path) as log:
        await log.watch("c", told.hear)
        server.kill()
        await trio.testing.wait_all_tasks_blocked()
        log.unwatch("c")
        with trio.move_on_after(0.01):
            await log.watch("d", told.hear)
        server.start()
        with trio.fail_after(PATIENCE):
            await log.watch("c", told.hear)
        epoch = (await log.open("c")).epoch
        async with log_at(server.path) as other:
            await other.append("c", epoch, Append(post()))
            await told.until(1)


async def test_a_watcher_that_came_while_a_connection_was_made(server: RedisServer) -> None:
    told, watched = Told(), trio.Event()

    async def come() -> None:
        await log.watch("new", told.hear)
        watched.set()

    async with log_at(server.path) as log, trio.open_nursery() as nursery:
        await log.watch("told first", lambda *news: nursery.start_soon(come))
        await log.watch("told next", lambda *news: None)
        server.kill()
        server.start()
        with trio.fail_after(PATIENCE):
            await watched.wait()
            epoch = (await log.open("new")).epoch
            await log.append("new", epoch, Append(post()))
            await told.until(1)


async def test_an_answered_conversation_goes_by_itself_when_it_is_old(server: RedisServer) -> None:
    async with log_at(server.path, retention_seconds=1000) as log:
        epoch = (await log.open("c")).epoch
        lease = await log.claim("c")
        await log.append("c", epoch, Append(post("1"), "1"))
        assert server.ask("TTL", "tricorn:entries:c") == "-1"  # nobody has answered it
        await log.append("c", epoch, Append(completed(), lease=lease, answered=1))
        assert 0 < int(server.ask("TTL", "tricorn:entries:c")) <= 1000
        assert 0 < int(server.ask("TTL", "tricorn:keys:c")) <= 1000
        server.ask("DEL", "tricorn:entries:c", "tricorn:keys:c")  # as if that time were over
        assert await log.open("c") == (epoch, 3, 2, 1)
        assert (await log.append("c", epoch, Append(post("1"), "1")))[0].seq == 3


# The address


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis:///1",
        "redis://h:port/1",
        "redis://h:99999",
        "redis://h/one",
        "redis://h/-1",
        "redis://h/1?x=2",
        "http://h",
        "unix://",
        "unix:///s?db=x",
        "redis://user:hush@h:x",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(SettingError, match="redis://") as refused:
        connect(url, ChatSettings())
    assert "hush" not in str(refused.value)


async def test_no_redis_there() -> None:
    with pytest.raises(Unavailable, match=r"^Redis at /nowhere/s: .*No such file") as raised:
        async with log_at("/nowhere/s", log_timeout=0.01):
            pass
    assert "\n" not in str(raised.value)


async def test_a_wrong_password_is_told_and_not_shown(server: RedisServer) -> None:
    server.ask("CONFIG", "SET", "requirepass", "right")
    log = connect(f"unix://default:hush@{server.path}", ChatSettings(log_timeout=0.2))
    with pytest.raises(Unavailable, match="password") as raised:
        async with log:
            pass
    assert "hush" not in str(raised.value)
    async with connect(f"unix://default:right@{server.path}?db=3", ChatSettings()) as log:
        assert (await log.open("c")).head == 0


async def test_databases_do_not_mix(server: RedisServer) -> None:
    address = f"unix://{server.path}"
    async with connect(address, ChatSettings()) as one, connect(f"{address}?db=1", ChatSettings()) as other:
        await one.append("c", (await one.open("c")).epoch, Append(post()))
        assert (await other.open("c")).head == 0


@pytest.mark.parametrize("url", ["redis://localhost", "redis://u:p@[::1]:6380/2", "rediss://h", "unix:///s"])
def test_what_is_taken(url: str) -> None:
    assert connect(url, ChatSettings()).shared


async def test_an_outage_is_over_when_the_block_is_left(server: RedisServer) -> None:
    async with log_at(server.path):
        server.kill()
        await trio.testing.wait_all_tasks_blocked()
