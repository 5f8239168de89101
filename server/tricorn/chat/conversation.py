"""One conversation: its log, its runs one after the other, and those who follow it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from math import inf

from trio import CancelScope, Event, Lock, current_time, move_on_after

from tricorn.chat.allowance import Allowance
from tricorn.chat.log.base import Entry, Log
from tricorn.chat.protocol import AnyEvent, UserMessage
from tricorn.chat.run import LAST_WORDS, Agent, Run, perform
from tricorn.metrics import APPENDED, RUNS, WAITING
from tricorn.report import report_error
from tricorn.settings import Settings

# Entries kept in memory: who is not further behind than that is served without asking the log.
TAIL = 256


class Ended(Exception):
    """The conversation takes no more posts: the chat is closing."""


class Full(Exception):
    """There is no room for the post now. The text says why, for people; `limit` is the name of the setting."""

    def __init__(self, limit: str, text: str) -> None:
        super().__init__(text)
        self.limit = limit


class Cursor:
    """How far one session has read one conversation: up to and with the entry `seq`."""

    def __init__(self, conversation: Conversation, seq: int, notify: Callable[[Cursor], None]) -> None:
        self.conversation = conversation
        self.seq = seq
        self.notify = notify


class Conversation:
    """Lives while somebody follows it or a run goes on, then for `settings.linger` more seconds.

    `key` tells it from every other, and is what the log knows it as; `id`, which is what stands behind the slash, is
    its user's name for it.

    `epoch` and `head`, the seq of the last entry, are known after `open`.
    """

    def __init__(self, key: str, agent: Agent, log: Log, settings: Settings) -> None:
        self.key = key
        self.id = key.rpartition("/")[2]
        self.epoch = ""
        self.head = 0
        self.ended = Event()
        self._agent = agent
        self._log = log
        self._settings = settings
        self._scope = CancelScope()  # its deadline is the end of the lingering
        self._holds = 0
        self._lock = Lock()  # keeps appends in one order
        self._tail: deque[Entry] = deque(maxlen=TAIL)
        self._cursors: set[Cursor] = set()
        self._waiting: deque[tuple[Run, ExitStack]] = deque()  # with what is to be undone when the run is over
        self._posted = Event()
        self._running: Run | None = None

    @property
    def over(self) -> bool:
        """It will take no more posts, even where its task has not ended yet."""
        return self._scope.cancel_called

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the conversation from lingering out."""
        self._hold()
        try:
            yield
        finally:
            self._release()

    async def open(self) -> None:
        """Learn from the log where it stands, once. A checkpoint; if cancelled or failed, it can be tried again."""
        async with self._lock:
            if not self.epoch:
                state = await self._log.open(self.key)
                self.epoch, self.head = state.epoch, state.head

    def attach(self, cursor: Cursor) -> None:
        """Have `cursor.notify` called after every append."""
        self._cursors.add(cursor)
        self._hold()

    def detach(self, cursor: Cursor) -> None:
        """Undo `attach`."""
        self._cursors.remove(cursor)
        self._release()

    async def post(self, id: str, text: str, by: Allowance) -> int:
        """Log what somebody wrote and have the agent answer; a repeated id has no effect. Return its seq.

        A checkpoint before the commit and none after it, so that the caller can say so before anybody reads the event.
        If this is cancelled, the post may be in the log, or not. Raises Ended, and Full.
        """
        settings, key = self._settings, f"post:{by.user}/{id}"
        with self.held():
            await self.open()
            async with self._lock:
                if self.over:
                    raise Ended
                full = self._full(by)
                if full is not None:
                    found = await self._log.find(self.key, key)
                    if found is None:
                        raise full
                    return found.seq
                with ExitStack() as run_over:
                    run_over.enter_context(by.one_run())
                    run_over.enter_context(self.held())
                    event = UserMessage(conversation=self.id, seq=0, at=0.0, id=id, text=text)
                    entry, repeated = await self._commit(event, key)
                    if not repeated:
                        run = Run(self.id, by.user, text, id, settings.run_timeout, self.append, settings.event_bytes)
                        self._waiting.append((run, run_over.pop_all()))
                        WAITING.add()
                        self._posted.set()
                return entry.seq

    async def append(self, event: AnyEvent, key: str | None = None) -> None:
        """Put an event into the log and notify who follows. If cancelled, it may be in the log, or not."""
        async with self._lock:
            await self._commit(event, key)

    async def read(self, after: int, limit: int) -> list[Entry]:
        """Return at most `limit` entries that follow seq `after`. No checkpoint where they are still in memory."""
        first = self._tail[0].seq if self._tail else inf
        if after + 1 < first:
            return await self._log.read(self.key, after, limit)
        start = after + 1 - self._tail[0].seq
        return list(islice(self._tail, start, start + limit))

    def cancel(self, run: str) -> bool:
        """Cancel the run of this id; False if it is not the one that goes on."""
        if self._running is None or self._running.id != run:
            return False
        self._running.cancel()
        return True

    def end(self) -> None:
        """Take no more posts, interrupt the run that goes on, and end the task."""
        if self._running is not None:
            self._running.cancel("interrupted")
        self._scope.cancel()

    async def live(self) -> None:
        """Answer posts, one after the other, until the conversation has lingered out or is ended.

        Whatever ends this, also its cancellation: every post in the log gets its run, if only an interrupted one.
        """
        try:
            with self._scope:
                while True:
                    while self._waiting:
                        await self._perform(*self._next())
                    self._posted = Event()
                    await self._posted.wait()
        finally:
            await self._interrupt_waiting()
            self.ended.set()

    async def _interrupt_waiting(self) -> None:
        self._scope.cancel()
        with move_on_after(LAST_WORDS, shield=True):
            async with self._lock:  # who is in it may be a post on its way
                pass
            while self._waiting:
                run, run_over = self._next()
                run.cancel("interrupted")
                await self._perform(run, run_over)

    def _next(self) -> tuple[Run, ExitStack]:
        WAITING.add(amount=-1)
        return self._waiting.popleft()

    async def _perform(self, run: Run, run_over: ExitStack) -> None:
        self._running = run
        RUNS.add()
        try:
            with run_over:
                await perform(run, self._agent)
        except Exception as error:  # a bug of ours: it ends this run and nothing else
            report_error(error, conversation=self.key, run=run.id)
        finally:
            self._running = None
            RUNS.add(amount=-1)

    def _full(self, by: Allowance) -> Full | None:
        settings = self._settings
        if by.runs >= settings.user_runs:
            return Full("user_runs", f"{by.runs} of your posts are not answered yet; post again later")
        if len(self._waiting) >= settings.waiting_posts:
            return Full("waiting_posts", f"{len(self._waiting)} posts wait in this conversation; post again later")
        return None

    async def _commit(self, event: AnyEvent, key: str | None) -> tuple[Entry, bool]:
        entry, repeated = await self._log.append(self.key, self.epoch, event, key)
        if not repeated:
            APPENDED.add(str(event.__struct_config__.tag))
        if entry.seq > self.head:
            if entry.seq > self.head + 1:  # others write to this log too: the tail must not have holes
                self._tail.clear()
            self._tail.append(entry)
            self.head = entry.seq
            for cursor in self._cursors:
                cursor.notify(cursor)
        return entry, repeated

    def _hold(self) -> None:
        self._holds += 1
        self._scope.deadline = inf

    def _release(self) -> None:
        self._holds -= 1
        if not self._holds:
            self._scope.deadline = current_time() + self._settings.linger
