"""One client: requests are served as they come, replies and events sent at once, or by a task while it lags behind."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic, time

from msgspec.json import Encoder
from websockets.exceptions import ConnectionClosed

from bench.asyncio_version.connection import Connection
from bench.asyncio_version.conversation import TEXT, Conversation, Cursor, batches
from tricorn.chat.close_codes import FORBIDDEN, OUTBOX_OVERFLOW, TOKEN_EXPIRED, TOO_MANY_CONNECTIONS, UNAUTHENTICATED
from tricorn.chat.conversation.conversation import ConversationClosed, TooManyPosts
from tricorn.chat.identity import Gate, Identity, NotAdmitted, handshake_token
from tricorn.chat.protocol import (
    BATCH_SUBPROTOCOL,
    ENVELOPE,
    Authenticate,
    Cancel,
    ClientRequest,
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
    Welcome,
)
from tricorn.chat.quota import Quota, Quotas
from tricorn.chat.session import EXPIRY_NOTICE, decode
from tricorn.chat.settings import ChatSettings
from tricorn.errors.report import report_error
from tricorn.protocol.close import INTERNAL_ERROR, NORMAL, STALLED, TOO_FAST, Close
from tricorn.protocol.frames import frame
from tricorn.transport.rate_limit import BURST, LOT, TokenBucket

_encode = Encoder().encode


class Ending(Exception):
    """The session is over, and `close` says why."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"{code} {reason}")
        self.close = Close(code, reason)


class Session:
    """What one client is told. It *lags* while a task is there that writes: then nothing is sent but by that."""

    def __init__(
        self,
        ws: Connection,
        conversation: Callable[[str], Conversation],
        gate: Gate,
        quotas: Quotas,
        settings: ChatSettings,
    ) -> None:
        self.ws = ws
        self.batch = ws.subprotocol == BATCH_SUBPROTOCOL
        self.writer: asyncio.Task[None] | None = None
        self._conversation = conversation
        self._gate = gate
        self._quotas = quotas
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._identity: Identity | None = None  # nobody gets anything yet
        self._quota: Quota | None = None
        self._closing: Closing | None = None  # the notice, once the server is about to close the connection
        self._due = Close(UNAUTHENTICATED, "no good token came in time")  # what a passed deadline means
        self._cursors: dict[str, Cursor] = {}
        self._outbox: deque[bytes] = deque()
        self._spoke_at = self._loop.time()
        self._heart: asyncio.TimerHandle | None = None
        self._notice: asyncio.TimerHandle | None = None
        self._messages = TokenBucket(BURST * settings.messages_per_second, BURST, monotonic)
        self._bytes = TokenBucket(BURST * settings.bytes_per_second, BURST, monotonic)
        self._message_lot = LOT * settings.messages_per_second
        self._byte_lot = LOT * settings.bytes_per_second
        self._new_messages = self._new_bytes = 0  # that were not taken from the buckets yet

    async def run(self) -> Close:
        """Serve the client until it is gone or to be got rid of; return how to close."""
        close = Close(NORMAL)
        try:
            async with (
                asyncio.timeout(self._settings.auth_timeout) as self._deadline,
                asyncio.TaskGroup() as self._tasks,
            ):
                await self._arrive()
                await self._read()
                if self.writer is not None:
                    self.writer.cancel()
        except* Ending as endings:
            close = _first(endings).close
        except* TimeoutError:
            close = self._due
        except* Exception as errors:
            close = Close(INTERNAL_ERROR, report_error(errors, context=self.ws.context, **self.ws.known))
        finally:
            self._flush()
            for timer in (self._heart, self._notice):
                if timer is not None:
                    timer.cancel()
            if self._quota is not None:
                self._quotas.leave(self._quota)
            for cursor in self._cursors.values():
                cursor.conversation.detach(cursor)
        return close

    def say_closing(self, retry_after: float) -> None:
        """Tell the client, once it is known who it is, that the server is about to close the connection."""
        self._closing = Closing(reason="the server is shutting down", retry_after=retry_after)
        if self._identity is not None:
            self._put(self._closing)

    # What is sent

    def fall_behind(self) -> None:
        """Have a task send what there is to send, as fast as the client reads, until it has caught up."""
        if self.writer is None:
            for cursor in self._cursors.values():
                cursor.conversation.leave_live(cursor)
            self.writer = self._tasks.create_task(self._write())

    async def _write(self) -> None:
        try:
            while payloads := self._take():
                for share in batches(payloads):
                    async with asyncio.timeout(self._settings.stall_timeout):
                        await self.ws.send_texts([b"\n".join(share)] if self.batch else share)
        except TimeoutError:
            raise Ending(STALLED, "the client reads nothing") from None
        except (ConnectionClosed, OSError):
            return  # who reads from it gets to know as well
        self._spoke_at = self._loop.time()
        self.writer = None
        if self.ws.keeps_up:
            for cursor in self._cursors.values():
                cursor.conversation.go_live(cursor)

    def _take(self) -> list[bytes]:
        """All replies, and of the events that every cursor has before it its share of this turn."""
        lines = [*self._outbox]
        self._outbox.clear()
        for cursor in self._cursors.values():
            events = cursor.conversation.read(cursor.seq)
            cursor.seq += len(events)
            lines += events
        return lines

    def tell(self, texts: list[bytes], frames: bytes) -> None:
        """Write messages behind the replies that wait, all in one write: the frames of `texts`, or the texts."""
        if self._outbox:
            texts = [*self._outbox, *texts]
            frames = b"".join([frame(TEXT, reply) for reply in self._outbox]) + frames
            self._outbox.clear()
        if self.ws.deflates:
            self.ws.write_texts(texts)
        else:
            self.ws.write_frames(frames)

    def _put(self, reply: Reply) -> None:
        """Send a reply at the end of the loop's turn, with the events that it sets off."""
        self._outbox.append(_encode(reply))
        if self.writer is None:
            self._spoke_at = self._loop.time()
            if not self.ws.keeps_up:
                self.fall_behind()
            elif len(self._outbox) == 1:
                self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._outbox and self.writer is None and self.ws.keeps_up:
            self.tell([], b"")

    def _beat(self) -> None:
        """Send a heartbeat where nothing else was for so long."""
        spoke_at = max([self._spoke_at, *(cursor.conversation.spoke_at for cursor in self._cursors.values())])
        left = spoke_at + self._settings.heartbeat - self._loop.time()
        if left <= 0:
            if self.writer is None:
                self._put(Heartbeat())
            left = self._settings.heartbeat
        self._heart = self._loop.call_later(left, self._beat)

    # Who it is

    async def _arrive(self) -> None:
        gate = self._gate
        try:
            token = handshake_token(self.ws.request_headers)
        except NotAdmitted as refusal:
            raise Ending(*refusal.close) from None
        if token is not None or not gate.wants_token:
            await self._authenticate(token)

    async def _authenticate(self, token: str | None) -> None:
        """Take the latest token for what it says, wholly; it must be of the same user."""
        try:
            identity = await self._gate.admit(token, self.ws.peer, self.ws.request_headers)
        except NotAdmitted as refusal:
            raise Ending(*refusal.close) from None
        if self._identity is not None and identity.user != self._identity.user:
            raise Ending(FORBIDDEN, "the token is of another user")
        if self._quota is None:
            self._quota = self._quotas.enter(identity.user)
        if self._quota is None:
            raise Ending(TOO_MANY_CONNECTIONS, f"at most {self._settings.user_connections} connections")
        self._expire(identity.believed_until)
        if self._identity is None:
            self._beat()
        self._identity = identity
        self.ws.context["user"] = identity.user
        self._put(self._welcome(identity))
        if self._closing is not None:
            self._put(self._closing)
        for id, cursor in list(self._cursors.items()):
            if cursor.conversation.key != identity.key(id):
                self._leave(id)
                self._put(Error(code="not_found", message="the new token does not open this conversation", ref=id))

    def _expire(self, at: float | None) -> None:
        """End the session at `at`, in seconds since the Unix epoch, and say so before."""
        if self._notice is not None:
            self._notice.cancel()
        self._due = Close(TOKEN_EXPIRED, "the token has expired")
        if at is None:
            self._deadline.reschedule(None)
            return
        end = self._loop.time() + at - time()
        self._deadline.reschedule(end)
        notice = Closing(reason="the token expires", retry_after=0.0)
        self._notice = self._loop.call_at(end - EXPIRY_NOTICE, self._put, notice)

    def _welcome(self, who: Identity) -> Welcome:
        settings = self._settings
        limits = Limits(
            message_bytes=settings.max_message_bytes,
            event_bytes=settings.event_bytes,
            text_characters=settings.text_characters,
            open_conversations=settings.open_conversations,
            user_runs=settings.user_runs,
            posts_per_minute=settings.posts_per_minute,
        )
        return Welcome(
            connection=str(self.ws.known["connection"]),
            user=who.user,
            heartbeat=settings.heartbeat,
            limits=limits,
            expires_at=who.expires_at,
        )

    # Calls

    async def _read(self) -> None:
        try:
            async for message in self.ws:
                self._check_pace(message)
                for line in self._lines(message):
                    await self._answer(decode(line))
                    if len(self._outbox) > self._settings.outbox:
                        if self.writer is not None:
                            raise Ending(OUTBOX_OVERFLOW, "outbox overflow")
                        self._flush()
                    if self.writer is not None:
                        await asyncio.sleep(0)  # many requests in one message: who writes has a turn too
        except ConnectionClosed:
            pass

    def _check_pace(self, message: str | bytes) -> None:
        self._new_messages += 1
        self._new_bytes += len(message)
        if self._new_messages < self._message_lot and self._new_bytes < self._byte_lot:
            return  # the usual case costs no look at the clock
        if self._messages.take(self._new_messages) or self._bytes.take(self._new_bytes):
            raise Ending(TOO_FAST, "far too many messages or bytes")
        self._new_messages = self._new_bytes = 0

    def _lines(self, message: str | bytes) -> list[str | bytes]:
        if self.batch and isinstance(message, str):
            return [line for line in message.split("\n") if line.strip()]
        return [message]

    async def _answer(self, request: ClientRequest | Error) -> None:
        if isinstance(request, Authenticate):
            await self._authenticate(request.token)
        elif self._identity is None or self._quota is None:
            raise Ending(UNAUTHENTICATED, "authenticate first")
        else:
            try:
                reply = request if isinstance(request, Error) else self._serve(request, self._identity, self._quota)
            except Ending:
                raise
            except Exception as error:
                error_id = report_error(error, context=self.ws.context, **self.ws.known, request=type(request).__name__)
                ref = getattr(request, "id", getattr(request, "conversation", None))
                reply = Error(code="internal", message="internal server error", ref=ref, error_id=error_id)
            if reply is not None:
                self._put(reply)

    def _serve(self, request: Open | Post | Cancel | Leave | Ping, who: Identity, quota: Quota) -> Reply | None:
        """Serve a request. Nothing waits: what it sets off is sent behind the reply."""
        match request:
            case Post():
                return self._post(request, who, quota)
            case Open():
                return self._open(request, who)
            case Cancel():
                if self._conversation(who.key(request.conversation)).cancel(request.run):
                    return None
                message = f"no run {request.run} goes on in this conversation"
                return Error(code="not_found", message=message, ref=request.conversation)
            case Leave():
                self._leave(request.conversation)
                return None
            case Ping():
                return Pong()

    def _open(self, request: Open, who: Identity) -> Reply:
        id = request.conversation
        limit = self._settings.open_conversations
        if id not in self._cursors and len(self._cursors) >= limit:
            return Error(code="too_many", message=f"{limit} conversations are open; leave one first", ref=id)
        conversation = self._conversation(who.key(id))
        after = request.after if request.epoch in (None, conversation.epoch) else 0
        if after > conversation.head:
            message = f"there is no event {after}: the last one is {conversation.head}"
            return Error(code="not_found", message=message, ref=id)
        self._leave(id)
        cursor = self._cursors[id] = Cursor(self, conversation, after)
        conversation.attach(cursor)
        if self.writer is None and self.ws.keeps_up and after == conversation.told:
            conversation.go_live(cursor)
        else:
            self.fall_behind()
        return Opened(conversation=id, epoch=conversation.epoch, head=conversation.head)

    def _post(self, request: Post, who: Identity, quota: Quota) -> Reply:
        id, text = request.id, request.text
        settings = self._settings
        limit = settings.text_characters
        if len(text) > limit:
            return Error(code="too_long", message=f"{len(text)} characters are over the limit of {limit}", ref=id)
        if len(_encode(text)) > settings.event_bytes - ENVELOPE:
            return Error(code="too_long", message="the text does not fit into an event", ref=id)
        if not text.strip():
            return Error(code="malformed", message="the text is empty", ref=id)
        seconds = quota.posts.take()
        if seconds:
            if quota.refusals.take():
                raise Ending(TOO_FAST, f"more than {settings.posts_per_minute} posts a minute")
            return Error(code="too_fast", message=f"too many posts; post again in {seconds:.1f} s", ref=id)
        try:
            seq = self._conversation(who.key(request.conversation)).post(id, text, quota)
        except TooManyPosts as refusal:
            return Error(code="too_many", message=str(refusal), ref=id)
        except ConversationClosed:
            return Error(code="closing", message="the server is shutting down; post again later", ref=id)
        return Posted(id=id, conversation=request.conversation, seq=seq)

    def _leave(self, conversation: str) -> None:
        cursor = self._cursors.pop(conversation, None)
        if cursor is not None:
            cursor.conversation.detach(cursor)


def _first(endings: BaseExceptionGroup[Ending]) -> Ending:
    first = endings.exceptions[0]
    return first if isinstance(first, Ending) else _first(first)
