"""The log in PostgreSQL, on a real server: what every log promises, and what becomes of it when the server goes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from json import loads
from secrets import token_hex
from typing import Any

import psycopg
import pytest
import trio
import trio.testing

from fixtures.cutting_proxy import CuttingProxy, cutting_proxy
from fixtures.logs import PATIENCE, Told, texts
from fixtures.real_services import PostgresServer
from fixtures.records import Records
from tricorn.chat import Chat, Run
from tricorn.chat.logs import conformance
from tricorn.chat.logs.base import KEEP_EVERYTHING, Append, Log, PastLost, Retention, Unavailable
from tricorn.chat.logs.conformance import LEASE, completed, post, thought
from tricorn.chat.logs.postgres import PostgresLog, connect
from tricorn.chat.settings import ChatSettings
from tricorn.settings import SettingError


def log_at(url: str, **settings: Any) -> PostgresLog:
    return connect(url, ChatSettings(**{"lease": 1.5 * LEASE, **settings}))


def sql(server: PostgresServer, *statements: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(server.conninfo, autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


async def echo(run: Run) -> None:
    await run.say(run.message)


async def vanish(log: Log) -> None:
    assert isinstance(log, PostgresLog)
    log._running.cancel()  # its connections, and what it renews
    await trio.testing.wait_all_tasks_blocked()


@pytest.fixture
def server(postgres_server: PostgresServer) -> PostgresServer:
    sql(postgres_server, "DROP SCHEMA IF EXISTS tricorn CASCADE")
    return postgres_server


@pytest.fixture
async def proxy(server: PostgresServer) -> AsyncIterator[CuttingProxy]:
    """A proxy before the server; its URL is that of a port in the same directory."""
    async with cutting_proxy(f"{server.directory}/.s.PGSQL.5433", f"{server.directory}/.s.PGSQL.5432") as proxy:
        yield proxy


def through(proxy: CuttingProxy, server: PostgresServer) -> str:
    return f"{server.url}&port=5433"


# What every log promises


class Stores:
    def __init__(self, url: str) -> None:
        self.url = url

    @asynccontextmanager
    async def connect(self, retention: Retention = KEEP_EVERYTHING) -> AsyncIterator[Log]:
        async with log_at(self.url, retention_events=retention.events, retention_seconds=retention.seconds) as log:
            yield log

    async def vanish(self, log: Log) -> None:
        await vanish(log)


@pytest.mark.parametrize("case", conformance.CASES + conformance.SHARED_CASES, ids=lambda case: case.__name__)
async def test_conformance(case: conformance.Case, server: PostgresServer) -> None:
    with trio.fail_after(3 * PATIENCE):
        await case(Stores(server.url))


# When the server goes


@pytest.mark.parametrize("mode", ["immediate", "fast"])
async def test_a_restart_is_waited_for_and_loses_nothing(server: PostgresServer, mode: str) -> None:
    told = Told()
    async with log_at(server.url) as one, log_at(server.url) as other:
        epoch = (await one.open("c")).epoch
        await other.watch("c", told.hear)
        await one.append("c", epoch, Append(post("1"), "1"))
        await told.until(1)
        server.stop(mode)
        async with trio.open_nursery() as nursery:
            for n in range(2, 30):
                nursery.start_soon(one.append, "c", epoch, Append(post(str(n)), str(n)))
            await trio.testing.wait_all_tasks_blocked()
            server.start()
        await told.until(29)
        assert sorted(await texts(other), key=int) == [str(n) for n in range(1, 30)]
        assert (await one.open("c"))[:3] == (epoch, 1, 29)


async def test_killed_connections_are_made_anew(server: PostgresServer) -> None:
    told = Told()
    async with log_at(server.url) as log, log_at(server.url) as other:
        epoch = (await log.open("c")).epoch
        await other.watch("c", told.hear)
        for n in range(1, 4):
            sql(
                server,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tricorn'",
            )
            with trio.fail_after(PATIENCE):
                assert (await log.append("c", epoch, Append(post(str(n)))))[0].seq == n
            await told.until(n)
        assert await texts(log) == ["1", "2", "3"]


@pytest.mark.parametrize("leased", [True, False])
async def test_what_is_said_again_is_known_again(server: PostgresServer, proxy: CuttingProxy, leased: bool) -> None:
    """The answer is lost after the server has done what was asked."""
    async with log_at(through(proxy, server)) as log:
        epoch = (await log.open("c")).epoch
        lease = await log.claim("c") if leased else None
        for n in range(6):
            proxy.answers_left = 0 if n % 2 else None
            with trio.fail_after(PATIENCE):
                entry, _ = await log.append("c", epoch, Append(thought(str(n)), lease=lease))
            assert entry.seq == n + 1
            assert loads(entry.json)["text"] == str(n)
        assert await texts(log) == [str(n) for n in range(6)]


async def test_a_connection_that_says_nothing_any_more_is_given_up(server: PostgresServer, proxy: CuttingProxy) -> None:
    async with log_at(through(proxy, server), log_timeout=0.5) as log:
        epoch = (await log.open("c")).epoch
        await log.append("c", epoch, Append(post("1")))
        proxy.stalled = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(log.append, "c", epoch, Append(post("2")))
            await trio.testing.wait_all_tasks_blocked()
            proxy.stalled = False  # for the next connection
        assert await texts(log) == ["1", "2"]


async def test_who_watches_hears_after_a_cut_what_was_missed(server: PostgresServer, proxy: CuttingProxy) -> None:
    told = Told()
    async with log_at(server.url) as one, log_at(through(proxy, server)) as other:
        epoch = (await one.open("c")).epoch
        await other.watch("c", told.hear)
        target, proxy.target = proxy.target, "/nowhere"
        proxy.cut()
        await one.append("c", epoch, Append(post("1")))
        proxy.target = target
        await told.until(1)
        await one.append("c", epoch, Append(post("2")))
        await told.until(2)


async def test_a_server_that_lost_its_last_writes_is_found_out(server: PostgresServer) -> None:
    told = Told()
    async with log_at(server.url) as log:
        epoch = (await log.open("c")).epoch
        await log.watch("c", told.hear)
        await log.append("c", epoch, Append(post("1")))
        await log.append("c", epoch, Append(post("2")))
        await told.until(2)
        told.heads.clear()
        sql(
            server,
            "DELETE FROM tricorn.entry WHERE seq = 2",
            "UPDATE tricorn.conversation SET head = 1",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tricorn'",
        )
        await told.until(1)
        with pytest.raises(PastLost):
            await log.append("c", epoch, Append(post("3")))


async def test_an_empty_database_is_another_past(server: PostgresServer) -> None:
    async with log_at(server.url) as log:
        epoch = (await log.open("c")).epoch
        lease = await log.claim("c")
        await log.append("c", epoch, Append(post("1")))
        sql(server, "TRUNCATE tricorn.conversation, tricorn.entry", "UPDATE tricorn.store SET id = 'another'")
        with pytest.raises(PastLost):
            await log.append("c", epoch, Append(completed(), lease=lease, answered=1))
        assert (await log.open("c")).head == 0
        assert (await log.open("c")).epoch != epoch


async def test_a_restored_dump_is_another_past(server: PostgresServer, capfd: pytest.CaptureFixture[str]) -> None:
    async with log_at(server.url) as log:
        epoch = (await log.open("c")).epoch
        await log.append("c", epoch, Append(post("1")))
        dump = server.dump("tricorn")
        await log.append("c", epoch, Append(post("2")))
    async with log_at(server.url) as log:
        assert (await log.open("c")).epoch == epoch
    records = Records(capfd)
    assert not records.read("WARNING")
    sql(server, "DROP SCHEMA tricorn CASCADE")
    server.restore(dump)
    async with log_at(server.url) as log:
        state = await log.open("c")
        assert state.head == 1
        assert state.epoch != epoch
        assert (await log.open("new")).epoch
        with pytest.raises(PastLost):
            await log.append("c", epoch, Append(post("3")))
    assert "it was restored from a copy" in records.read("WARNING")[0]["message"]
    async with log_at(server.url) as log:
        assert (await log.open("c")).epoch == state.epoch
    assert not records.read("WARNING")


async def test_a_role_that_does_not_own_the_schema_can_still_use_it(server: PostgresServer) -> None:
    async with log_at(server.url):
        pass
    sql(server, "ALTER TABLE tricorn.store DROP COLUMN made_as")  # as made by an earlier version
    role = f"user_{token_hex(4)}"
    sql(
        server,
        f"CREATE ROLE {role} LOGIN",
        f"GRANT USAGE ON SCHEMA tricorn TO {role}",
        f"GRANT ALL ON ALL TABLES IN SCHEMA tricorn TO {role}",
        f"GRANT ALL ON ALL SEQUENCES IN SCHEMA tricorn TO {role}",
    )
    async with log_at(server.url.replace("postgres@", f"{role}@")) as log:
        epoch = (await log.open("c")).epoch
        await log.append("c", epoch, Append(post("1")))
    async with log_at(server.url) as log:
        assert (await log.open("c")).epoch == epoch


async def test_an_examination_tells_what_is_missing_and_epochs_can_be_renewed(server: PostgresServer) -> None:
    async with log_at(server.url) as log:
        for key in ("a", "b"):
            epoch = (await log.open(key)).epoch
            for n in range(3):
                await log.append(key, epoch, Append(post(str(n))))
        assert await log_at(server.url).examine() == (2, 6, [])
        await log_at(server.url).renew_epochs()
        assert (await log.open("b")).head == 3
        with pytest.raises(PastLost):
            await log.append("b", epoch, Append(post("late")))
        sql(server, "DELETE FROM tricorn.entry WHERE seq = 2 AND conversation = 1")
        problem = "conversation 'a' should have the entries 1 to 3, and has 2 from 1 to 3"
        assert await log_at(server.url).examine() == (2, 5, [problem])


async def test_a_standby_is_waited_for_until_it_is_promoted(server: PostgresServer) -> None:
    async with log_at(server.url) as log:
        epoch = (await log.open("c")).epoch
        await log.append("c", epoch, Append(post("1"), "1"))
        server.stop("fast")
        server.start(default_transaction_read_only="on")  # as a standby answers
        try:
            with trio.move_on_after(0.5) as scope:
                await log.append("c", epoch, Append(post("2"), "2"))
            assert scope.cancelled_caught
        finally:
            server.stop("fast")
            server.start()
        with trio.fail_after(PATIENCE):
            assert (await log.append("c", epoch, Append(post("2"), "2")))[0].seq == 2


async def test_one_that_cannot_be_served_does_not_hold_up_the_others(server: PostgresServer) -> None:
    async with log_at(server.url) as log:
        epoch = {key: (await log.open(key)).epoch for key in "abc"}
        sql(server, "ALTER TABLE tricorn.entry ADD CONSTRAINT small CHECK (length(json) < 1000)")
        results: dict[str, object] = {}

        async def append(key: str, text: str) -> None:
            try:
                results[key] = (await log.append(key, epoch[key], Append(post(text))))[0].seq
            except Unavailable as error:
                results[key] = str(error)

        async with trio.open_nursery() as nursery:
            for key, text in (("a", "x"), ("b", "x" * 2000), ("c", "x")):
                nursery.start_soon(append, key, text)
        assert (results["a"], results["c"]) == (1, 1)
        assert "violates check constraint" in str(results["b"])
        assert "\n" not in str(results["b"])


async def test_at_the_connection_limit_of_its_role_it_is_not_ready_and_says_why(
    server: PostgresServer, capfd: pytest.CaptureFixture[str]
) -> None:
    records = Records(capfd)
    role = f"few_{token_hex(4)}"
    sql(server, f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 3", f"GRANT CREATE ON DATABASE postgres TO {role}")
    url = server.url.replace("postgres@", f"{role}@")
    async with log_at(url) as log, Chat(echo, log=log) as chat:
        with trio.fail_after(PATIENCE):
            while await chat.why_not_ready() != "the log does not answer":  # noqa: ASYNC110
                await trio.sleep(0.01)
        said = records.read_all()
        assert [each["severity"] for each in said if "too many connections for role" in each["message"]] == [
            "WARNING",  # once, however often it tries
            "ERROR",
        ]
        sql(server, f"ALTER ROLE {role} CONNECTION LIMIT -1")
        with trio.fail_after(PATIENCE):
            while await chat.why_not_ready() is not None:  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_a_lock_that_somebody_holds_is_not_waited_for_for_ever(server: PostgresServer) -> None:
    async with log_at(server.url, log_timeout=0.5) as log:
        epoch = (await log.open("c")).epoch
        await log.append("c", epoch, Append(post("1")))
        with psycopg.connect(server.conninfo) as other:
            other.execute("SELECT FROM tricorn.conversation FOR UPDATE")
            with pytest.raises(Unavailable, match=r"statement timeout|did not answer within"):
                await log.append("c", epoch, Append(post("2")))
            with pytest.raises(Unavailable, match=r"statement timeout|did not answer within"):
                await log.claim("c")
        assert (await log.append("c", epoch, Append(post("2"))))[0].seq == 2


async def test_who_gives_up_waits_no_longer(server: PostgresServer) -> None:
    async with log_at(server.url) as log:
        epoch = (await log.open("c")).epoch
        server.stop()
        try:
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
        finally:
            server.start()
        with trio.fail_after(PATIENCE):
            assert await log.read("c", 0, 10) == []


async def test_cancelled_calls_leave_nothing_behind(server: PostgresServer) -> None:
    async with log_at(server.url) as log:
        epoch = (await log.open("c")).epoch
        for turns in range(100):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(log.append, "c", epoch, Append(post(f"{turns}"), f"{turns}"))
                nursery.start_soon(log.read, "c", 0, 10)
                for _ in range(turns % 7):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        with trio.fail_after(PATIENCE):
            for turns in range(100):
                await log.append("c", epoch, Append(post(f"{turns}"), f"{turns}"))
        assert sorted(await texts(log), key=int) == [f"{turns}" for turns in range(100)]


async def test_a_name_too_long_for_a_notice(server: PostgresServer) -> None:
    """It does not fit, so that whoever listens looks after everything."""
    told, key = Told(), "x" * 2000
    async with log_at(server.url) as one, log_at(server.url) as other:
        sql(
            server,
            "CREATE OR REPLACE FUNCTION tricorn.tell(k text, head bigint, cancelled text) RETURNS void LANGUAGE sql"
            " AS $$ SELECT pg_notify('tricorn', '') $$",
        )
        await other.watch(key, told.hear)
        await one.append(key, (await one.open(key)).epoch, Append(post()))
        await told.until(1)


async def test_growing_old_where_nobody_comes_by(server: PostgresServer) -> None:
    async with log_at(server.url) as log:
        epoch = (await log.open("c")).epoch
        lease = await log.claim("c")
        await log.append("c", epoch, Append(post()))
        await log.append("c", epoch, Append(completed(), lease=lease, answered=1))
        sql(server, "SELECT tricorn.sweep(0)")
        assert (await log.open("c"))[1:] == (3, 2, 1)


# Starting


async def test_several_start_at_once(server: PostgresServer) -> None:
    async def start() -> None:
        async with log_at(server.url) as log:
            await log.check()

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(start)


async def test_a_newer_schema_is_refused(server: PostgresServer) -> None:
    async with log_at(server.url):
        pass
    sql(server, "UPDATE tricorn.version SET number = 2")
    with pytest.raises(Unavailable, match="version 2"):
        async with log_at(server.url):
            pass


async def test_who_may_not_make_the_schema_is_told(server: PostgresServer) -> None:
    sql(server, "DROP ROLE IF EXISTS guest", "CREATE ROLE guest LOGIN")
    with pytest.raises(Unavailable, match="permission denied"):
        async with log_at(server.url.replace("postgres@", "guest@")):
            pass


async def test_no_server_there() -> None:
    with pytest.raises(Unavailable, match=r"^PostgreSQL at /nowhere:5432: .*No such file") as raised:
        async with log_at("postgresql://me:hush@/x?host=/nowhere", log_timeout=0.05):
            pass
    assert "hush" not in str(raised.value)
    assert "\n" not in str(raised.value)


async def test_names_of_hosts_are_looked_up_by_trio(server: PostgresServer) -> None:
    with pytest.raises(Unavailable, match="localhost:1"):
        async with log_at("postgresql://localhost,localhost:1/x", log_timeout=0.2):
            pass


async def test_the_first_of_several_hosts_that_answers_is_taken(server: PostgresServer) -> None:
    async with log_at(f"postgresql://postgres@/postgres?host=/nowhere,{server.directory}") as log:
        await log.check()


@pytest.mark.parametrize(
    "url", ["postgresql:", "http://h/d", "postgresql://u:hush@h:port/d", "postgresql://h/?x=1", ""]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(SettingError, match="postgresql://") as refused:
        connect(url, ChatSettings())
    assert "hush" not in str(refused.value)


async def test_an_outage_is_over_when_the_block_is_left(server: PostgresServer) -> None:
    try:
        async with log_at(server.url):
            server.stop()
    finally:
        server.start()
