"""The file of the SQLite log. Everything here blocks, and is for one thread at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from os import O_CLOEXEC, O_CREAT, O_EXCL, O_RDWR, W_OK, access, pread, pwrite, stat
from os import close as close_file
from os import open as open_file
from os.path import abspath, exists
from secrets import token_hex
from sqlite3 import DatabaseError, connect
from time import time
from typing import Any, NamedTuple

from tricorn.chat.logs.base import (
    KEEP_EVERYTHING,
    PROBLEMS,
    Append,
    Draft,
    Entry,
    Examined,
    LogState,
    Retention,
    incomplete,
)

VERSION = 1
APPLICATION = 0x54524943  # marks a file as Tricorn's
SWEPT_AT_ONCE = 1000  # conversations
WAL_PAGES = 4000  # of 4 KiB: pages that change often are copied into the file once in so many
NOTED_AFTER = 1.0  # seconds between two notes beside the file of how far it has come
ROWS = 1000  # conversations whose rows are kept in memory

_SCHEMA = """
CREATE TABLE store (id TEXT NOT NULL, checked REAL);
CREATE TABLE conversation (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    first INTEGER NOT NULL DEFAULT 1,
    head INTEGER NOT NULL DEFAULT 0,
    asked INTEGER NOT NULL DEFAULT 0,
    answered INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX conversation_unanswered ON conversation (id) WHERE asked > answered;
CREATE TABLE entry (
    conversation INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    json BLOB NOT NULL,
    key TEXT,
    at REAL NOT NULL,
    PRIMARY KEY (conversation, seq)
) WITHOUT ROWID;
CREATE UNIQUE INDEX entry_key ON entry (conversation, key) WHERE key IS NOT NULL;
"""


_INCOMPLETE = """
SELECT c.key, first, head, count(seq), min(seq), max(seq)
FROM conversation c LEFT JOIN entry e ON e.conversation = c.id
GROUP BY c.id
HAVING count(seq) <> head - first + 1 OR min(seq) <> first OR max(seq) <> head
LIMIT ?
"""


class _Row(NamedTuple):
    """A conversation in the file."""

    id: int
    first: int
    head: int
    asked: int
    answered: int


class File:
    """A file that only this process has open.

    In WAL mode a commit is one append to a file; with `synchronous=FULL` it is on the disk before it returns. The lock
    is the operating system's, so it ends with the process, however that ends.

    Attributes:
        is_open_to_all: every user of this machine may read it, or write to it.
        is_restored: it was put back from a copy, so that entries are lost. Its conversations have got another epoch.

    Raises:
        sqlite3.Error: it cannot be opened, is not ours, or another process has it (`SQLITE_BUSY`).
    """

    def __init__(self, path: str) -> None:
        self._rows: dict[str, tuple[str, _Row]] = {}  # with the epoch: as they are, or will be after `_settle`
        self._unsettled: dict[str, _Row] = {}  # those that appends of this transaction have changed
        self._path = abspath(path)
        if exists(self._path) and not access(self._path, W_OK, effective_ids=True):
            raise DatabaseError("it cannot be written to")  # SQLite calls that an I/O error
        _make_private(self._path)
        self._witness = Witness(f"{self._path}-seen")
        self._db = connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
            self._db.execute("BEGIN IMMEDIATE")
            self._migrate()
            self._witness.open()
            ((store, noted),) = self._db.execute("SELECT id, checked FROM store")
            self.is_restored = self._witness.has_seen_more(store, noted or 0.0)
            self._store: str = self._renew_store() if self.is_restored else store
            self._noted = self._note()
            self._db.execute("COMMIT")
            self._witness.note(self._store, self._noted)
            self._identity = _identities(self._path)
            self.is_open_to_all = bool(stat(self._path).st_mode & 0o007)
        except BaseException:
            self._witness.close()
            self._db.close()
            raise

    def _migrate(self) -> None:
        ((version,),) = self._db.execute("PRAGMA user_version")
        ((application,),) = self._db.execute("PRAGMA application_id")
        ((tables,),) = self._db.execute("SELECT count(*) FROM sqlite_schema")
        if (version, application, tables) == (0, 0, 0):
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
            self._db.execute("INSERT INTO store (id) VALUES (?)", [token_hex(16)])
            self._db.execute(f"PRAGMA application_id = {APPLICATION}")
            self._db.execute(f"PRAGMA user_version = {VERSION}")
        elif application != APPLICATION:
            raise DatabaseError("it is a database, but not a log of Tricorn")
        elif version != VERSION:
            raise DatabaseError(f"its schema has version {version}, and this Tricorn knows {VERSION}")

    def close(self) -> None:
        with suppress(DatabaseError):  # then a copy from before cannot be told from this file
            noted = self._note()
            self._witness.note(self._store, noted)
        self._witness.close()
        self._db.close()

    def serve(self, asked: Sequence[tuple[Any, ...]]) -> Sequence[Any]:
        """Do steps with their arguments in one transaction. Return results, once they are on the disk, or errors.

        If a step fails, each step gets a transaction of its own, so that none fails because of another.
        """
        before = self._db.total_changes
        answers: list[Any] = []
        try:
            self._db.execute("BEGIN")
            for step, *arguments in asked:
                if step is not File.append:
                    self._settle()
                answers.append(step(self, *arguments))
            self._settle()
            noted = self._noted
            if self._db.total_changes != before:
                self._check_still_there()
                if abs(time() - noted) >= NOTED_AFTER:
                    noted = self._note()
            self._db.execute("COMMIT")
            if noted != self._noted:
                self._noted = noted
                self._witness.note(self._store, noted)
        except Exception as error:
            with suppress(DatabaseError):  # SQLite may have rolled back already
                self._db.execute("ROLLBACK")
            self._rows.clear()
            self._unsettled.clear()
            if len(asked) == 1 or len(answers) == len(asked):
                return [error] * len(asked)
        else:
            return answers
        return [answer for each in asked for answer in self.serve([each])]

    # Steps

    def check(self) -> None:
        self._db.execute("UPDATE store SET checked = checked")

    def open(self, key: str, retention: Retention) -> LogState:
        row = self._row(key)
        if row is None:
            return LogState(self._epoch(key), 1, 0, 0)
        self._rows.pop(key, None)
        first = self._forget(row, retention)
        return LogState(self._epoch(key), first, row.head, row.answered)

    def append(
        self, key: str, epoch: str, event: Draft, append: Append, retention: Retention
    ) -> tuple[Entry, bool] | None:
        """Return None if the conversation has another epoch."""
        known = self._rows.get(key)
        if known is None:
            known = self._epoch(key), self._row(key) or _Row(0, 1, 0, 0, 0)
        if epoch != known[0]:
            return None
        id, first, head, asked, answered = known[1]
        if id == 0:
            ((id,),) = self._db.execute("INSERT INTO conversation (key) VALUES (?) RETURNING id", (key,)).fetchall()
        elif append.key is not None:
            found = self._find(known[1], append.key)
            if found is not None:
                return found, True
        entry = event.entry(head + 1)
        if append.is_post:
            asked = entry.seq
        if append.answered is not None:
            answered = append.answered
        row = _Row(id, first, entry.seq, asked, answered)
        self._db.execute("INSERT INTO entry VALUES (?, ?, ?, ?, ?)", (id, entry.seq, entry.json, append.key, time()))
        self._unsettled[key] = row
        if retention == KEEP_EVERYTHING:
            if len(self._rows) >= ROWS:
                self._rows.clear()
            self._rows[key] = epoch, row
        else:
            self._settle()
            self._forget(row, retention)
        return entry, False

    def _settle(self) -> None:
        """Write the rows that appends have changed, each once."""
        if self._unsettled:
            rows = [(row.head, row.asked, row.answered, row.id) for row in self._unsettled.values()]
            self._db.executemany("UPDATE conversation SET head = ?, asked = ?, answered = ? WHERE id = ?", rows)
            self._unsettled.clear()

    def find(self, key: str, event_key: str) -> Entry | None:
        row = self._row(key)
        return None if row is None else self._find(row, event_key)

    def read(self, key: str, after: int, limit: int) -> list[Entry]:
        rows = self._db.execute(
            "SELECT seq, json FROM entry WHERE conversation = (SELECT id FROM conversation WHERE key = ?) AND seq > ?"
            " ORDER BY seq LIMIT ?",
            [key, after, limit],
        )
        return [Entry(*row) for row in rows]

    def is_unanswered(self, key: str) -> bool:
        row = self._row(key)
        return row is not None and row.asked > row.answered

    def unanswered(self, limit: int) -> list[str]:
        return [
            key for (key,) in self._db.execute("SELECT key FROM conversation WHERE asked > answered LIMIT ?", [limit])
        ]

    def sweep(self, after: int, retention: Retention) -> int | None:
        """Forget in some conversations whose ids follow `after`. Return the last id, or None at the end."""
        rows = self._db.execute(
            "SELECT id, first, head, asked, answered FROM conversation WHERE id > ? ORDER BY id LIMIT ?",
            [after, SWEPT_AT_ONCE],
        ).fetchall()
        self._rows.clear()
        for row in rows:
            self._forget(_Row(*row), retention)
        return rows[-1][0] if rows else None

    # For operators

    def examine(self) -> Examined:
        """Look at every page, and whether each conversation has its entries."""
        problems = [text for (text,) in self._db.execute(f"PRAGMA integrity_check({PROBLEMS})") if text != "ok"]
        ((conversations,),) = self._db.execute("SELECT count(*) FROM conversation")
        ((entries,),) = self._db.execute("SELECT count(*) FROM entry")
        problems += [incomplete(*row) for row in self._db.execute(_INCOMPLETE, [PROBLEMS])]
        return Examined(conversations, entries, problems)

    def renew_epochs(self) -> None:
        """Give each conversation another epoch."""
        self._store = self._renew_store()

    # Inside

    def _renew_store(self) -> str:
        store = token_hex(16)
        self._db.execute("UPDATE store SET id = ?", [store])
        return store

    def _note(self) -> float:
        """Note in the file when it was written to, and return that."""
        noted = time()
        self._db.execute("UPDATE store SET checked = ?", [noted])
        return noted

    def _check_still_there(self) -> None:
        """Refuse what the next process would not find: both files must still be at their paths."""
        file, wal = _identities(self._path)
        if file != self._identity[0]:
            raise DatabaseError("it has been moved away or replaced")
        if wal != self._identity[1]:
            raise DatabaseError(
                "its -wal file has been removed or replaced; end the server, which saves what was in it"
            )

    def _epoch(self, key: str) -> str:
        """Derive the epoch from the file's id: a conversation costs nothing before its first entry."""
        return blake2b(key.encode(), key=self._store.encode(), digest_size=8).hexdigest()

    def _row(self, key: str) -> _Row | None:
        found = self._db.execute(
            "SELECT id, first, head, asked, answered FROM conversation WHERE key = ?", [key]
        ).fetchone()
        return None if found is None else _Row(*found)

    def _find(self, row: _Row, event_key: str) -> Entry | None:
        found = self._db.execute(
            "SELECT seq, json FROM entry WHERE conversation = ? AND key = ?", [row.id, event_key]
        ).fetchone()
        return None if found is None else Entry(*found)

    def _forget(self, row: _Row, retention: Retention) -> int:
        """Drop entries that retention need not keep and no post needs. Return the seq of the first one left."""
        needed = row.answered if row.asked > row.answered else row.head
        first: int = max(
            row.first, int(min(needed, row.head - retention.events)) + 1 if retention.events < row.head else 0
        )
        ((first,),) = self._db.execute(
            "SELECT coalesce(min(seq), ?) FROM entry WHERE conversation = ? AND seq >= ? AND (at > ? OR seq > ?)",
            [row.head + 1, row.id, first, time() - retention.seconds, needed],
        )
        if first > row.first:
            self._db.execute("DELETE FROM entry WHERE conversation = ? AND seq < ?", [row.id, first])
            self._db.execute("UPDATE conversation SET first = ? WHERE id = ?", [first, row.id])
        return first


class Witness:
    """A small file beside the log's: when the log was written to last. A log that knows less was put back from a copy.

    It is written after the log, so it never has more than the log had. If it cannot be written, nobody knows.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = -1

    def open(self) -> None:
        with suppress(OSError):
            self._file = open_file(self._path, O_CREAT | O_RDWR | O_CLOEXEC, 0o600)

    def has_seen_more(self, store: str, noted: float) -> bool:
        """Return whether this log was written to after `noted`."""
        text = b""
        with suppress(OSError):
            text = pread(self._file, 100, 0)
        seen, _, at = text.decode("ascii", "replace").partition(" ")
        try:
            return seen == store and float(at) > noted
        except ValueError:  # it is new, or another program's
            return False

    def note(self, store: str, noted: float) -> None:
        with suppress(OSError):
            pwrite(self._file, f"{store} {noted!r:<30}\n".encode(), 0)

    def close(self) -> None:
        with suppress(OSError):
            close_file(self._file)


def _make_private(path: str) -> None:
    """Make a file that is not there, for its owner alone; SQLite gives its -wal the same rights. Others stay as is."""
    with suppress(OSError):  # it is there, or SQLite says why it cannot be
        # Exclusive, since closing an open file would end the lock that this process may have on it.
        close_file(open_file(path, O_CREAT | O_EXCL | O_RDWR, 0o600))


def _identities(path: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Tell the file from every other, and the one beside it that has the last commits."""
    return _identity(path), _identity(f"{path}-wal")


def _identity(path: str) -> tuple[int, int]:
    try:
        found = stat(path)
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino
