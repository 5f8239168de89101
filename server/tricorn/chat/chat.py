"""The chat: a nursery of conversations, and the sessions that follow them. Here it is put together."""

from __future__ import annotations

from contextvars import copy_context
from math import inf
from random import random
from types import TracebackType
from typing import Self

from trio import (
    CancelScope,
    current_effective_deadline,
    current_time,
    move_on_at,
    open_nursery,
    sleep,
    sleep_until,
)
from trio.lowlevel import checkpoint

from tricorn.chat.conversation.conversation import Conversation
from tricorn.chat.conversation.idle import IdleConversations
from tricorn.chat.conversation.log_view import patience
from tricorn.chat.conversation.tails import Tails
from tricorn.chat.delivery import Teller
from tricorn.chat.execution import Runs
from tricorn.chat.identity import Gate, ThisMachine
from tricorn.chat.logs.base import Log, Unavailable
from tricorn.chat.logs.memory import MemoryLog
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.quota import Quotas
from tricorn.chat.readiness import Readiness
from tricorn.chat.run import Agent
from tricorn.chat.session import Session
from tricorn.chat.settings import ChatSettings
from tricorn.errors.report import report_error
from tricorn.websocket import WebSocket

LOOKS_PER_LEASE = 4
EARLY = 0.1  # of the time of a heartbeat
LOOK_AT_ONCE, SOON = 100, 0.25  # conversations, and seconds until the next look if there may be more
RETRY_AFTER = 1.0  # seconds until the first clients may come back
RETURNS_PER_SECOND = 500  # clients that come back in a second, on average


class Chat:
    """Conversations with an agent: `async with Chat(agent) as chat`, and `chat.session` is the handler for a server.

    Leaving the block ends the conversations; runs end as interrupted, and posts that wait are left to whoever opens the
    log next. It waits for agents that do not end. As with a nursery, what the block raises comes out in an
    ExceptionGroup.

    `gate` decides who may come in; by default only clients on this machine.

    Attributes:
        metrics: what this chat has counted.
        closing: it takes no more posts.
        drain_by: when that must be over, in Trio's time; inf until it begins.
    """

    def __init__(
        self, agent: Agent, settings: ChatSettings | None = None, log: Log | None = None, gate: Gate | None = None
    ) -> None:
        self.settings = settings or ChatSettings()
        self.gate = gate or ThisMachine()
        self.quotas = Quotas(self.settings, per_user=self.gate.wants_token)
        self.metrics = ChatMetrics()
        self.closing = False
        self.drain_by = inf
        self._agent = agent
        self._log = log or MemoryLog()
        self._readiness = Readiness(self._log)
        self._opening = open_nursery()
        self._conversations: dict[str, Conversation] = {}
        self._idle = IdleConversations(self.settings.open_conversations)
        self._tails = Tails()
        self._sessions: set[Session] = set()
        self._teller = Teller()
        self._tending = CancelScope()

    async def __aenter__(self) -> Self:
        self._nursery = await self._opening.__aenter__()
        self._context = copy_context()
        self._runs = Runs(self._nursery)
        self._nursery.start_soon(self._tend)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._end_conversations()
        self._tending.cancel()
        return await self._opening.__aexit__(kind, error, traceback)

    async def session(self, ws: WebSocket) -> None:
        """Talk the wire protocol with one client until it is gone. However that ends, its runs go on."""
        session = Session(ws, self, self._teller, self.gate, self.quotas, self.settings, self.metrics)
        self._sessions.add(session)
        try:
            await session.arrive()
            if self.closing:
                session.closing(self._retry_after())
            await session.serve()
        finally:
            session.end()
            self._sessions.discard(session)

    async def drain(self) -> None:
        """Take no more posts, let runs finish, and return when every session has sent all that is in the log.

        Runs that are still in progress when `close_timeout`, or half of the time if that is less, is left until the
        deadline around this are interrupted: so there is time for their last events. Without a deadline it counts as
        `drain_timeout` less `close_timeout`. What waits for an answer is left to whoever opens the log next.

        How long the sending takes depends on the peers. Cancelling this ends only the waiting.
        """
        self._close()
        conversations = list(self._conversations.values())
        interrupt_at = self._interrupt_at()
        for session in self._sessions:
            session.closing(self._retry_after())
        await checkpoint()
        with move_on_at(interrupt_at):
            async with open_nursery() as nursery:
                for conversation in conversations:
                    nursery.start_soon(conversation.finish)
        self._end_conversations()
        for conversation in conversations:
            await conversation.ended.wait()
        async with open_nursery() as nursery:
            for session in self._sessions:
                nursery.start_soon(session.delivery.flush)

    async def why_not_ready(self) -> str | None:
        """Return why no more clients should be sent here, in words that anybody may read; None if they may come.

        Asks the log at most once a second, and waits for it for a second. What it raises is reported. A checkpoint.
        """
        if self.closing:
            await checkpoint()
            return "draining"
        return await self._readiness.why_not()

    def _retry_after(self) -> float:
        """Return in how many seconds a client should come back: the more there are, the more they are spread."""
        return RETRY_AFTER + random() * (len(self._sessions) - 1) / RETURNS_PER_SECOND  # noqa: S311 (it keeps no secret)

    def conversation(self, key: str) -> Conversation:
        """Return the conversation of this key, and bring it to life if it is not alive. Hold it, or it lingers out."""
        conversation = self._conversations.get(key)
        if conversation is None or (conversation.over and not self.closing):
            conversation = self._make(key)
            if self.closing:
                conversation.end()  # it can be read, but has no task
            else:
                before, self._conversations[key] = self._conversations.get(key), conversation
                # In the chat's context: that of whoever came first is not the agent's to see.
                self._context.run(self._nursery.start_soon, self._live, conversation, before)
        return conversation

    def glance(self, key: str) -> Conversation:
        """Return the conversation of this key; if it is not alive, one without a task, which can ask the log."""
        conversation = self._conversations.get(key)
        return self._make(key) if conversation is None or (conversation.over and not self.closing) else conversation

    def _make(self, key: str) -> Conversation:
        return Conversation(key, self._agent, self._log, self.settings, self.metrics, self._runs)

    def _interrupt_at(self) -> float:
        """Return until when runs may finish, in Trio's time."""
        close_timeout = self.settings.close_timeout
        end = min(current_effective_deadline(), self.drain_by - close_timeout)
        return end - min(close_timeout, max(0.0, end - current_time()) / 2)

    def _close(self) -> None:
        """Take no more posts. The first time decides when everything must be over."""
        self.closing = True
        self.drain_by = min(self.drain_by, current_time() + self.settings.drain_timeout)

    def _end_conversations(self) -> None:
        self._close()
        for conversation in self._conversations.values():
            conversation.end()

    async def _tend(self) -> None:
        with self._tending:
            async with open_nursery() as nursery:
                nursery.start_soon(self._look_after)
                nursery.start_soon(self._beat)
                nursery.start_soon(self._teller.run)
                nursery.start_soon(self._runs.reaper.run)

    async def _beat(self) -> None:
        """Have every session say something before it has been silent for `heartbeat` seconds.

        Sessions whose time would come soon do it at once: so there are few looks, however many sessions there are.
        """
        heartbeat = self.settings.heartbeat
        while True:
            now = first = current_time()
            for session in self._sessions:
                if session.delivery.spoke_at < now - heartbeat * (1 - EARLY):
                    session.beat()
                else:
                    first = min(first, session.delivery.spoke_at)
            await sleep_until(first + heartbeat)

    async def _look_after(self) -> None:
        """Answer posts that nobody answers, as after an instance has died: now, and several times in `lease`."""
        while True:
            try:
                with patience(self.settings.log_timeout):
                    keys = await self._log.unanswered(LOOK_AT_ONCE)
            except Unavailable:  # clients that ask for something are told
                keys = []
            except Exception as error:
                report_error(error)
                keys = []
            for key in keys:
                self.conversation(key).nudge()
            pause = self.settings.lease / LOOKS_PER_LEASE
            await sleep(min(pause, SOON) if len(keys) == LOOK_AT_ONCE else pause)

    async def _live(self, conversation: Conversation, before: Conversation | None) -> None:
        self.metrics.conversations.add()
        try:
            await conversation.live(before, self._idle, self._tails)
        finally:
            self.metrics.conversations.add(amount=-1)
            if self._conversations.get(conversation.key) is conversation:
                del self._conversations[conversation.key]
