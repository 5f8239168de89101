"""The log in a file: what every log promises, and what becomes of it when the disk or the process fails."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio

from fixtures.records import Records
from tricorn.chat.logs import conformance
from tricorn.chat.logs.base import KEEP_EVERYTHING, Append, LeaseLost, Log, PastLost, Retention, Unavailable
from tricorn.chat.logs.conformance import completed, post
from tricorn.chat.logs.sqlite import SQLiteLog, connect
from tricorn.chat.settings import ChatSettings
from tricorn.settings import SettingError

NOBODY = 65534
KILLS = 50
SEED = 20261125


def log_at(path: Path | str, **settings: Any) -> SQLiteLog:
    return connect(f"sqlite:///{path}", ChatSettings(**settings))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a log?#%20.db"


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    return Records(capfd)


class Stores:
    def __init__(self, path: Path) -> None:
        self.path = path

    @asynccontextmanager
    async def connect(self, retention: Retention = KEEP_EVERYTHING) -> AsyncIterator[Log]:
        async with log_at(self.path, retention_events=retention.events, retention_seconds=retention.seconds) as log:
            yield log

    async def vanish(self, log: Log) -> None:
        raise AssertionError("it is alone")


@pytest.mark.parametrize("case", conformance.CASES, ids=lambda case: case.__name__)
async def test_conformance(case: conformance.Case, path: Path) -> None:
    await case(Stores(path))


async def append(log: Log, text: str, conversation: str = "c") -> int:
    epoch = (await log.open(conversation)).epoch
    return (await log.append(conversation, epoch, Append(post(text))))[0].seq


# The file


async def test_a_second_process_is_refused_and_a_successor_waits(path: Path) -> None:
    async with log_at(path) as log:
        await append(log, "1")
        with pytest.raises(Unavailable, match="another process has it"):
            async with log_at(path, log_timeout=0.05):
                pass
        with (
            closing(sqlite3.connect(path, timeout=0)) as other,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            other.execute("SELECT * FROM entry")
        async with trio.open_nursery() as nursery:

            async def succeed(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
                task_status.started()
                async with log_at(path) as successor:
                    assert await append(successor, "2") == 2

            await nursery.start(succeed)
            log._running.cancel()


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"not a database at all, just some text" * 100, "not a database"), (None, "not a log of Tricorn")],
)
async def test_other_files_are_refused(path: Path, content: bytes | None, problem: str) -> None:
    if content is None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE shop (price)")
        other.close()
    else:
        path.write_bytes(content)  # noqa: ASYNC240
    with pytest.raises(Unavailable, match=problem):
        async with log_at(path):
            pass


async def test_a_newer_schema_is_refused(path: Path) -> None:
    async with log_at(path):
        pass
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 2")
    other.close()
    with pytest.raises(Unavailable, match="version 2"):
        async with log_at(path):
            pass


async def test_a_file_that_cannot_be_written_to_is_refused() -> None:
    with TemporaryDirectory() as directory:  # where others than root can get to
        path = Path(directory, "log.db")
        async with log_at(path):
            pass
        os.chmod(path, 0o444)
        user = os.geteuid()
        if user == 0:
            os.chmod(directory, 0o777)
            os.seteuid(NOBODY)
        try:
            with pytest.raises(Unavailable, match=r"log\.db: it cannot be written to"):
                async with log_at(path):
                    pass
        finally:
            os.seteuid(user)


def modes(path: Path) -> dict[str, int]:
    return {each.name.removeprefix(path.name): each.stat().st_mode & 0o777 for each in path.parent.iterdir()}


async def test_only_its_owner_can_open_a_new_file_and_the_files_beside_it(path: Path, records: Records) -> None:
    before = os.umask(0)
    try:
        async with log_at(path) as log:
            await append(log, "1")
            found = modes(path)
    finally:
        os.umask(before)
    assert {"", "-wal"} <= found.keys()
    assert set(found.values()) == {0o600}
    assert not records.read("WARNING")


@pytest.mark.parametrize(("mode", "warnings"), [(0o640, 0), (0o644, 1)])
async def test_the_mode_of_a_file_that_exists_stays_and_one_for_everybody_is_warned_of(
    path: Path, records: Records, mode: int, warnings: int
) -> None:
    async with log_at(path):
        pass
    path.chmod(mode)  # noqa: ASYNC240
    async with log_at(path) as log:
        await append(log, "1")
        assert {modes(path)[name] for name in ("", "-wal")} == {mode}
    said = records.read("WARNING")
    assert len(said) == warnings
    assert all("chmod 600" in each["message"] for each in said)


async def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"nowhere/x\.db: unable to open database file"):
        async with log_at(tmp_path / "nowhere/x.db"):
            pass


@pytest.mark.parametrize("url", ["sqlite:", "sqlite://", "sqlite:///", "sqlite://host/x", "sqlite:///x/", "other:///x"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(SettingError, match="sqlite:///PATH"):
        connect(url, ChatSettings())


async def test_a_path_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with log_at(":memory:") as log:
        await append(log, "1")
    assert (tmp_path / ":memory:").stat().st_size > 0


async def test_a_file_that_was_moved_away_takes_nothing_until_it_is_back(path: Path) -> None:
    async with log_at(path) as log:
        await append(log, "1")
        os.rename(path, f"{path}.away")
        for call in (log.check, lambda: append(log, "2")):
            with pytest.raises(Unavailable, match="moved away"):
                await call()
        os.rename(f"{path}.away", path)
        await log.check()
        assert await append(log, "2") == 2


@pytest.mark.parametrize("replaced", [False, True])
async def test_without_its_wal_file_it_takes_nothing_and_loses_nothing(path: Path, replaced: bool) -> None:
    wal = f"{path}-wal"
    async with log_at(path) as log:
        await append(log, "1")
        os.unlink(wal)
        if replaced:
            shutil.copy(path, wal)
        for call in (log.check, lambda: append(log, "2")):
            with pytest.raises(Unavailable, match="-wal file has been removed"):
                await call()
    async with log_at(path) as log:
        assert await append(log, "3") == 2


async def test_a_damaged_file_is_told(path: Path) -> None:
    async with log_at(path) as log:
        for n in range(200):
            await append(log, "x" * 1000 + str(n))
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(random.randbytes(os.fstat(file.fileno()).st_size - 8192))
    async with log_at(path) as log:
        with pytest.raises(Unavailable, match="malformed"):
            await log.read("c", 0, 1000)
        with pytest.raises(Unavailable, match="malformed"):
            await append(log, "y")


async def refusal(call: Awaitable[object]) -> str:
    try:
        await call
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


async def test_what_fails_fails_nobody_beside_it(path: Path) -> None:
    """Many wait at a time: one is refused by a trigger, as a damaged page would, and one by a bug."""
    async with log_at(path) as log:
        epoch = (await log.open("c")).epoch
        await append(log, "1")
        refused: list[str] = []

        async def call(what: Awaitable[object]) -> None:
            refused.append(await refusal(what))

        log._file._db.execute(
            "CREATE TEMP TRIGGER t BEFORE INSERT ON entry WHEN NEW.key = 'bad' BEGIN SELECT RAISE (FAIL, 'torn'); END"
        )
        async with trio.open_nursery() as nursery:
            for key in ("a", "bad", "b"):
                nursery.start_soon(call, log.append("c", epoch, Append(post(key), key)))
            nursery.start_soon(call, log.read("c", 2**64, 1))
            nursery.start_soon(call, log.append("c", epoch, Append(post("c"), "c")))
        assert sorted(refused) == [
            "",
            "",
            "",
            f"Unavailable: SQLite file {path}: OverflowError: Python int too large to convert to SQLite INTEGER",
            f"Unavailable: SQLite file {path}: torn",
        ]
        texts = {json.loads(entry.json)["text"] for entry in await log.read("c", 0, 10)}
        assert texts == {"1", "a", "b", "c"}
        assert (await log.open("c")).head == 4


async def test_a_full_disk_acknowledges_nothing_and_is_over_when_there_is_room(tmp_path: Path) -> None:
    """A limit on the size of files fails writes as a full disk does."""
    path = tmp_path / "log.db"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    acknowledged = 0
    try:
        async with log_at(path) as log:
            assert await append(log, "1") == 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, unlimited[1]))
            with pytest.raises(Unavailable, match=r"full|I/O") as raised:  # noqa: PT012
                while True:
                    acknowledged = await append(log, "x" * 5000)
            assert "\n" not in str(raised.value)
            with pytest.raises(Unavailable):
                await append(log, "x" * 250_000)
            assert (await log.open("c")).head == acknowledged
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            await log.check()
            assert await append(log, "after") == acknowledged + 1
        async with log_at(path) as log:
            assert len(await log.read("c", 0, 10_000)) == acknowledged + 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, before)


async def test_another_file_is_another_past(path: Path) -> None:
    async with log_at(path) as log:
        epoch = (await log.open("c")).epoch
        await append(log, "1")
    shutil.move(path, f"{path}.old")
    async with log_at(path) as log:
        with pytest.raises(PastLost):
            await log.append("c", epoch, Append(post()))


@pytest.mark.parametrize("while_open", [False, True])
async def test_a_file_that_was_put_back_from_a_copy_is_another_past(
    path: Path, records: Records, while_open: bool
) -> None:
    copies = {each: Path(f"{each}.copy") for each in (path, Path(f"{path}-wal"))}

    def copy() -> None:
        for each, to in copies.items():
            if each.exists():
                shutil.copy(each, to)

    async with log_at(path) as log:
        epoch = (await log.open("c")).epoch
        await append(log, "1")
        if while_open:  # as a snapshot of the file system
            log._file._noted = 0.0
            await append(log, "2")
            copy()
            log._file._noted = 0.0
            await append(log, "3")
    if not while_open:
        copy()
    async with log_at(path) as log:
        assert (await log.open("c")).epoch == epoch
        await append(log, "4")
    assert not records.read("WARNING")
    for each, to in copies.items():
        if to.exists():
            shutil.copy(to, each)
    async with log_at(path) as log:
        state = await log.open("c")
        assert state.epoch != epoch
        assert state.head == (2 if while_open else 1)
        with pytest.raises(PastLost):
            await log.append("c", epoch, Append(post()))
    (warning,) = records.read("WARNING")
    assert "it was restored from a copy" in warning["message"]
    async with log_at(path) as log:
        assert (await log.open("c")).epoch == state.epoch
    assert not records.read("WARNING")


@pytest.mark.parametrize("content", [b"", b"anything", b"\xff" * 100, None])
async def test_without_the_note_beside_it_a_file_is_taken_as_it_is(
    path: Path, records: Records, content: bytes | None
) -> None:
    async with log_at(path) as log:
        epoch = (await log.open("c")).epoch
    seen = Path(f"{path}-seen")
    if content is None:
        os.unlink(seen)
        os.mkdir(seen)  # it cannot be written
    else:
        seen.write_bytes(content)  # noqa: ASYNC240
    async with log_at(path) as log:
        assert (await log.open("c")).epoch == epoch
    assert not records.read("WARNING")


async def test_an_examination_tells_what_is_missing_and_epochs_can_be_renewed(path: Path) -> None:
    log = log_at(path)
    with pytest.raises(Unavailable, match="there is no such file"):
        await log.examine()
    async with log_at(path) as log:
        for n in range(3):
            await append(log, str(n))
            await append(log, str(n), "u/complete")
        epoch = (await log.open("c")).epoch
        with pytest.raises(Unavailable, match="another process has it"):
            await log_at(path).examine()
    log = log_at(path)
    assert await log.examine() == (2, 6, [])
    await log.renew_epochs()
    async with log_at(path) as log:
        assert (await log.open("c")).epoch != epoch
        assert (await log.open("c")).head == 3
    with sqlite3.connect(path) as other:
        other.execute(
            "DELETE FROM entry WHERE seq = 2 AND conversation = (SELECT id FROM conversation WHERE key = 'c')"
        )
    other.close()
    problem = "conversation 'c' should have the entries 1 to 3, and has 2 from 1 to 3"
    assert await log_at(path).examine() == (2, 5, [problem])


async def test_no_lease_outlives_the_process(path: Path) -> None:
    async with log_at(path) as log:
        epoch = (await log.open("c")).epoch
        await append(log, "1")
        old = await log.claim("c")
        assert old is not None
    async with log_at(path) as log:
        assert await log.unanswered(10) == ["c"]
        with pytest.raises(LeaseLost):
            await log.append("c", epoch, Append(completed(), lease=old))
        new = await log.claim("c")
        assert new is not None
        assert new.token > old.token


async def test_what_is_old_goes_where_nobody_comes_by(path: Path) -> None:
    async with log_at(path) as log:
        epoch = (await log.open("c")).epoch
        await append(log, "1")
        lease = await log.claim("c")
        await log.append("c", epoch, Append(completed(), lease=lease, answered=1))
    async with log_at(path, retention_seconds=1e-6) as log:
        while await log.read("c", 0, 10):
            await trio.testing.wait_all_tasks_blocked(0.001)


async def test_a_bug_in_forgetting_is_reported_and_ends_nothing(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with log_at(path) as log:
        await append(log, "1")
    with sqlite3.connect(path) as other:
        other.execute("UPDATE conversation SET head = 'no number'")
    other.close()
    async with log_at(path, retention_seconds=1e-6) as log:
        await log.check()
        await trio.testing.wait_all_tasks_blocked()
        await log.check()
    assert "TypeError" in capfd.readouterr().err


async def test_many_that_wait_are_one_transaction(path: Path) -> None:
    async with log_at(path) as log:
        await log.check()
        turns = 0
        serve = log._file.serve

        def counted(asked: Any) -> Any:
            nonlocal turns
            turns += 1
            return serve(asked)

        log._file.serve = counted  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            for n in range(300):
                nursery.start_soon(append, log, "x", f"c{n}")
    assert turns <= 6


# The end of the process


WRITER = """
import sys
import trio
from tricorn.chat.logs.base import Append
from tricorn.chat.logs.conformance import post
from tricorn.chat.logs.sqlite import connect
from tricorn.chat.settings import ChatSettings

async def write(log, conversation, first):
    epoch = (await log.open(conversation)).epoch
    for n in range(first, 10**9):
        entry, repeated = await log.append(conversation, epoch, Append(post(str(n)), f"{conversation}:{n}"))
        print(conversation, entry.seq, n, int(repeated), epoch, flush=True)

async def read(log, conversation):
    seen = 0
    while True:
        for entry in await log.read(conversation, seen, 100):
            seen = entry.seq
            print("read", conversation, seen, flush=True)
        await trio.sleep(0)

async def main(path, first):
    async with connect(f"sqlite:///{path}", ChatSettings()) as log, trio.open_nursery() as nursery:
        for conversation in "abc":
            nursery.start_soon(write, log, conversation, first)
            nursery.start_soon(read, log, conversation)

trio.run(main, sys.argv[1], int(sys.argv[2]))
"""


def kill_writers(path: Path) -> tuple[dict[str, dict[int, int]], dict[str, int], set[tuple[str, str]]]:
    """What was acknowledged, by conversation: number → seq; up to where was read; the epochs that were seen."""
    moments = random.Random(SEED)
    acknowledged: dict[str, dict[int, int]] = {"a": {}, "b": {}, "c": {}}
    epochs: set[tuple[str, str]] = set()
    delivered = dict.fromkeys("abc", 0)
    for _ in range(KILLS):
        first = min((max(numbers, default=0) for numbers in acknowledged.values()), default=0)
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(first)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(moments.randrange(1, 200))]
            writer.kill()
            for line in [*lines, *writer.stdout.read().splitlines(keepends=True)]:
                if not line.endswith("\n"):
                    continue  # cut off by the kill
                if line.startswith("read"):
                    _, conversation, seq = line.split()
                    delivered[conversation] = max(delivered[conversation], int(seq))
                    continue
                conversation, seq, number, repeated, epoch = line.split()
                if int(number) in acknowledged[conversation]:  # else what was lost comes in again, and nobody knows
                    assert repeated == "1", line
                assert acknowledged[conversation].setdefault(int(number), int(seq)) == int(seq)
                epochs.add((conversation, epoch))
    return acknowledged, delivered, epochs


async def test_kill_9_at_any_moment_loses_nothing_that_was_acknowledged(path: Path) -> None:
    """Each time a writer begins where the last one was killed, with the post that had no answer."""
    acknowledged, delivered, epochs = await trio.to_thread.run_sync(kill_writers, path)
    assert len(epochs) == 3
    async with log_at(path) as log:
        for conversation, numbers in acknowledged.items():
            entries = await log.read(conversation, 0, 10**6)
            assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
            texts = [int(json.loads(entry.json)["text"]) for entry in entries]
            assert len(set(texts)) == len(texts)
            assert all(texts[seq - 1] == number for number, seq in numbers.items())
            assert delivered[conversation] <= len(entries)
