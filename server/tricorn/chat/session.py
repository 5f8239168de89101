"""The handler: one client on one connection. A reader serves its requests, a writer tells it all there is to tell."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from math import inf
from time import time
from typing import TYPE_CHECKING, get_args

from msgspec import DecodeError, Struct, ValidationError
from msgspec.json import Decoder, Encoder
from trio import Event, current_time, move_on_after, move_on_at
from trio.lowlevel import Abort, Task, checkpoint, current_task, reschedule, wait_task_rescheduled

from tricorn.chat.close_codes import FORBIDDEN, OUTBOX_OVERFLOW, TOKEN_EXPIRED, TOO_MANY_CONNECTIONS, UNAUTHENTICATED
from tricorn.chat.conversation.conversation import Conversation, Cursor, Ended, Full
from tricorn.chat.identity import Identity, NotAdmitted, handshake_token
from tricorn.chat.logs.base import PastLost, Unavailable
from tricorn.chat.protocol import (
    BATCH_SUBPROTOCOL,
    ENVELOPE,
    Authenticate,
    Cancel,
    Closing,
    Error,
    Heartbeat,
    Leave,
    Limits,
    Open,
    Opened,
    Ping,
    Pong,
    Post,
    Posted,
    Reply,
    Request,
    Welcome,
)
from tricorn.chat.quota import Quota
from tricorn.connection import WOKEN
from tricorn.errors.report import report_error, trace_id
from tricorn.metrics import DELIVERED, LIMIT_HITS
from tricorn.protocol.close import SERVICE_RESTART, TOO_FAST

if TYPE_CHECKING:
    from tricorn.chat.chat import Chat
    from tricorn.connection import WebSocket

# Events of one turn of the writer: what a replay may take of memory, and what others wait for.
EVENTS_PER_TURN = 256
# Bytes of one message that joins several lines; many clients take no message over 1 MiB.
BATCH_BYTES = 64 * 1024

READ_AGAIN = 1.0  # seconds, where the log did not answer
PAST_LOST = (SERVICE_RESTART, "the log has lost its past")
EXPIRY_NOTICE = 30.0  # seconds from the notice to the end


class _Envelope(Struct):
    """What can be said of an object that is not a request."""

    type: object
    id: object = None
    conversation: object = None


_encode = Encoder().encode
_decode_request = Decoder(Request).decode
_decode_envelope = Decoder(_Envelope).decode
_KNOWN_TYPES = {request.__struct_config__.tag for request in get_args(Request)}


class Session:
    """What one client is told: replies through a bounded outbox, events of the conversations it follows by cursors."""

    def __init__(self, chat: Chat, ws: WebSocket) -> None:
        self._chat = chat
        self._ws = ws
        self._identity: Identity | None = None  # nobody gets anything yet
        self._end = inf  # when the token expires, in Trio's time
        self._renewed = Event()
        self._allowance: Quota | None = None
        self._batch = ws.subprotocol == BATCH_SUBPROTOCOL
        self._cursors: dict[str, Cursor] = {}
        self._behind: dict[Cursor, None] = {}  # those of the cursors that have something to read
        self._outbox: deque[bytes] = deque()
        self._woken = False  # since the writer last looked what there is
        self._writer: Task | None = None  # the writer, while it waits
        self.spoke_at = current_time()  # in Trio's time
        self._flushing = False
        self._flushed = Event()

    async def run(self) -> None:
        """Serve the client until it is gone. However this ends, the runs that it began go on."""
        try:
            self._ws.nursery.start_soon(self._write)
            await self._arrive()
            await self._read()
        finally:
            if self._allowance is not None:
                self._chat.allowances.leave(self._allowance)
            for cursor in self._cursors.values():
                cursor.conversation.detach(cursor)
            self._flushed.set()

    def beat(self) -> None:
        """Tell the client that this is still here, where there is nothing else on its way."""
        self.spoke_at = current_time()
        if self._writer is not None:
            self._put(Heartbeat())

    def closing(self) -> None:
        """Tell the client that the server is about to close the connection."""
        self._put(Closing(reason="the server is shutting down", retry_after=self._chat.retry_after()))

    async def flush(self) -> None:
        """Wait until the client was sent all that there is, or is gone. A checkpoint; may be cancelled."""
        self._flushing = True
        self._wake()
        await self._flushed.wait()

    def _put(self, reply: Reply) -> None:
        self._outbox.append(_encode(reply))
        self._wake()

    def _notify(self, cursor: Cursor) -> None:
        self._behind[cursor] = None
        self._wake()

    def _wake(self) -> None:
        self._woken = True
        if self._writer is not None:
            reschedule(self._writer, WOKEN)
            self._writer = None

    # Who it is

    async def _arrive(self) -> None:
        """Find out who this is, from the handshake or from a first message that comes in time."""
        ws, gate = self._ws, self._chat.gate
        ws.close_at(current_time() + self._chat.settings.auth_timeout, UNAUTHENTICATED, "no good token came in time")
        try:
            token = handshake_token(ws.headers)
        except NotAdmitted as refusal:
            await ws.close(*refusal.close)
            return
        if gate.wants_token:
            ws.nursery.start_soon(self._give_notice)
        if token is not None or not gate.wants_token:
            await self._authenticate(token)
        if self._chat.closing:
            self.closing()

    async def _authenticate(self, token: str | None) -> None:
        """Take the latest token for what it says, wholly; it must be of the same user. Closes where it is no good."""
        ws = self._ws
        try:
            identity = await self._chat.gate.admit(token, ws.peer[0], ws.headers)
        except NotAdmitted as refusal:
            await ws.close(*refusal.close)
            return
        if self._identity is not None and identity.user != self._identity.user:
            await ws.close(FORBIDDEN, "the token is of another user")
            return
        if identity.believed_until is not None:
            self._end = current_time() + identity.believed_until - time()
        ws.close_at(self._end, TOKEN_EXPIRED, "the token has expired")
        if self._allowance is None:
            self._allowance = self._chat.allowances.enter(identity.user)
        if self._allowance is None:
            LIMIT_HITS.add("user_connections")
            await ws.close(TOO_MANY_CONNECTIONS, f"at most {self._chat.settings.user_connections} connections")
            return
        self._identity = identity
        ws.context["user"] = identity.user
        self._renewed.set()
        self._put(self._welcome(identity))
        for id, cursor in list(self._cursors.items()):
            if cursor.conversation.key != identity.key(id):
                self._leave(id)
                self._put(Error(code="not_found", message="the new token does not open this conversation", ref=id))

    async def _give_notice(self) -> None:
        """Tell that the token expires, once for each."""
        while True:
            self._renewed = Event()
            with move_on_at(self._end - EXPIRY_NOTICE):
                await self._renewed.wait()
                continue
            self._put(Closing(reason="the token expires", retry_after=0.0))
            await self._renewed.wait()

    # The reader

    async def _read(self) -> None:
        async for message in self._ws:
            for line in self._lines(message):
                # No checkpoint since a request was served: what it set off cannot be sent before the reply.
                await self._answer(decode(line))
                if len(self._outbox) > self._chat.settings.outbox:
                    LIMIT_HITS.add("outbox")
                    await self._ws.close(OUTBOX_OVERFLOW, "outbox overflow")
                await checkpoint()  # many requests in one message: the writer has its turns too

    async def _answer(self, request: Request | Error) -> None:
        if isinstance(request, Authenticate):
            await self._authenticate(request.token)
        elif self._identity is None or self._allowance is None:
            await self._ws.close(UNAUTHENTICATED, "authenticate first")
        else:
            reply = (
                request if isinstance(request, Error) else await self._serve(request, self._identity, self._allowance)
            )
            if reply is not None:
                self._put(reply)

    def _lines(self, message: str | bytes) -> list[str | bytes]:
        if self._batch and isinstance(message, str):
            return [line for line in message.split("\n") if line.strip()]
        return [message]

    async def _serve(
        self, request: Open | Post | Cancel | Leave | Ping, who: Identity, allowance: Quota
    ) -> Reply | None:
        ref = request.id if isinstance(request, Post) else getattr(request, "conversation", None)
        try:
            match request:
                case Open():
                    return await self._open(request, who)
                case Post():
                    return await self._post(request, who, allowance)
                case Cancel():
                    return await self._cancel(request, who)
                case Leave():
                    self._leave(request.conversation)
                    return None
                case Ping():
                    return Pong()
        except Unavailable:
            return Error(code="unavailable", message="the log does not answer; try again later", ref=ref)
        except PastLost:
            await self._ws.close(*PAST_LOST)
            return None
        except Exception as error:
            ws = self._ws
            error_id = report_error(
                error,
                context=ws.context,
                connection=ws.id,
                peer=ws.peer,
                path=ws.path,
                trace=trace_id(ws.headers),
                request=request.__class__.__name__,
            )
            return Error(code="internal", message="this did not work", ref=ref, error_id=error_id)

    def _welcome(self, who: Identity) -> Welcome:
        settings = self._chat.settings
        limits = Limits(
            message_bytes=settings.max_message_bytes,
            event_bytes=settings.event_bytes,
            text_characters=settings.text_characters,
            open_conversations=settings.open_conversations,
            user_runs=settings.user_runs,
            posts_per_minute=settings.posts_per_minute,
        )
        return Welcome(
            connection=self._ws.id,
            user=who.user,
            heartbeat=settings.heartbeat,
            limits=limits,
            expires_at=who.expires_at,
        )

    async def _open(self, request: Open, who: Identity) -> Reply:
        id = request.conversation
        limit = self._chat.settings.open_conversations
        if id not in self._cursors and len(self._cursors) >= limit:
            LIMIT_HITS.add("open_conversations")
            return Error(code="too_many", message=f"{limit} conversations are open; leave one first", ref=id)
        conversation = self._chat.conversation(who.key(id))
        with conversation.held():
            await conversation.open()
            after = request.after if request.epoch in (None, conversation.epoch) else 0
            if after > conversation.head:  # it was told of that by another instance
                await conversation.look()
            if after > conversation.head:
                message = f"there is no event {after}: the last one is {conversation.head}"
                return Error(code="not_found", message=message, ref=id)
            self._leave(id)
            cursor = self._cursors[id] = Cursor(conversation, max(after, conversation.first - 1), self._notify)
            conversation.attach(cursor)
            return _opened(conversation)

    async def _post(self, request: Post, who: Identity, allowance: Quota) -> Reply:
        id, text = request.id, request.text
        settings = self._chat.settings
        limit = settings.text_characters
        if len(text) > limit:
            LIMIT_HITS.add("text_characters")
            return Error(code="too_long", message=f"{len(text)} characters are over the limit of {limit}", ref=id)
        if len(_encode(text)) > settings.event_bytes - ENVELOPE:
            LIMIT_HITS.add("event_bytes")
            return Error(code="too_long", message="the text does not fit into an event", ref=id)
        if not text.strip():
            return Error(code="malformed", message="the text is empty", ref=id)
        seconds = allowance.posts.take()
        if seconds:
            LIMIT_HITS.add("posts_per_minute")
            if allowance.refusals.take():
                await self._ws.close(TOO_FAST, f"more than {settings.posts_per_minute} posts a minute")
            return Error(code="too_fast", message=f"too many posts; post again in {seconds:.1f} s", ref=id)
        try:
            seq = await self._chat.conversation(who.key(request.conversation)).post(id, text, allowance)
        except Full as full:
            LIMIT_HITS.add(full.limit)
            return Error(code="too_many", message=str(full), ref=id)
        except Ended:
            return Error(code="closing", message="the server is shutting down; post again later", ref=id)
        return Posted(id=id, conversation=request.conversation, seq=seq)

    async def _cancel(self, request: Cancel, who: Identity) -> Error | None:
        if await self._chat.conversation(who.key(request.conversation)).cancel(request.run):
            return None
        message = f"no run {request.run} goes on in this conversation"
        return Error(code="not_found", message=message, ref=request.conversation)

    def _leave(self, conversation: str) -> None:
        cursor = self._cursors.pop(conversation, None)
        if cursor is not None:
            cursor.conversation.detach(cursor)
            self._behind.pop(cursor, None)

    # The writer

    async def _write(self) -> None:
        """Send all that there is in one go, again and again."""
        while True:
            self._woken = False
            payloads = await self._take()
            if payloads:
                await self._ws.send_text(_batches(payloads) if self._batch else payloads)
                self.spoke_at = current_time()
                continue
            if self._flushing:
                self._flushed.set()
            if self._behind:  # the log did not answer
                with move_on_after(READ_AGAIN):
                    await self._wait()
            else:
                await self._wait()

    async def _wait(self) -> None:
        """Wait until there may be something to send. No checkpoint where there is already."""
        if not self._woken:
            self._writer = current_task()
            await wait_task_rescheduled(self._stop_waiting)

    def _stop_waiting(self, _: object) -> Abort:
        self._writer = None
        return Abort.SUCCEEDED

    async def _take(self) -> list[bytes]:
        """Take all replies, and of the events that every cursor has before it its share of this turn.

        How far to read is settled before the first checkpoint: nothing overtakes a reply that came before it.
        """
        payloads = list(self._outbox)
        self._outbox.clear()
        turn = [(cursor, cursor.conversation.head) for cursor in self._behind]
        for cursor, head in turn:
            if cursor.conversation.lost:
                await self._ws.close(*PAST_LOST)
            limit = min(head - cursor.seq, max(1, EVENTS_PER_TURN // len(turn)))
            if limit > 0:
                try:
                    entries = await cursor.conversation.read(cursor.seq, limit)
                except Unavailable:  # it stays behind, and reads on when the log answers again
                    continue
                if cursor not in self._behind:
                    continue  # the client has left it meanwhile
                if not entries or entries[0].seq > cursor.seq + 1:  # retention was faster than the client
                    payloads.append(_encode(_opened(cursor.conversation)))
                cursor.seq = entries[-1].seq if entries else head
                payloads += [entry.json for entry in entries]
                DELIVERED.add(amount=len(entries))
            if cursor.seq >= cursor.conversation.head and cursor in self._behind:
                del self._behind[cursor]
                cursor.conversation.rest(cursor)
        return payloads


def _opened(conversation: Conversation) -> Opened:
    return Opened(
        conversation=conversation.id, epoch=conversation.epoch, head=conversation.head, first=conversation.first
    )


def decode(message: str | bytes) -> Request | Error:
    """Decode one object that a client sent, or say what is wrong with it."""
    if isinstance(message, bytes):
        return Error(code="malformed", message="a binary message; objects are sent as text")
    try:
        request: Request = _decode_request(message)
    except ValidationError as error:
        return _explain(message, error)
    except (DecodeError, RecursionError) as error:
        return Error(code="malformed", message=str(error))
    return request


def _explain(message: str, error: ValidationError) -> Error:
    try:
        envelope = _decode_envelope(message)
    except (DecodeError, RecursionError):
        return Error(code="malformed", message=str(error))
    ref = next((ref for ref in (envelope.id, envelope.conversation) if isinstance(ref, str)), None)
    if isinstance(envelope.type, str) and envelope.type not in _KNOWN_TYPES:
        return Error(code="unknown_type", message=f"no request has the type {envelope.type[:64]!r}", ref=ref)
    return Error(code="malformed", message=str(error), ref=ref)


def _batches(lines: list[bytes]) -> Iterator[bytes]:
    """Join lines into messages of at most BATCH_BYTES, but for a line that is longer by itself."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        if batch and size + len(line) > BATCH_BYTES:
            yield b"\n".join(batch)
            batch, size = [], 0
        batch.append(line)
        size += len(line) + 1
    yield b"\n".join(batch)
