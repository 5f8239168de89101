"""One conversation: its log in memory, those who follow it, and the runs that answer its posts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from secrets import token_hex
from time import time
from typing import Any, Protocol, cast

from msgspec.json import Encoder
from websockets.asyncio.server import ServerConnection, broadcast

from bench.asyncio_version.connection import Connection
from bench.asyncio_version.run import Agent, Asked, Run, perform
from tricorn.chat.conversation.conversation import ConversationClosed, TooManyPosts
from tricorn.chat.protocol import ConversationEvent, UserMessage
from tricorn.chat.quota import Quota
from tricorn.chat.session import BATCH_BYTES, EVENTS_PER_TURN
from tricorn.chat.settings import ChatSettings
from tricorn.errors.report import report_error

_encode = Encoder().encode


class Follower(Protocol):
    """Whoever is told of a conversation's events.

    Attributes:
        ws: where to.
        batch: takes several events in one message.
    """

    ws: Connection
    batch: bool

    def fall_behind(self) -> None:
        """Read from the cursors, as there may be more before them, and send it as fast as the client reads."""


class Cursor:
    """How far a follower has read one conversation. It is live while every event is sent to it as soon as it is told.

    Attributes:
        seq: that of the last event that was read, where it is not live.
    """

    def __init__(self, follower: Follower, conversation: Conversation, seq: int) -> None:
        self.follower = follower
        self.conversation = conversation
        self.seq = seq
        self.live = False


class Conversation:
    """A list of events, each encoded once; event `seq` is at `seq - 1`.

    Attributes:
        key: tells it from every other; `id` is its user's name for it.
        told: the seq up to which those who follow were told; who is live has it.
        spoke_at: when that was, in the loop's time.
    """

    def __init__(self, key: str, agent: Agent, settings: ChatSettings, tasks: asyncio.TaskGroup) -> None:
        self.key = key
        self.id = key.rpartition("/")[2]
        self.epoch = token_hex(8)
        self.told = 0
        self.spoke_at = 0.0
        self._agent = agent
        self._settings = settings
        self._tasks = tasks  # for runs
        self._closed = False  # takes no more posts
        self._loop = asyncio.get_running_loop()
        self._events: list[bytes] = []
        self._telling = False
        self._cursors: set[Cursor] = set()
        self._one_each: set[ServerConnection] = set()  # live, and take one event a message
        self._batched: set[ServerConnection] = set()  # live, and take several
        self._seqs: dict[tuple[str, str], int] = {}  # of posts, by user and id
        self._posts: deque[tuple[Asked, Quota]] = deque()  # not answered; the first one's run may go on
        self._run: tuple[Run, asyncio.Task[None]] | None = None
        self._given_up = 0  # posts up to here get no answer any more
        self._lingering: asyncio.TimerHandle | None = None

    @property
    def head(self) -> int:
        return len(self._events)

    # The log

    def append(self, kind: type[ConversationEvent], **fields: Any) -> int:
        """Give an event the next seq and the time, encode it, and return its seq. Sent at the end of the loop's turn.

        Raises TypeError or ValueError where it is no JSON, or too long.
        """
        seq = len(self._events) + 1
        json = _encode(kind(conversation=self.id, seq=seq, at=time(), **fields))
        if len(json) > self._settings.event_bytes:
            raise ValueError(f"the event has {len(json)} bytes; it may have {self._settings.event_bytes}")
        self._events.append(json)
        if not self._telling:
            self._telling = True
            self._loop.call_soon(self._tell)
        return seq

    def read(self, after: int) -> list[bytes]:
        """The events behind `after`, as far as they were told, and not too many."""
        return self._events[after : min(self.told, after + EVENTS_PER_TURN)]

    def _tell(self) -> None:
        """Send what is new to all who are live, and have the others come for it."""
        self._telling = False
        self.spoke_at = self._loop.time()
        for events in batches(self._events[self.told :]):
            if self._one_each:
                for event in events:
                    broadcast(self._one_each, event, text=True)
            if self._batched:
                broadcast(self._batched, b"\n".join(events), text=True)
            self.told += len(events)
            for cursor in self._cursors:
                if not cursor.live or not cursor.follower.ws.keeps_up:
                    cursor.follower.fall_behind()

    # Those who follow

    def attach(self, cursor: Cursor) -> None:
        """Have the session told of every event: at once where it `go_live`s, else by `fall_behind`."""
        self._cursors.add(cursor)
        self._linger()

    def detach(self, cursor: Cursor) -> None:
        """Undo `attach`."""
        self.leave_live(cursor)
        self._cursors.remove(cursor)
        self._linger()

    def go_live(self, cursor: Cursor) -> None:
        """Write to the session's connection from now on. It must have read all that was told."""
        cursor.live = True
        self._live(cursor).add(cast(ServerConnection, cursor.follower.ws))

    def leave_live(self, cursor: Cursor) -> None:
        """Let the session read from its cursor from now on."""
        if cursor.live:
            cursor.live = False
            cursor.seq = self.told
            self._live(cursor).remove(cast(ServerConnection, cursor.follower.ws))

    def _live(self, cursor: Cursor) -> set[ServerConnection]:
        return self._batched if cursor.follower.batch else self._one_each

    # Posts and runs

    def post(self, id: str, text: str, by: Quota) -> int:
        """Log what somebody wrote and have the agent answer; a repeated id has no effect. Return its seq.

        Raises ConversationClosed and TooManyPosts.
        """
        if self._closed:
            raise ConversationClosed
        seq = self._seqs.get((by.user, id))
        if seq is not None:
            return seq
        if by.runs >= self._settings.user_runs:
            raise TooManyPosts("user_runs", f"{by.runs} of your posts are not answered yet; post again later")
        waiting = len(self._posts) - (self._run is not None)
        if waiting >= self._settings.waiting_posts:
            raise TooManyPosts("waiting_posts", f"{waiting} posts wait in this conversation; post again later")
        seq = self.append(UserMessage, id=id, user=by.user, text=text)
        self._seqs[by.user, id] = seq
        by.runs += 1
        self._posts.append((Asked(seq, id, by.user, text), by))
        self._linger()
        self._answer()
        return seq

    def cancel(self, run: str) -> bool:
        """Cancel the run of this id; False if no such run goes on."""
        if self._run is None or self._run[0].id != run:
            return False
        self._end_run("cancelled")
        return True

    def interrupt(self) -> asyncio.Task[None] | None:
        """Take no more posts, and end the run that goes on, as the service ends. Return its task."""
        self._closed = True
        if self._run is None:
            return None
        self._end_run("interrupted")
        return self._run[1]

    def _answer(self) -> None:
        if self._run is None and self._posts and not self._closed:
            run = Run(self.id, self._posts[0][0], self.append)
            self._run = run, self._tasks.create_task(self._perform(run))

    async def _perform(self, run: Run) -> None:
        try:
            if run.asked.seq <= self._given_up:
                self._end_run("cancelled")
            await perform(run, self._agent, self._settings.run_timeout)
        except Exception as error:  # a bug of ours: it ends this run and nothing else
            report_error(error, conversation=self.key, run=run.id)
        finally:
            self._run = None
            _, by = self._posts.popleft()
            by.runs -= 1
            self._answer()

    def _end_run(self, cause: Any) -> None:
        if self._run is not None:
            run, task = self._run
            if run.cause is None:
                run.cause = cause
                task.cancel()

    def _linger(self) -> None:
        """Give what is being answered `linger` more seconds, or as long as somebody follows."""
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if self._posts and not self._cursors:
            self._lingering = self._loop.call_later(self._settings.linger, self._give_up)

    def _give_up(self) -> None:
        self._given_up = self.head
        self._end_run("cancelled")


def batches(lines: list[bytes]) -> Iterator[list[bytes]]:
    """Split lines into what goes into one message, which has at most BATCH_BYTES unless one line is longer."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        if batch and size + len(line) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line) + 1
    if batch:
        yield batch
