"""The chat: its conversations and the sessions that follow them, in one task group."""

from __future__ import annotations

import asyncio
from importlib import import_module
from pathlib import Path
from random import random
from time import monotonic
from typing import Any, cast

from bench.asyncio_version.agent import demo
from bench.asyncio_version.connection import Connection
from bench.asyncio_version.conversation import Conversation
from bench.asyncio_version.run import Agent
from bench.asyncio_version.session import Session
from tricorn.chat.chat import RETRY_AFTER, RETURNS_PER_SECOND
from tricorn.chat.identity import Everybody, Gate, ThisMachine
from tricorn.chat.quota import Quotas
from tricorn.protocol.close import Close
from tricorn.service.auth import Tokens, check_exposure
from tricorn.service.jwt_keys import Keys, parse
from tricorn.service.settings import ServiceSettings
from tricorn.settings import SettingError


class Chat:
    """Conversations with an agent: `async with Chat(...) as chat`, and `chat.session` for each client.

    Leaving the block interrupts what goes on and waits for it.
    """

    def __init__(self, agent: Agent, settings: ServiceSettings, gate: Gate) -> None:
        self.settings = settings
        self.closing = False
        self._agent = agent
        self._gate = gate
        self._quotas = Quotas(settings, per_user=gate.wants_token, clock=monotonic)
        self._tasks = asyncio.TaskGroup()
        self._conversations: dict[str, Conversation] = {}
        self._sessions: set[Session] = set()

    async def __aenter__(self) -> Chat:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._interrupt()
        await self._tasks.__aexit__(*error)

    def conversation(self, key: str) -> Conversation:
        """The conversation of this key; it is there from the first time on."""
        conversation = self._conversations.get(key)
        if conversation is None:
            conversation = Conversation(key, self._agent, self.settings, self._tasks)
            self._conversations[key] = conversation
            if self.closing:
                conversation.interrupt()
        return conversation

    async def session(self, ws: Connection) -> Close:
        """Talk the wire protocol with one client until it is gone; return how to close. Its runs go on."""
        session = Session(ws, self.conversation, self._gate, self._quotas, self.settings)
        self._sessions.add(session)
        if self.closing:
            session.say_closing(self._retry_after())
        try:
            return await session.run()
        finally:
            self._sessions.discard(session)

    async def drain(self) -> None:
        """Take no more posts, interrupt all runs, and return when every session was sent all there is.

        How long that takes depends on the peers: put a timeout around it.
        """
        runs = self._interrupt()
        for session in self._sessions:
            session.say_closing(self._retry_after())
        if runs:
            await asyncio.wait(runs)
        await asyncio.sleep(0)  # conversations tell at the end of the loop's turn
        while writers := [session.writer for session in self._sessions if session.writer and not session.writer.done()]:
            await asyncio.wait(writers)

    async def why_not_ready(self) -> str | None:
        """Say why no more clients should be sent here; None where they may come."""
        return "draining" if self.closing else None

    def _retry_after(self) -> float:
        """Return in how many seconds a client should come back: the more there are, the more they are spread."""
        return RETRY_AFTER + random() * (len(self._sessions) - 1) / RETURNS_PER_SECOND

    def _interrupt(self) -> list[asyncio.Task[None]]:
        self.closing = True
        tasks = (conversation.interrupt() for conversation in self._conversations.values())
        return [task for task in tasks if task is not None]


def make_chat(settings: ServiceSettings) -> Chat:
    """The chat that the settings ask for. Raises `SettingError`, OSError, and what importing the agent raises."""
    return Chat(_load_agent(settings.agent), settings, _make_gate(settings))


def _load_agent(name: str) -> Agent:
    if name == ServiceSettings().agent:
        return demo
    module, _, function = name.partition(":")
    return cast(Agent, getattr(import_module(module), function))


def _make_gate(settings: ServiceSettings) -> Gate:
    check_exposure(settings)
    if settings.jwt_key is None:
        return ThisMachine() if settings.auth is None else Everybody()
    key = settings.jwt_key.reveal()
    try:
        if key.startswith("file:"):
            key = Path(key.removeprefix("file:").removeprefix("//")).read_text()
        return Tokens(Keys(parse(key)), settings)  # read once: it never waits for Trio
    except (ValueError, OSError) as error:
        raise SettingError(f"TRICORN_JWT_KEY: {error}") from None
