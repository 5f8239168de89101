"""One conversation at one instance: its posts, those who follow it here, and how long it lives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

from trio import CancelScope, Event, current_time, move_on_after, open_nursery, sleep, sleep_forever

from tricorn.chat.backoff import Backoff
from tricorn.chat.conversation.idle import IdleConversations
from tricorn.chat.conversation.log_view import LogView, Reader
from tricorn.chat.conversation.responder import Responder
from tricorn.chat.conversation.state import OpenAsk
from tricorn.chat.conversation.tails import Tails
from tricorn.chat.execution import LAST_WORDS, Runs, completed_key
from tricorn.chat.logs.base import Append, Log, PastLost, Unavailable
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.protocol import AgentAsked, UserMessage
from tricorn.chat.quota import Quota
from tricorn.chat.run import Agent
from tricorn.chat.settings import ChatSettings
from tricorn.errors.report import report, report_error
from tricorn.waiter import Waiter

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds before a log that did not answer is asked again
RECHECK = 1.0  # seconds at least between two looks whether somebody follows elsewhere


class ConversationClosed(Exception):
    """The conversation takes no more posts: the chat is closing."""


class TooManyPosts(Exception):
    """There is no room for a post now. The text says why, for people; `limit` is the name of the setting."""

    def __init__(self, limit: str, text: str) -> None:
        super().__init__(text)
        self.limit = limit


class NotAChoice(Exception):
    """This is no answer to the question. The text says what would be, for people."""


def _post_key(id: str, by: Quota) -> str:
    return f"post:{by.user}/{id}"


class Conversation:
    """Lives while somebody follows it, or posts, and for a while after that.

    That is `settings.abandon_after` seconds while something is answered, else `settings.linger`.

    Attributes:
        key: tells it from every other, and is what the log knows it as.
        view: its log, for reading. Writing is done here.
        over: it takes no more posts, even if its task has not ended yet.
        ended: set when its task has ended.
    """

    def __init__(
        self, key: str, agent: Agent, log: Log, settings: ChatSettings, metrics: ChatMetrics, runs: Runs
    ) -> None:
        self.key = key
        self.view = LogView(key, log, settings.log_timeout, metrics)
        self.over = False
        self.ended = Event()
        self._log = log
        self._settings = settings
        self._responder = Responder(self.view, agent, log, settings, metrics, runs)
        self._scope = CancelScope()
        self._followers: set[Reader] = set()
        self._holds = 0
        self._idle: IdleConversations | None = None  # while it lives
        self._lingering = CancelScope()
        self._released = Waiter()  # woken when nobody holds it any more
        self._left_at = current_time()  # when somebody followed last
        self._attending = False  # as the log was told: somebody follows here
        self._attended = False  # as the log said last: somebody follows elsewhere
        self._posting = 0  # posts that are on their way into the log

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the conversation and its runs from lingering out."""
        self._hold()
        try:
            yield
        finally:
            self._release()

    # Following it

    @property
    def is_shared(self) -> bool:
        """Whether several follow it here."""
        return len(self._followers) > 1

    async def look(self) -> None:
        """Learn from the log where it stands now: the news of what others wrote may still be on their way.

        A checkpoint; if cancelled or failed, it can be tried again. Raises Unavailable and PastLost.
        """
        self.view.doubt()
        await self.view.catch_up()

    def attach(self, follower: Reader) -> None:
        """Keep the conversation alive, and wake a follower at the next entry, once; `view.rest` has it woken again."""
        self._followers.add(follower)
        self._hold()
        self.view.rest(follower)
        self.view.news.wake()

    def detach(self, follower: Reader) -> None:
        """Undo `attach`."""
        self._followers.remove(follower)
        self.view.leave(follower)
        self._release()
        self.view.news.wake()

    # Talking

    async def post(self, id: str, text: str, by: Quota) -> int:
        """Log what somebody wrote and have the agent answer; a repeated id has no effect. Return its seq.

        A checkpoint before the commit and none after it, so that the caller can say so before anybody reads the event.
        If this is cancelled, the post may be in the log or not.

        Raises:
            ConversationClosed: the chat is closing.
            TooManyPosts: too many of the user's posts, or of the conversation's, wait already.
            Unavailable: the log does not answer.
            PastLost: the log has lost entries.
        """
        key = _post_key(id, by)
        with self.held():
            await self.view.open()
            if self.over:
                raise PastLost if self.view.lost else ConversationClosed
            refusal = self._refusal(by)
            if refusal is not None:
                found = await self.view.ask(self._log.find, key)
                if found is None:
                    raise refusal
                return found.seq
            by.runs += 1
            self._posting += 1
            try:
                event = UserMessage(conversation=self.view.id, seq=0, at=0.0, id=id, user=by.user, text=text)
                entry, repeated = await self.view.append(Append(event, key))
                if not repeated and not self.over:
                    self._responder.charge(entry.seq, by)
            finally:
                self._posting -= 1
                by.runs -= 1
            self._responder.nudge()
            return entry.seq

    async def find(self, id: str, by: Quota) -> int | None:
        """Return the seq of the post with this id, or None if there is none. Raises Unavailable and PastLost."""
        with self.held():
            found = await self.view.ask(self._log.find, _post_key(id, by))
            return None if found is None else found.seq

    async def cancel(self, run: str) -> bool:
        """Cancel the run of this id, at whichever instance; False if no such run is in progress. Raises Unavailable."""
        with self.held():
            await self.view.open()
            if self._responder.cancel(run):
                return True
            if not self._is_running(run):
                await self.look()
            if self._is_running(run):
                await self.view.ask(self._log.cancel, run)
                return True
            return False

    async def answer(self, ask: str, text: str, user: str) -> str | None:
        """Answer a question of the run in progress, at whichever instance. Return why not, for people, if it is over.

        A checkpoint. If this is cancelled, the answer may be in the log or not. The first answer in the log counts.

        Raises:
            NotAChoice: the question has choices, and this is none.
            Unavailable: the log does not answer.
            PastLost: the log has lost entries.
        """
        with self.held():
            await self.view.open()
            if self._open_ask(ask) is None:
                await self.look()
            found = self._open_ask(ask)
            if found is None:
                return f"no question {ask} waits for an answer in this conversation"
            if found.choices and text not in found.choices:
                raise NotAChoice(f"the answer must be one of: {', '.join(found.choices)}")
            about: dict[str, Any] = {"conversation": self.view.id, "run": found.run, "seq": 0, "at": 0.0}
            event = AgentAsked(**about, ask=ask, outcome="answered", answer=text, user=user)
            _, repeated = await self.view.append(Append(event, completed_key(ask)))
            return f"the question {ask} was answered, or ended, just before" if repeated else None

    def nudge(self) -> None:
        """See whether there is something to answer, and nobody else who does."""
        self._responder.nudge()

    # Its life

    async def finish(self) -> None:
        """Take no more posts, let the run in progress come to its end, and end. What waits is left to whoever comes.

        If this is cancelled, the run goes on.
        """
        self.over = True
        await self._responder.finish()
        self.end()

    def end(self) -> None:
        """Take no more posts, interrupt the run in progress, and end the task. What waits is left to whoever comes."""
        self.over = True
        self._responder.cancel(cause="interrupted")
        self._scope.cancel()

    def hurry(self) -> None:
        """Linger no longer, unless there is something to answer."""
        if not self._responder.is_answering:
            self._left_at = -inf
            self._lingering.deadline = self._deadline()

    async def live(
        self,
        before: Conversation | None = None,
        idle: IdleConversations | None = None,
        tails: Tails | None = None,
    ) -> None:
        """Follow the log and answer posts until the conversation has lingered out, is ended, or its log is lost.

        `before` is over and has the same key: the log has one watcher, so this begins when that one has ended. While
        nobody follows it or posts, it is one of `idle`. What it keeps of its log in memory counts as part of `tails`.
        If cancelled, the run in progress ends as interrupted; posts that wait are left to whoever comes next.
        """
        self._idle = idle
        if tails is not None:
            self.view.share(tails)
        try:
            with self._scope:
                if before is not None:
                    await before.ended.wait()
                await self._repeat(self._watch)
                self.view.doubt()  # nobody has told of what was written since it was opened
                async with open_nursery() as nursery:
                    nursery.start_soon(self._repeat, self._follow)
                    nursery.start_soon(self._repeat, self._responder.answer)
                    await self._repeat(self._linger)
                    nursery.cancel_scope.cancel()
        finally:
            self.over = True
            self._log.unwatch(self.key)
            self.view.unshare()
            if idle is not None:
                self._idle = None
                idle.discard(self)
            with move_on_after(LAST_WORDS, shield=True):
                await self._leave()
            self._responder.close()
            self.ended.set()

    async def _repeat(self, step: Callable[[], Awaitable[bool | None]]) -> None:
        """Take a step until it says that it was the last, or the log is lost.

        If the log fails, that pauses it; the first failure in a row is reported.
        """
        backoff = None
        while True:
            try:
                if await step():
                    return
                backoff = None
                continue
            except PastLost:
                self.over = True
                self.view.lose()
                self._scope.cancel()
                return
            except Exception as error:
                backoff = backoff or Backoff(FIRST_PAUSE, LONGEST_PAUSE)
                pause = backoff.next()
                if not isinstance(error, Unavailable):  # a bug: it holds up this conversation and nothing else
                    report_error(error, conversation=self.key)
                elif pause == FIRST_PAUSE:
                    report("WARNING", f"the log is not available: {error}", conversation=self.key)
            await sleep(pause)

    async def _watch(self) -> bool:
        """Hear of what others do."""
        await self.view.ask(self._log.watch, self._hear)
        return True

    def _hear(self, head: int, cancelled: str) -> None:
        if head <= self.view.heard:  # nothing was added: the lease may be free
            self._responder.nudge()
        self.view.hear(head)
        if cancelled:
            self._responder.cancel(cancelled)

    async def _follow(self) -> None:
        """Read what others wrote, and tell the log whether somebody follows here."""
        if not self.view.behind and bool(self._followers) == self._attending:
            await self.view.news.wait()
        await self.view.catch_up()
        attending = bool(self._followers)
        if attending != self._attending:
            await self.view.ask(self._log.attend, attending)
            self._attending = attending

    async def _linger(self) -> bool:
        """Wait until nobody has followed or posted for long enough; True if nobody has at any instance."""
        while self._holds:
            await self._released.wait()
        look_again = current_time() + max(RECHECK, self._settings.linger)  # whether something is still answered
        with CancelScope(deadline=min(self._deadline(), look_again)) as self._lingering:
            await sleep_forever()
        if self._holds or current_time() < self._deadline():
            return False
        if self._responder.may_hold:
            attended = await self.view.ask(self._log.attended)
            if self._holds:
                return False
            if attended or self._attended:  # they may have left just now
                self._attended = attended
                self._left_at = current_time() + (max(0.0, RECHECK - self._patience()) if attended else 0.0)
                return False
            await self._responder.give_up()
            if self._holds:
                return False
            if not await self._responder.let_go():
                await self.look()  # there is a post that was not heard of
                return False
        self.over = not self._holds  # at once: who comes from now on gets another one
        return self.over

    async def _leave(self) -> None:
        """Let go of the lease, for others to answer what waits, and of following."""
        try:
            await self._responder.let_go(unanswered=True)
            if self._attending:
                await self.view.ask(self._log.attend, False)
        except Unavailable:
            pass  # both run out by themselves
        except Exception as error:
            report_error(error, conversation=self.key)

    def _hold(self) -> None:
        self._holds += 1
        if self._holds == 1 and self._idle is not None:
            self._idle.discard(self)

    def _release(self) -> None:
        self._holds -= 1
        self._left_at = current_time()
        if not self._holds:
            self._released.wake()
            if self._idle is not None:
                self._idle.add(self)

    def _deadline(self) -> float:
        """When it ends, in Trio's time, if nobody comes."""
        return max(self._left_at, self._responder.asked_at) + self._patience()

    def _patience(self) -> float:
        """For how many seconds it waits for somebody."""
        return self._settings.abandon_after if self._responder.is_answering else self._settings.linger

    def _is_running(self, run: str) -> bool:
        running = self.view.state.run
        return running is not None and running.id == run

    def _open_ask(self, ask: str) -> OpenAsk | None:
        running = self.view.state.run
        return None if running is None else running.asks.get(ask)

    def _refusal(self, by: Quota) -> TooManyPosts | None:
        settings = self._settings
        if by.runs >= settings.user_runs:
            return TooManyPosts("user_runs", f"{by.runs} of your posts are not answered yet; post again later")
        waiting = self.view.state.waiting + self._posting
        if waiting >= settings.waiting_posts:
            return TooManyPosts("waiting_posts", f"{waiting} posts wait in this conversation; post again later")
        return None
