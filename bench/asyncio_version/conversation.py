"""One conversation: its log in memory, those who follow it, and the runs that answer its posts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from secrets import token_hex
from time import time
from typing import Protocol

from msgspec.json import Encoder

from bench.asyncio_version.connection import Connection
from bench.asyncio_version.run import Agent, Asked, Cause, Run, perform
from tricorn.chat.conversation.conversation import ConversationClosed, TooManyPosts
from tricorn.chat.delivery import BATCH_BYTES, EVENTS_PER_TURN
from tricorn.chat.protocol import ConversationEvent, UserMessage
from tricorn.chat.quota import Quota
from tricorn.chat.settings import ChatSettings
from tricorn.errors.report import report_error
from tricorn.protocol.frames import Opcode, frame

_encode = Encoder().encode
TEXT = int(Opcode.TEXT)


class Follower(Protocol):
    """Whoever is told of a conversation's events.

    Attributes:
        ws: where to.
        batch: takes several events in one message.
    """

    ws: Connection
    batch: bool

    def tell(self, texts: list[bytes], frames: bytes) -> None:
        """Write messages to one who is live: the frames of `texts`, or the texts where the connection compresses."""

    def fall_behind(self) -> None:
        """Read from the cursors, as there may be more before them, and send it as fast as the client reads."""


class Cursor:
    """How far a follower has read one conversation; while it is live, every event is sent to it as soon as it is told.

    Attributes:
        seq: that of the last event that was read, where it is not live.
    """

    def __init__(self, follower: Follower, conversation: Conversation, seq: int) -> None:
        self.follower = follower
        self.conversation = conversation
        self.seq = seq


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
        self._live: set[Cursor] = set()  # some of them
        self._seqs: dict[tuple[str, str], int] = {}  # of posts, by user and id
        self._posts: deque[tuple[Asked, Quota]] = deque()  # not answered; the first one's run may go on
        self._run: tuple[Run, asyncio.Task[None]] | None = None
        self._given_up = 0  # posts up to here get no answer any more
        self._lingering: asyncio.TimerHandle | None = None

    @property
    def head(self) -> int:
        return len(self._events)

    # The log

    def append(self, event: ConversationEvent) -> None:
        """Encode an event whose seq is the next. It is sent at the end of the loop's turn.

        Raises TypeError or ValueError where it is no JSON, or too long.
        """
        json = _encode(event)
        if len(json) > self._settings.event_bytes:
            raise ValueError(f"the event has {len(json)} bytes; it may have {self._settings.event_bytes}")
        self._events.append(json)
        if not self._telling:
            self._telling = True
            self._loop.call_soon(self._tell)

    def read(self, after: int) -> list[bytes]:
        """The events behind `after`, as far as they were told, and not too many."""
        return self._events[after : min(self.told, after + EVENTS_PER_TURN)]

    def _tell(self) -> None:
        """Send what is new to all who are live, each in one write, and have the others come for it.

        A frame of a server is the same for everybody, so it is made once.
        """
        self._telling = False
        self.spoke_at = self._loop.time()
        for events in batches(self._events[self.told :]):
            self.told += len(events)
            joined: list[bytes] = []
            one_each = together = b""
            slow = self._cursors - self._live if len(self._live) < len(self._cursors) else set()
            for cursor in self._live:
                follower = cursor.follower
                if follower.batch:
                    if not together:
                        joined = [b"\n".join(events)]
                        together = frame(TEXT, joined[0])
                    follower.tell(joined, together)
                else:
                    if not one_each:
                        one_each = b"".join([frame(TEXT, event) for event in events])
                    follower.tell(events, one_each)
                if not follower.ws.keeps_up:
                    slow.add(cursor)
            for cursor in slow:
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
        self._live.add(cursor)

    def leave_live(self, cursor: Cursor) -> None:
        """Let the session read from its cursor from now on."""
        if cursor in self._live:
            self._live.remove(cursor)
            cursor.seq = self.told

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
        seq = self.head + 1
        self.append(UserMessage(conversation=self.id, seq=seq, at=time(), id=id, user=by.user, text=text))
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
            run = Run(self, self._posts[0][0])
            self._run = run, self._tasks.create_task(self._perform(run))

    async def _perform(self, run: Run) -> None:
        timer = self._loop.call_later(self._settings.run_timeout, self._end_run, "timeout")
        try:
            if run.asked.seq <= self._given_up:
                self._end_run("abandoned")
            await perform(run, self._agent)
        except Exception as error:  # a bug of ours: it ends this run and nothing else
            report_error(error, conversation=self.key, run=run.id)
        finally:
            timer.cancel()
            self._run = None
            _, by = self._posts.popleft()
            by.runs -= 1
            self._answer()

    def _end_run(self, cause: Cause) -> None:
        if self._run is not None:
            run, task = self._run
            if run.cause is None:
                run.cause = cause
                task.cancel()

    def _linger(self) -> None:
        """Give what is being answered `abandon_after` more seconds, or as long as somebody follows."""
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if self._posts and not self._cursors:
            self._lingering = self._loop.call_later(self._settings.abandon_after, self._give_up)

    def _give_up(self) -> None:
        self._given_up = self.head
        self._end_run("abandoned")


def batches(lines: list[bytes]) -> Iterator[list[bytes]]:
    """Split lines into what goes into one message, which has at most BATCH_BYTES unless one line is longer."""
    if sum(map(len, lines)) + len(lines) <= BATCH_BYTES:
        yield lines  # as nearly always
        return
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
