"""Who answers in a conversation: the instance that has its lease, and what it does with that."""

from __future__ import annotations

from time import time
from typing import Any

from trio import WouldBlock
from trio.lowlevel import checkpoint

from tricorn.chat.conversation.log_view import LogView, patience
from tricorn.chat.conversation.state import Asked, OpenRun, completed_key
from tricorn.chat.logs.base import Lease, LeaseLost, Log, PastLost, Unavailable
from tricorn.chat.protocol import AgentCompleted, AnyEvent, ToolCompleted
from tricorn.chat.run import TOOL_ENDED, Agent, Run, perform
from tricorn.chat.settings import ChatSettings
from tricorn.errors.report import report, report_error
from tricorn.metrics import RUNS


class Responder:
    """Answers the posts of a conversation under its lease, one after the other.

    Attributes:
        run: the one that goes on here.
        may_hold: whether the lease may be this instance's. Without an answer of the log that is not known.
    """

    def __init__(self, transcript: LogView, agent: Agent, log: Log, settings: ChatSettings) -> None:
        self.run: Run | None = None
        self.may_hold = False
        self._transcript = transcript
        self._agent = agent
        self._log = log
        self._settings = settings
        self._lease: Lease | None = None
        self._begun = False  # the run that goes on here is in the log
        self._lost: LeaseLost | PastLost | None = None  # what ended the run
        self._answered = 0  # the last post that was, when entries were last added
        self._given_up = 0  # posts up to here get no answer any more

    @property
    def due(self) -> bool:
        """Whether a post is to be answered, or a run of an instance that has died to be ended."""
        progress = self._transcript.progress
        return bool(progress.posts) or progress.run is not None

    async def answer(self) -> None:
        """Answer until nothing is due, if the lease is to be had.

        If this is cancelled, the run that goes on ends as interrupted. Raises PastLost, and Unavailable also where that
        kept a run from its end: the next call gives it one.
        """
        if self._lease is None:
            await self._claim()
            if self._lease is None:
                return
        transcript = self._transcript
        try:
            while True:
                await transcript.catch_up()  # to all that was written under earlier leases
                if transcript.progress.run is not None:
                    await self._interrupt(transcript.progress.run)
                elif transcript.progress.posts:
                    await self._perform(transcript.progress.posts[0])
                else:
                    return
        except LeaseLost:
            self._lease, self.may_hold = None, False
            report("WARNING", "another instance answers in this conversation now", conversation=transcript.key)

    def follow(self) -> None:
        """Entries were added: a run that another instance has ended is over here too."""
        run, progress = self.run, self._transcript.progress
        before, self._answered = self._answered, progress.answered
        if run is None:
            if self._lease is not None and progress.answered != before:  # by whom, where the lease is here?
                self._transcript.doubt()
        elif self._begun and not run.over and (progress.run is None or progress.run.id != run.id):
            self._abandon(LeaseLost())

    def give_up(self) -> None:
        """Have the run that goes on, and those of the posts that wait, end as cancelled."""
        self._given_up = self._transcript.head
        if self.run is not None:
            self.run.cancel()

    async def let_go(self, *, unanswered: bool = False) -> bool:
        """Give the lease back, if it is here; False where a post is not answered, unless that is left to others."""
        if self.may_hold and self._lease is None:
            await self._claim()
        if self._lease is None:
            return True
        with patience(self._settings.log_timeout):
            released = await self._log.release(self._transcript.key, self._lease, unanswered=unanswered)
        if released:
            self._lease, self.may_hold = None, False
        return released

    def _begin(self) -> None:
        """The run that goes on is in the log."""
        self._begun = True
        self.follow()

    def _abandon(self, why: LeaseLost | PastLost) -> None:
        self._lost = self._lost or why
        if self.run is not None:
            self.run.abandon()

    async def _claim(self) -> None:
        self.may_hold = True
        with patience(self._settings.log_timeout):
            self._lease = await self._log.claim(self._transcript.key)
        self.may_hold = self._lease is not None
        self._transcript.doubt()

    async def _interrupt(self, run: OpenRun) -> None:
        """Say for the instance that began a run, and can no more, that it is over."""
        transcript, now = self._transcript, time()
        about: dict[str, Any] = {"conversation": transcript.id, "seq": 0, "at": 0.0, "run": run.id}
        for call in list(run.calls.values()):
            error, seconds = TOOL_ENDED["interrupted"], max(0.0, now - call.at)
            completed = ToolCompleted(**about, call=call.id, tool=call.tool, seconds=seconds, error=error)
            await transcript.append(completed, completed_key(call.id), lease=self._lease)
        end = AgentCompleted(**about, outcome="interrupted", seconds=max(0.0, now - run.at))
        await transcript.append(end, completed_key(run.id), lease=self._lease, answered=run.post)
        report("WARNING", "ended a run that nobody went on with", conversation=transcript.key, run=run.id)

    async def _perform(self, asked: Asked) -> None:
        settings, transcript = self._settings, self._transcript
        run = Run(transcript.id, asked, settings.run_timeout, self, settings.event_bytes)
        if asked.seq <= self._given_up:
            run.cancel()
        self.run, self._begun, self._lost = run, False, None
        RUNS.add()
        try:
            await perform(run, self._agent)
        except Exception as error:  # a bug of ours: it ends this run and nothing else
            report_error(error, conversation=transcript.key, run=run.id)
        finally:
            self.run = None
            RUNS.add(amount=-1)
        if self._lost is not None:
            raise self._lost
        await transcript.catch_up()
        if transcript.progress.answered < asked.seq:
            self._lease = None  # with the next one, the log tells how far this came
            raise Unavailable(f"run {run.id} has no end in the log yet")

    async def append(self, event: AnyEvent, key: str | None = None, answered: int | None = None) -> None:
        """Append for the run that goes on. Where another instance is to answer, this ends the run."""
        try:
            await self._transcript.append(event, key, lease=self._lease, answered=answered)
        except (LeaseLost, PastLost) as error:
            self._abandon(error)
        else:
            if not self._begun:
                self._begin()
        if self._lost is not None:
            await checkpoint()  # cancelled now, but not where the last words are said

    def append_nowait(self, event: AnyEvent, key: str | None = None, answered: int | None = None) -> None:
        """Do what `append` does. Raises WouldBlock where that would wait, or end the run."""
        try:
            self._transcript.append_nowait(event, key, lease=self._lease, answered=answered)
        except (LeaseLost, PastLost):
            raise WouldBlock from None
        if not self._begun:
            self._begin()
