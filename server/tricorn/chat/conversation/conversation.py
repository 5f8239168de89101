"""One conversation at one instance: those who follow it here, its posts, and how long it lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trio import CancelScope, Event, current_time, move_on_after, open_nursery, sleep, sleep_until

from tricorn.chat.conversation.log_view import LogView, patience
from tricorn.chat.conversation.responder import Responder
from tricorn.chat.logs.base import Entry, Log, PastLost, Unavailable
from tricorn.chat.protocol import UserMessage
from tricorn.chat.quota import Quota
from tricorn.chat.run import LAST_WORDS, Agent
from tricorn.chat.settings import ChatSettings
from tricorn.errors.report import report, report_error
from tricorn.metrics import WAITING

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds before a log that did not answer is asked again
RECHECK = 1.0  # seconds at least between two looks whether somebody follows elsewhere


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
    """Lives while somebody follows it, or posts, then for `settings.linger` more seconds; so do its runs.

    `key` tells it from every other, and is what the log knows it as; `id`, which is what stands behind the slash, is
    its user's name for it.

    `over`: it takes no more posts, even where its task has not ended yet. `lost`: because the log has lost entries.
    """

    def __init__(self, key: str, agent: Agent, log: Log, settings: ChatSettings) -> None:
        self.key = key
        self.id = key.rpartition("/")[2]
        self.over = False
        self.lost = False
        self.ended = Event()
        self._log = log
        self._settings = settings
        self._transcript = LogView(key, log, settings.log_timeout, self._changed)
        self._answering = Responder(self._transcript, agent, log, settings)
        self._scope = CancelScope()
        self._news = Event()  # something to catch up with, or to tell the log
        self._work = Event()  # something to answer
        self._idle = Event()  # nothing is being answered here
        self._released = Event()  # nobody holds it any more
        self._lingers_until = current_time() + settings.linger
        self._holds = 0
        self._cursors: set[Cursor] = set()
        self._resting: set[Cursor] = set()  # those of them that have read everything
        self._changed_at = 0  # the head when entries were last added
        self._turns = 0  # of the progress, then
        self._attending = False  # as the log was told
        self._followed = False  # at another instance, when the log was last asked
        self._asked = 0  # the seq of the last post
        self._counted: dict[int, Quota] = {}  # where posts count as runs, by seq
        self._posting = 0
        self._waiting = 0  # as the gauge was told

    @property
    def epoch(self) -> str:
        return self._transcript.epoch

    @property
    def first(self) -> int:
        return self._transcript.first

    @property
    def head(self) -> int:
        return self._transcript.head

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the conversation and its runs from lingering out."""
        self._hold()
        try:
            yield
        finally:
            self._release()

    async def open(self) -> None:
        """Learn from the log where it stands, once. A checkpoint; if cancelled or failed, it can be tried again."""
        await self._transcript.open()

    async def look(self) -> None:
        """Learn from the log where it stands now: the news of what others wrote may be on their way.

        A checkpoint; if cancelled or failed, it can be tried again. Raises Unavailable and PastLost.
        """
        self._transcript.doubt()
        await self._transcript.catch_up()

    def attach(self, cursor: Cursor) -> None:
        """Have `cursor.notify` called once there is something to read, and when the conversation is lost."""
        self._cursors.add(cursor)
        self._hold()
        self.rest(cursor)
        self._news.set()

    def rest(self, cursor: Cursor) -> None:
        """Have it called again: the cursor has read everything."""
        if self.lost or cursor.seq < self.head:
            cursor.notify(cursor)
        else:
            self._resting.add(cursor)

    def detach(self, cursor: Cursor) -> None:
        """Undo `attach`."""
        self._cursors.remove(cursor)
        self._resting.discard(cursor)
        self._release()
        self._news.set()

    async def post(self, id: str, text: str, by: Quota) -> int:
        """Log what somebody wrote and have the agent answer; a repeated id has no effect. Return its seq.

        A checkpoint before the commit and none after it, so that the caller can say so before anybody reads the event.
        If this is cancelled, the post may be in the log, or not. Raises Ended, Full, Unavailable and PastLost.
        """
        key = f"post:{by.user}/{id}"
        with self.held():
            await self.open()
            if self.over:
                raise PastLost if self.lost else Ended
            full = self._full(by)
            if full is not None:
                found = await self._transcript.find(key)
                if found is None:
                    raise full
                return found.seq
            by.runs += 1
            self._posting += 1
            counts = False
            try:
                event = UserMessage(conversation=self.id, seq=0, at=0.0, id=id, user=by.user, text=text)
                entry, repeated = await self._transcript.append(event, key)
                counts = not repeated and entry.seq > self._transcript.progress.answered
            finally:
                self._posting -= 1
                if not counts:
                    by.runs -= 1
            if counts:
                self._counted[entry.seq] = by
            self.nudge()
            return entry.seq

    async def read(self, after: int, limit: int) -> list[Entry]:
        """Return at most `limit` entries that follow seq `after`. No checkpoint where they are still in memory."""
        return await self._transcript.read(after, limit)

    async def cancel(self, run: str) -> bool:
        """Cancel the run of this id, wherever it goes on; False if no such run does. Raises Unavailable."""
        with self.held():
            await self.open()
            if self._cancel_here(run):
                return True
            if not self._goes_on(run):
                await self.look()
            if not self._goes_on(run):
                return False
            with patience(self._settings.log_timeout):
                await self._log.cancel(self.key, run)
            return True

    def nudge(self) -> None:
        """See whether there is something to answer, and nobody else who does."""
        self._work.set()

    def end(self) -> None:
        """Take no more posts, interrupt the run that goes on, and end the task. What waits is left to whoever comes."""
        self.over = True
        if self._answering.run is not None:
            self._answering.run.cancel("interrupted")
        self._scope.cancel()

    async def live(self, before: Conversation | None = None) -> None:
        """Follow the log and answer posts until the conversation has lingered out, is ended, or its log is lost.

        `before` is over and has the same key: the log has one watcher, so this begins when that one has ended. If
        cancelled, the run that goes on ends as interrupted; posts that wait are left to whoever comes next.
        """
        try:
            with self._scope:
                if before is not None:
                    await before.ended.wait()
                await self._watch()
                self._transcript.doubt()  # of what was written since it was opened, nobody has told
                async with open_nursery() as nursery:
                    nursery.start_soon(self._follow)
                    nursery.start_soon(self._answer)
                    await self._linger()
                    nursery.cancel_scope.cancel()
        finally:
            self.over = True
            self._log.unwatch(self.key)
            with move_on_after(LAST_WORDS, shield=True):
                await self._leave()
            self._count(over=True)
            self.ended.set()

    # The tasks

    async def _watch(self) -> None:
        """Hear of what others do. Where the log does not answer, that is asked for again."""
        pause = FIRST_PAUSE
        while True:
            try:
                with patience(self._settings.log_timeout):
                    await self._log.watch(self.key, self._hear)
                return
            except Exception as error:
                pause = await self._pause(error, pause)

    async def _follow(self) -> None:
        """Read what others wrote, and tell the log whether somebody follows here."""
        pause = FIRST_PAUSE
        while True:
            self._news = Event()
            try:
                await self._transcript.catch_up()
                attending = bool(self._cursors)
                if attending != self._attending:
                    with patience(self._settings.log_timeout):
                        await self._log.attend(self.key, attending)
                    self._attending = attending
            except PastLost:
                self._lose()
                return
            except Exception as error:
                pause = await self._pause(error, pause)
                continue
            pause = FIRST_PAUSE
            await self._news.wait()

    async def _answer(self) -> None:
        pause = FIRST_PAUSE
        while True:
            self._work = Event()
            try:
                await self.open()
                if self._answering.due:
                    await self._answering.answer()
            except PastLost:
                self._lose()
                return
            except Exception as error:
                pause = await self._pause(error, pause)
                continue
            pause = FIRST_PAUSE
            self._idle.set()
            await self._work.wait()
            self._idle = Event()

    async def _linger(self) -> None:
        """Return when nobody has followed for `linger` anywhere, and nothing is left to answer."""
        while True:
            if self._holds:
                self._released = Event()
                await self._released.wait()
            await sleep_until(self._lingers_until)
            if self._holds or current_time() < self._lingers_until:
                continue
            try:
                if await self._is_over():
                    return
            except PastLost:
                self._lose()
                return
            except Exception as error:
                await self._pause(error, FIRST_PAUSE)

    async def _is_over(self) -> bool:
        if self._answering.may_hold:
            with patience(self._settings.log_timeout):
                followed = await self._log.attended(self.key)
            if self._holds:
                return False
            if followed or self._followed:  # they may have left just now
                self._followed = followed
                self._lingers_until = current_time() + max(RECHECK if followed else 0.0, self._settings.linger)
                return False
            self._answering.give_up()
            await self._idle.wait()
            if self._holds:
                return False
            if not await self._answering.let_go():
                await self.look()  # there is a post that was not heard of
                return False
        self.over = not self._holds  # at once: who comes from now on gets another one
        return self.over

    async def _leave(self) -> None:
        """Let go of the lease, for others to answer what waits, and of following."""
        try:
            await self._answering.let_go(unanswered=True)
            if self._attending:
                await self._log.attend(self.key, False)
        except Unavailable:
            pass  # both run out by themselves
        except Exception as error:
            report_error(error, conversation=self.key)

    async def _pause(self, error: Exception, seconds: float) -> float:
        """Wait before the log is asked again; the first time in a row that is reported. Returns the next pause."""
        if not isinstance(error, Unavailable):  # a bug: it holds up this conversation and nothing else
            report_error(error, conversation=self.key)
        elif seconds == FIRST_PAUSE:
            report("WARNING", f"the log is not available: {error}", conversation=self.key)
        await sleep(seconds)
        return min(2 * seconds, LONGEST_PAUSE)

    # What happens

    def _hear(self, head: int, cancelled: str) -> None:
        if head <= self._transcript.heard:  # nothing was added: the lease may be free
            self.nudge()
        self._transcript.hear(head)
        if cancelled:
            self._cancel_here(cancelled)

    def _goes_on(self, run: str) -> bool:
        going_on = self._transcript.progress.run
        return going_on is not None and going_on.id == run

    def _cancel_here(self, run: str) -> bool:
        if self._answering.run is None or self._answering.run.id != run:
            return False
        self._answering.run.cancel()
        return True

    def _changed(self) -> None:
        """Entries were added, or there may be more."""
        transcript = self._transcript
        if transcript.head > self._changed_at:
            self._changed_at = transcript.head
            if self._resting:
                resting, self._resting = self._resting, set()
                for cursor in resting:
                    cursor.notify(cursor)
            if transcript.progress.turns != self._turns:  # and not just some more of an answer
                self._turns = transcript.progress.turns
                self._turned()
        if transcript.is_behind:
            self._news.set()
            self._look_for_work()

    def _turned(self) -> None:
        """There is another post, or a run has begun or ended."""
        self._answering.follow()
        self._count()
        posts = self._transcript.progress.posts
        if posts and posts[-1].seq > self._asked:
            self._asked = posts[-1].seq
            self._linger_anew()
        self._look_for_work()

    def _look_for_work(self) -> None:
        if self._answering.may_hold and self._answering.due:
            self._work.set()

    def _lose(self) -> None:
        """The log has lost entries: those who follow must begin anew."""
        self.over = self.lost = True
        for cursor in self._cursors:
            cursor.notify(cursor)
        self._scope.cancel()

    def _count(self, *, over: bool = False) -> None:
        """Have posts count no more that are answered, and say how many wait for the agent here."""
        progress = self._transcript.progress
        if self._counted:
            for seq in [seq for seq in self._counted if over or seq <= progress.answered]:
                self._counted.pop(seq).runs -= 1
        waiting = progress.waiting if self._answering.may_hold and not over else 0
        if waiting != self._waiting:
            WAITING.add(amount=waiting - self._waiting)
            self._waiting = waiting

    def _full(self, by: Quota) -> Full | None:
        settings = self._settings
        if by.runs >= settings.user_runs:
            return Full("user_runs", f"{by.runs} of your posts are not answered yet; post again later")
        waiting = self._transcript.progress.waiting + self._posting
        if waiting >= settings.waiting_posts:
            return Full("waiting_posts", f"{waiting} posts wait in this conversation; post again later")
        return None

    def _hold(self) -> None:
        self._holds += 1

    def _release(self) -> None:
        self._holds -= 1
        self._linger_anew()
        if not self._holds:
            self._released.set()

    def _linger_anew(self) -> None:
        self._lingers_until = current_time() + self._settings.linger
