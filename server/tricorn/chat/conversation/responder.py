"""Answering in a conversation: what the instance that has its lease does."""

from __future__ import annotations

from math import inf
from time import time
from typing import Any

from trio import current_time
from trio.lowlevel import checkpoint

from tricorn.chat.conversation.log_view import LogView
from tricorn.chat.conversation.state import OpenRun
from tricorn.chat.execution import Cause, Execution, Runs, completed_key
from tricorn.chat.logs.base import Append, Entry, Lease, LeaseLost, Log, PastLost, Unavailable
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.protocol import AgentAsked, AgentCompleted, ToolCompleted, UserMessage
from tricorn.chat.quota import Quota
from tricorn.chat.run import Agent, Run
from tricorn.chat.settings import ChatSettings
from tricorn.chat.tools import TOOL_ENDED
from tricorn.errors.report import report, report_error
from tricorn.waiter import Waiter


class Responder:
    """Answers the posts of a conversation under its lease, one after the other.

    Agents have their tasks in `runs`: one that does not end holds up the chat's end, and not the conversation.

    Attributes:
        may_hold: whether the lease may be this instance's. Until the log answers, that is not known.
        asked_at: when the last post was found in the log, in Trio's time.
    """

    def __init__(
        self, view: LogView, agent: Agent, log: Log, settings: ChatSettings, metrics: ChatMetrics, runs: Runs
    ) -> None:
        self.may_hold = False
        self.asked_at = -inf
        self._view = view
        self._agent = agent
        self._log = log
        self._settings = settings
        self._metrics = metrics
        self._runs = runs
        self._lease: Lease | None = None
        self._execution: Execution | None = None  # of the run that is in progress here
        self._begun = False  # it is in the log
        self._lost: LeaseLost | PastLost | None = None  # what ended it
        self._finishing = False  # it answers nothing more
        self._finished = Waiter()  # where `finish` waits
        self._nudged = False
        self._idle = False  # `answer` waits
        self._work = Waiter()  # where `answer` waits
        self._done = Waiter()  # woken when `answer` is about to wait
        self._owners: dict[int, Quota] = {}  # of posts that count as runs, by seq
        self._given_up = 0  # posts up to this seq get no answer any more
        # As of the last turn.
        self._asked = 0  # the seq of the last post
        self._answered = 0
        self._waiting = 0
        self.append_nowait = view.append_nowait  # for the run in progress
        view.on_turn = self._turned

    @property
    def is_answering(self) -> bool:
        """Whether something is answered here, or is about to be."""
        return self.may_hold and self._view.state.due

    async def answer(self) -> None:
        """Answer until nothing is due, if the lease can be had; then wait until there may be more. To be called again.

        If this is cancelled, the run in progress ends as interrupted. Raises PastLost, and Unavailable also if the log
        kept a run from its end: the next call gives it one.
        """
        self._nudged = False
        try:
            while await self._is_due() and not self._finishing:
                if self._lease is None:
                    await self._claim()
                    if self._lease is None:
                        break
                elif self._view.state.run is not None:
                    await self._end_orphan(self._view.state.run)
                else:
                    await self._perform(self._view.state.posts[0])
        except LeaseLost:
            self._lease, self.may_hold = None, False
            report("WARNING", "another instance has taken over a conversation", conversation=self._view.key)
        self._idle = True
        self._done.wake()
        while not self._nudged:
            await self._work.wait()
        self._idle = False

    def nudge(self) -> None:
        """See whether there is something to answer, and nobody else who does."""
        self._nudged = True
        self._work.wake()

    def charge(self, seq: int, owner: Quota) -> None:
        """Have a post count as one of its owner's runs until it is answered, if it is not yet."""
        if seq > self._view.state.answered:
            owner.runs += 1
            self._owners[seq] = owner

    def cancel(self, run: str = "", cause: Cause = "cancelled") -> bool:
        """End the run in progress here, if there is one and it is the one of this id, or none is given."""
        if self._execution is None or run not in ("", self._execution.id):
            return False
        self._execution.cancel(cause)
        return True

    async def finish(self) -> None:
        """Begin no run any more, and wait for the end of the one in progress. A checkpoint."""
        self._finishing = True
        await checkpoint()
        while self._execution is not None:
            await self._finished.wait()

    async def give_up(self) -> None:
        """Have the run in progress, and those of the posts that wait, end as abandoned. Returns when they have."""
        self._given_up = self._view.head
        self.cancel(cause="abandoned")
        while self._nudged or not self._idle:
            await self._done.wait()

    async def let_go(self, *, unanswered: bool = False) -> bool:
        """Give the lease back, if it is here; False if a post is not answered, unless that is left to others."""
        if self.may_hold and self._lease is None:
            await self._claim()
        if self._lease is None:
            return True
        released = await self._view.ask(self._log.release, self._lease, unanswered=unanswered)
        if released:
            self._lease, self.may_hold = None, False
        return released

    def close(self) -> None:
        """Count nothing any more: the conversation is over."""
        self.may_hold = False
        self._count(inf)

    # For the run in progress

    async def append(self, append: Append) -> None:
        """Append for the run in progress. If another instance has taken over, this ends the run."""
        try:
            await self._view.append(append)
        except (LeaseLost, PastLost) as error:
            self._abandon(error)
        if self._lost is not None:
            await checkpoint()  # the run is cancelled, but not where the last words are said

    async def find(self, key: str) -> Entry | None:
        """Return the entry that was added with this key."""
        return await self._view.ask(self._log.find, key)

    async def read(self, after: int, limit: int) -> list[Entry]:
        """Return entries that follow seq `after`, from the log: memory may have some that retention has taken."""
        return await self._view.ask(self._log.read, after, limit)

    # Inside

    async def _is_due(self) -> bool:
        """Catch up, and return whether there is something to answer."""
        if self._view.behind:
            await self._view.catch_up()  # with a new lease: with all that was written under earlier ones
        return self._view.state.due

    async def _claim(self) -> None:
        self.may_hold = True
        self._lease = await self._view.ask(self._log.claim)
        self.may_hold = self._lease is not None
        self._view.doubt()

    async def _end_orphan(self, run: OpenRun) -> None:
        """Append the end of a run, and of what is open in it, for the instance that started it and cannot any more."""
        view, now = self._view, time()
        about: dict[str, Any] = {"conversation": view.id, "seq": 0, "at": 0.0}
        for call in list(run.calls.values()):
            error, seconds = TOOL_ENDED["interrupted"], max(0.0, now - call.at)
            completed = ToolCompleted(**about, run=call.run, call=call.id, tool=call.tool, seconds=seconds, error=error)
            await view.append(Append(completed, completed_key(call.id), self._lease))
        for ask in list(run.asks.values()):
            asked = AgentAsked(**about, run=ask.run, ask=ask.id, outcome="interrupted")
            await view.append(Append(asked, completed_key(ask.id), self._lease))
        for id, at in reversed([(run.id, run.at), *run.children.items()]):  # the innermost first
            end = AgentCompleted(**about, run=id, outcome="interrupted", seconds=max(0.0, now - at))
            await view.append(Append(end, completed_key(id), self._lease, run.post if id == run.id else None))
        report("WARNING", "interrupted an orphaned run", conversation=view.key, run=run.id)

    async def _perform(self, post: UserMessage) -> None:
        execution = Execution(post, self._lease, self, self._settings, self._metrics)
        if post.seq <= self._given_up:
            execution.cancel("abandoned")
        self._execution, self._begun, self._lost = execution, False, None
        self._metrics.runs.add()
        try:
            await execution.perform(self._agent, Run(execution), self._runs)
        except Exception as error:  # a bug of ours: it ends this run and nothing else
            report_error(error, conversation=self._view.key, run=execution.id)
        finally:
            self._execution = None
            self._finished.wake()
            self._metrics.runs.add(amount=-1)
        if self._lost is not None:
            raise self._lost
        if self._view.state.answered < post.seq:
            await self._is_due()
        if self._view.state.answered < post.seq:
            self._lease = None  # with the next one, the log tells how far this came
            raise Unavailable(f"run {execution.id} has no end in the log yet")

    def _turned(self) -> None:
        """Act on what the log says now: a post has come, or a run has begun or ended, here or elsewhere."""
        state, execution = self._view.state, self._execution
        if execution is None:
            if self._lease is not None and state.answered != self._answered:  # by whom, if the lease is here?
                self._view.doubt()
        elif state.run is not None and state.run.id == execution.id:
            self._begun = True
            if state.run.asked is not None:
                execution.hear(*state.run.asked)
        elif (self._begun or state.run is not None) and not execution.over:
            self._abandon(LeaseLost())  # another instance has ended this run, or begun another one
        self._answered = state.answered
        self._count(state.answered)
        if state.posts and state.posts[-1].seq > self._asked:
            self._asked = state.posts[-1].seq
            self.asked_at = current_time()
        if self._idle and self.may_hold and state.due:
            self.nudge()

    def _abandon(self, why: LeaseLost | PastLost) -> None:
        self._lost = self._lost or why
        if self._execution is not None:
            self._execution.abandon()

    def _count(self, answered: float) -> None:
        """Have posts up to this seq no longer count as runs, and count how many wait for the agent here."""
        for seq in [seq for seq in self._owners if seq <= answered]:
            self._owners.pop(seq).runs -= 1
        waiting = self._view.state.waiting if self.may_hold else 0
        if waiting != self._waiting:
            self._metrics.waiting.add(amount=waiting - self._waiting)
            self._waiting = waiting
