"""What a client is told: replies through a bounded outbox, events of the conversations it follows by cursors.

All that comes for any client in one turn of the loop goes out in the next: one task, the teller, sends whatever is in
memory and fits. A client that has to wait, for its network or for the log, has a writer of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec.json import Encoder
from trio import Event, WouldBlock, current_time, move_on_after
from trio.lowlevel import checkpoint

from tricorn.chat.conversation.conversation import Conversation
from tricorn.chat.conversation.log_view import LogView
from tricorn.chat.logs.base import Entry, Unavailable
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.protocol import BATCH_SUBPROTOCOL, Opened, Reply
from tricorn.connection import Disconnected
from tricorn.protocol.close import SERVICE_RESTART
from tricorn.protocol.prepared import Prepared
from tricorn.waiter import Waiter
from tricorn.websocket import WebSocket

EVENTS_PER_TURN = 256  # of one client: how long others wait for a replay
BYTES_PER_TURN = 1024 * 1024  # of one client, but at least one event: what a client that does not read holds in memory
BATCH_BYTES = 64 * 1024  # of one message that joins several lines; many clients take no message over 1 MiB
TOLD_AT_ONCE = 100  # clients, before other tasks get their turn
READ_AGAIN = 1.0  # seconds, if the log did not answer
PAST_LOST = (SERVICE_RESTART, "the log has lost its past")

_encode = Encoder().encode


class Cursor:
    """How far a client has been sent a conversation that it follows: up to and including the event `seq`."""

    __slots__ = ("_delivery", "conversation", "seq", "unreadable", "view")

    def __init__(self, delivery: Delivery, conversation: Conversation, seq: int) -> None:
        self.conversation = conversation
        self.view: LogView = conversation.view
        self.seq = seq
        self.unreadable = False  # the log did not answer when it was read last
        self._delivery = delivery

    def wake(self) -> None:
        """There is something after `seq`, or never will be."""
        delivery = self._delivery
        delivery.behind[self] = None
        delivery.send_soon()


class Teller:
    """Sends what is in memory to all who have not heard it."""

    def __init__(self) -> None:
        self._marked: list[Delivery] = []
        self._prepared: dict[tuple[object, ...], Prepared] = {}  # of this turn
        self._some = Waiter()
        self._over = False

    def mark(self, delivery: Delivery) -> None:
        """Have `delivery.tell` called when the tasks that are ready now have run."""
        if self._over:
            delivery.write_soon()
        else:
            self._marked.append(delivery)
            self._some.wake()

    async def run(self) -> None:
        """Tell until cancelled; from then on, deliveries write for themselves."""
        try:
            while True:
                if self._marked:
                    await checkpoint()
                else:
                    await self._some.wait()
                now = current_time()
                marked, self._marked = self._marked[:TOLD_AT_ONCE], self._marked[TOLD_AT_ONCE:]
                for delivery in marked:
                    delivery.tell(now)
                self._prepared.clear()
        finally:
            self._over = True
            for delivery in self._marked:
                delivery.write_soon()

    def prepare(self, view: LogView, entries: list[Entry], batch: bool) -> Prepared:
        """Return the messages that tell of entries, framed once for all who are told in this turn."""
        key = view, entries[0].seq, entries[-1].seq, batch
        prepared = self._prepared.get(key)
        if prepared is None:
            payloads = [entry.json for entry in entries]
            prepared = self._prepared[key] = Prepared(_batches(payloads) if batch else payloads, text=True)
        return prepared


class Delivery:
    """Sends one client all that there is for it.

    Attributes:
        spoke_at: when it last sent something, in Trio's time.
        idle: all that there was is sent.
        waiting: replies that are not sent yet.
        cursors: of the conversations that the client follows, by their ids.
        behind: those of them that there is something for.
    """

    def __init__(self, ws: WebSocket, teller: Teller, metrics: ChatMetrics) -> None:
        self.spoke_at = current_time()
        self.idle = True
        self.cursors: dict[str, Cursor] = {}
        self.behind: dict[Cursor, None] = {}
        self._ws = ws
        self._teller = teller
        self._metrics = metrics
        self._batch = ws.subprotocol == BATCH_SUBPROTOCOL
        self._outbox: list[bytes] = []
        self._is_needed = False  # the writer
        self._needed = Waiter()  # where it waits until it is
        self._paused = Waiter()  # where it waits if it can only try again
        self._failure: Exception | None = None
        self._ended = False
        self._flushing = False
        self._flushed = Event()

    @property
    def waiting(self) -> int:
        return len(self._outbox)

    def put(self, reply: Reply) -> None:
        """Send a reply, before all events that come into a log from now on."""
        self._outbox.append(_encode(reply))
        self.send_soon()

    def follow(self, conversation: Conversation, seq: int) -> None:
        """Send every event of the conversation that follows `seq`."""
        cursor = self.cursors[conversation.view.id] = Cursor(self, conversation, seq)
        conversation.attach(cursor)
        if seq < conversation.view.head:
            cursor.wake()

    def leave(self, id: str) -> None:
        """Send no more of a conversation, if it is followed."""
        cursor = self.cursors.pop(id, None)
        if cursor is not None:
            self.behind.pop(cursor, None)
            cursor.conversation.detach(cursor)

    def send_soon(self) -> None:
        """Send what there is when the tasks that are ready now have run."""
        if self.idle:
            self.idle = False
            self._teller.mark(self)
        else:
            self._paused.wake()

    async def flush(self) -> None:
        """Wait until the client was sent all that there is, or is gone. A checkpoint; may be cancelled."""
        self._flushing = True
        self.send_soon()
        await self._flushed.wait()

    def end(self) -> None:
        """Send nothing any more."""
        self._ended = True
        for id in list(self.cursors):
            self.leave(id)
        self._flushed.set()

    def tell(self, now: float) -> None:
        """Send what is in memory, and leave the rest to the writer. For the teller."""
        try:
            if self._send_at_once():
                self.spoke_at = now
                return
        except Disconnected:  # the session ends
            return
        except Exception as error:  # a bug, or no memory: it ends this connection and nothing else
            self._failure = error
        self.write_soon()

    def write_soon(self) -> None:
        """Have the writer do it. For the teller."""
        self._is_needed = True
        self._needed.wake()

    async def write(self) -> None:
        """Send what cannot be sent at once, until cancelled. Raises what went wrong, and Disconnected."""
        while True:
            if not self._is_needed:
                await self._needed.wait()
            self._is_needed = False
            while self._failure is None and not self._send_at_once():
                await self._send_in_time()
            if self._failure is not None:
                raise self._failure

    # Inside

    def _send_at_once(self) -> bool:
        """Send all that there is and return True, or send nothing and return False if there is something to wait for.

        What it sends is within the bounds of one turn.
        """
        behind = []
        for cursor in self.behind:
            entries = cursor.view.in_memory(cursor.seq)
            if entries is None or len(entries) > EVENTS_PER_TURN:
                return False
            behind.append((cursor, entries))
        payloads = self._prepared(behind)
        if payloads is None:
            lines = self._outbox + [entry.json for _, entries in behind for entry in entries]
            payloads = list(_batches(lines)) if self._batch and lines else lines
        if sum(map(len, payloads)) > BYTES_PER_TURN:
            return False
        if payloads and not self._ended:
            try:
                self._ws.send_texts_nowait(payloads)
            except WouldBlock:
                return False
        self._outbox = []
        for cursor, entries in behind:
            self._advance(cursor, entries)
        self.idle = True
        if self._flushing:
            self._flushed.set()
        return True

    def _prepared(self, behind: list[tuple[Cursor, list[Entry]]]) -> Sequence[bytes] | None:
        """Return what others are told as well, if that is all."""
        if len(behind) != 1 or self._outbox:
            return None
        [(cursor, entries)] = behind
        if not entries or not cursor.conversation.is_shared:
            return None
        return self._teller.prepare(cursor.view, entries, self._batch)

    async def _send_in_time(self) -> None:
        """Send one turn's worth, as soon as the log and the client's network allow it."""
        turn = [(cursor, cursor.view.head) for cursor in self.behind if not cursor.unreadable]
        if self._outbox or turn:
            payloads = await self._take(turn)
            if payloads:
                await self._ws.send_texts(_batches(payloads) if self._batch else payloads)
                self.spoke_at = current_time()
            return
        with move_on_after(READ_AGAIN):
            await self._paused.wait()
        for cursor in self.behind:
            cursor.unreadable = False

    async def _take(self, turn: list[tuple[Cursor, int]]) -> list[bytes]:
        """Take all replies, and of the events before each cursor, up to the seq given, its share of this turn.

        How far to read is settled before the first checkpoint: nothing overtakes a reply that came before it.
        """
        payloads, self._outbox = self._outbox, []
        room = BYTES_PER_TURN
        for cursor, head in turn:
            view = cursor.view
            if view.lost:
                await self._ws.close(*PAST_LOST)
            limit = min(head - cursor.seq, max(1, EVENTS_PER_TURN // len(turn)))
            try:
                entries = await view.read(cursor.seq, limit)
            except Unavailable:  # it is read again when the log may answer again
                cursor.unreadable = True
                continue
            if self.cursors.get(view.id) is not cursor:
                continue  # the client has left it meanwhile
            if not entries or entries[0].seq > cursor.seq + 1:  # retention was faster than the client
                payloads.append(_encode(opened(view)))
                cursor.seq = head
            entries = _within(entries, room // len(turn))
            payloads += [entry.json for entry in entries]
            self._advance(cursor, entries)
        return payloads

    def _advance(self, cursor: Cursor, entries: list[Entry]) -> None:
        """The client was sent these entries, or is about to be."""
        if entries:
            cursor.seq = entries[-1].seq
            self._metrics.delivered.add(amount=len(entries))
        if cursor.seq >= cursor.view.head:
            self.behind.pop(cursor, None)
            cursor.view.rest(cursor)


def opened(view: LogView) -> Opened:
    """Say where a conversation stands."""
    return Opened(conversation=view.id, epoch=view.epoch, head=view.head, first=view.first)


def _within(entries: list[Entry], room: int) -> list[Entry]:
    """Return the first entries that have room in so many bytes, and at least one."""
    for taken, entry in enumerate(entries):
        room -= len(entry.json)
        if room < 0:
            return entries[: max(1, taken)]
    return entries


def _batches(lines: list[bytes]) -> Iterator[bytes]:
    """Join lines into messages of at most BATCH_BYTES, except for a line that is longer by itself."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        if batch and size + len(line) > BATCH_BYTES:
            yield b"\n".join(batch)
            batch, size = [], 0
        batch.append(line)
        size += len(line) + 1
    yield b"\n".join(batch)
