"""The handler: one client on one connection, and its requests. What it is told is up to its delivery."""

from __future__ import annotations

from math import ceil, inf
from time import time
from typing import Protocol, get_args

from msgspec import DecodeError, Struct, ValidationError
from msgspec.json import Decoder, Encoder
from trio import current_time, move_on_at
from trio.lowlevel import checkpoint

from tricorn.chat.close_codes import (
    FORBIDDEN,
    OUTBOX_OVERFLOW,
    TOKEN_EXPIRED,
    TOO_MANY_CONNECTIONS,
    UNAUTHENTICATED,
)
from tricorn.chat.conversation.conversation import Conversation, ConversationClosed, NotAChoice, TooManyPosts
from tricorn.chat.delivery import PAST_LOST, Delivery, Teller, opened
from tricorn.chat.identity import Gate, Identity, NotAdmitted, handshake_token
from tricorn.chat.logs.base import PastLost, Unavailable
from tricorn.chat.metrics import ChatMetrics
from tricorn.chat.post_order import PostOrder
from tricorn.chat.protocol import (
    BATCH_SUBPROTOCOL,
    ENVELOPE,
    Answer,
    Authenticate,
    Cancel,
    ClientRequest,
    Closing,
    Error,
    Heartbeat,
    Leave,
    Limits,
    Open,
    Ping,
    Pong,
    Post,
    Posted,
    Reply,
    Welcome,
    is_id,
)
from tricorn.chat.quota import Quota, Quotas
from tricorn.chat.settings import ChatSettings
from tricorn.errors.report import report_error, trace_id
from tricorn.protocol.close import TOO_FAST
from tricorn.transport.rate_limit import BURST, TokenBucket
from tricorn.waiter import Waiter
from tricorn.websocket import WebSocket

AUTHENTICATE_MAX = 16384  # bytes of a message from a client without a token: as much as a handshake may bring

NO_ADDRESS = "unknown"  # of a peer on a Unix socket: no rule takes it for this machine's
ROOM_RETRY = 5.0  # seconds after which a client posts again what found no room; it may be refused again
LOG_RETRY = 1.0  # seconds after which a client asks again what the log could not do
EXPIRY_NOTICE = 30.0  # seconds from the notice to the end


class _Envelope(Struct):
    """What can be said of an object that is not a request."""

    type: object
    id: object = None
    ask: object = None
    conversation: object = None


_encode = Encoder().encode
_decode_request = Decoder(ClientRequest).decode
_decode_envelope = Decoder(_Envelope).decode
_KNOWN_TYPES = {request.__struct_config__.tag for request in get_args(ClientRequest)}


class Conversations(Protocol):
    """Where a session finds conversations, by their keys."""

    def conversation(self, key: str) -> Conversation:
        """Return a conversation that lives, or will as long as somebody holds it and for a while."""

    def glance(self, key: str) -> Conversation:
        """Return a conversation that may not live: it can be asked, and costs nothing afterwards."""


class Session:
    """What one client is told: replies through a bounded outbox, events of the conversations it follows by cursors."""

    def __init__(
        self,
        ws: WebSocket,
        conversations: Conversations,
        teller: Teller,
        gate: Gate,
        quotas: Quotas,
        settings: ChatSettings,
        metrics: ChatMetrics,
    ) -> None:
        self.delivery = Delivery(ws, teller, metrics)
        self._ws = ws
        self._conversations = conversations
        self._gate = gate
        self._quotas = quotas
        self._settings = settings
        self._metrics = metrics
        self._identity: Identity | None = None  # nobody gets anything yet
        self._quota: Quota | None = None
        self._ends = current_time() + settings.auth_timeout  # when the token must have come, then when it expires
        self._renewed = Waiter()
        self._order = PostOrder()
        self._requests = TokenBucket(BURST * settings.messages_per_second, BURST)  # a batch has many in one message
        self._batch = ws.subprotocol == BATCH_SUBPROTOCOL

    async def arrive(self) -> None:
        """Start to write, and find out who this is if the handshake says so."""
        ws, wants_token = self._ws, self._gate.wants_token
        ws.nursery.start_soon(self.delivery.write)
        if wants_token:
            ws.nursery.start_soon(self._watch_token)
        try:
            token = handshake_token(ws.request.headers)
        except NotAdmitted as refusal:
            await ws.close(*refusal.close)
            return
        if token is not None or not wants_token:
            await self._authenticate(token)
        else:
            ws.limit_messages(AUTHENTICATE_MAX)

    async def serve(self) -> None:
        """Serve the client's requests until it is gone."""
        async for message in self._ws:
            lines = self._lines(message)
            if self._requests.take(len(lines)):
                self._metrics.limit_hits.add("messages_per_second")
                await self._ws.close(TOO_FAST, f"more than {self._settings.messages_per_second:,.0f} requests a second")
            for line in lines:
                # No checkpoint since a request was served: what it set off cannot be sent before the reply.
                await self._answer(decode(line))
                if self.delivery.waiting > self._settings.outbox:
                    self._metrics.limit_hits.add("outbox")
                    await self._ws.close(OUTBOX_OVERFLOW, "outbox overflow")
                await checkpoint()  # many requests in one message: the writer has its turns too

    def end(self) -> None:
        """Let go of everything. The runs that the client began go on."""
        if self._quota is not None:
            self._quotas.leave(self._quota)
        self.delivery.end()

    def beat(self) -> None:
        """Tell the client that the server is still here, unless there is something else on its way."""
        self.delivery.spoke_at = current_time()
        if self.delivery.idle:
            self.delivery.put(Heartbeat())

    def closing(self, retry_after: float) -> None:
        """Tell the client that the server is about to close the connection, and in how many seconds to come back."""
        self.delivery.put(Closing(reason="the server is shutting down", retry_after=retry_after))

    # Who it is

    async def _authenticate(self, token: str | None) -> None:
        """Take the latest token for what it says, wholly; it must be of the same user. Closes if it is no good."""
        ws = self._ws
        try:
            peer = ws.request.peer[0] if ws.request.peer is not None else NO_ADDRESS
            identity = await self._gate.admit(token, peer, ws.request.headers)
            if self._identity is not None and identity.user != self._identity.user:
                raise NotAdmitted(FORBIDDEN, "the token is of another user")
            if self._quota is None:
                self._quota = self._quotas.enter(identity.user)
            if self._quota is None:
                self._metrics.limit_hits.add("user_connections")
                raise NotAdmitted(TOO_MANY_CONNECTIONS, f"at most {self._settings.user_connections} connections")
        except NotAdmitted as refusal:
            await ws.close(*refusal.close)
            return
        if self._identity is None:
            ws.limit_messages(self._settings.max_message_bytes)
        self._identity = identity
        ws.context["user"] = identity.user
        until = identity.believed_until
        self._ends = inf if until is None else current_time() + until - time()
        self._renewed.wake()
        self.delivery.put(self._welcome(identity))
        for id, cursor in list(self.delivery.cursors.items()):
            if cursor.conversation.key != identity.key(id):
                self.delivery.leave(id)
                message = "the new token does not open this conversation"
                self.delivery.put(Error(code="not_found", message=message, ref=id))

    async def _watch_token(self) -> None:
        """Close the connection if no good token comes in time, or the last one has expired, after a notice of that."""
        if self._identity is None:
            with move_on_at(self._ends):
                await self._renewed.wait()
        if self._identity is None:
            await self._ws.close(UNAUTHENTICATED, "no good token came in time")
        while True:
            with move_on_at(self._ends - EXPIRY_NOTICE):
                await self._renewed.wait()
                continue
            self.delivery.put(Closing(reason="the token expires", retry_after=0.0))
            with move_on_at(self._ends):
                await self._renewed.wait()
                continue
            await self._ws.close(TOKEN_EXPIRED, "the token has expired")

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
            connection=self._ws.id,
            user=who.user,
            heartbeat=settings.heartbeat,
            limits=limits,
            expires_at=who.expires_at,
        )

    # The reader

    def _lines(self, message: str | bytes) -> list[str | bytes]:
        if self._batch and isinstance(message, str):
            return [line for line in message.split("\n") if line.strip()]
        return [message]

    async def _answer(self, request: ClientRequest | Error) -> None:
        if isinstance(request, Authenticate):
            await self._authenticate(request.token)
        elif self._identity is None or self._quota is None:
            await self._ws.close(UNAUTHENTICATED, "authenticate first")
        elif isinstance(request, Error):
            self.delivery.put(request)
        else:
            reply = await self._serve(request, self._identity, self._quota)
            if reply is not None:
                self.delivery.put(reply)

    async def _serve(
        self, request: Open | Post | Cancel | Answer | Leave | Ping, who: Identity, quota: Quota
    ) -> Reply | None:
        ref = _ref(request)
        try:
            match request:
                case Open():
                    return await self._open(request, who)
                case Post():
                    return await self._post(request, who, quota)
                case Cancel():
                    return await self._cancel(request, who)
                case Answer():
                    return await self._take_answer(request, who)
                case Leave():
                    self.delivery.leave(request.conversation)
                    return None
                case Ping():
                    return Pong()
        except Unavailable:
            return _unavailable("the log does not answer; try again later", ref)
        except PastLost:
            await self._ws.close(*PAST_LOST)
            return None
        except Exception as error:
            error_id = report_error(
                error,
                context=self._ws.context,
                connection=self._ws.id,
                peer=self._ws.request.peer,
                path=self._ws.request.path,
                trace=trace_id(self._ws.request.headers),
                request=request.__class__.__name__,
            )
            return Error(code="internal", message="internal server error", ref=ref, error_id=error_id)

    async def _open(self, request: Open, who: Identity) -> Reply:
        id = request.conversation
        limit = self._settings.open_conversations
        if id not in self.delivery.cursors and len(self.delivery.cursors) >= limit:
            self._metrics.limit_hits.add("open_conversations")
            return Error(code="too_many", message=f"{limit} conversations are open; leave one first", ref=id)
        conversation = self._conversations.conversation(who.key(id))
        with conversation.held():
            view = conversation.view
            await view.open()
            after = request.after if request.epoch in (None, view.epoch) else 0
            if after > view.head:  # it was told of that by another instance
                await conversation.look()
            if after > view.head:
                message = f"there is no event {after}: the last one is {view.head}"
                return Error(code="not_found", message=message, ref=id)
            self.delivery.leave(id)
            self.delivery.follow(conversation, max(after, view.first - 1))
            return opened(view)

    async def _post(self, request: Post, who: Identity, quota: Quota) -> Reply:
        id, text = request.id, request.text
        settings = self._settings
        unfit = self._unfit(text, id)
        if unfit is not None:
            return unfit
        seconds = quota.posts.take()
        if seconds:
            seq = await self._conversations.glance(who.key(request.conversation)).find(id, quota)
            if seq is not None:
                return Posted(id=id, conversation=request.conversation, seq=seq)
            self._metrics.limit_hits.add("posts_per_minute")
            if quota.refusals.take():
                await self._ws.close(TOO_FAST, f"more than {settings.posts_per_minute} posts a minute")
            message = f"too many posts; post again in {seconds:.1f} s"
            return Error(code="too_fast", message=message, ref=id, retry_after=ceil(seconds * 10) / 10)
        if self._order.must_wait(request.conversation, id):
            self._order.refuse(request.conversation, id)
            return _unavailable("the log did not take an earlier post, which comes first; try again later", id)
        try:
            seq = await self._conversations.conversation(who.key(request.conversation)).post(id, text, quota)
        except Unavailable:
            self._order.refuse(request.conversation, id)
            raise
        except TooManyPosts as refusal:
            self._metrics.limit_hits.add(refusal.limit)
            return Error(code="too_many", message=str(refusal), ref=id, retry_after=ROOM_RETRY)
        except ConversationClosed:
            return Error(code="closing", message="the server is shutting down; post again later", ref=id)
        self._order.settle(request.conversation, id)
        return Posted(id=id, conversation=request.conversation, seq=seq)

    async def _cancel(self, request: Cancel, who: Identity) -> Error | None:
        if await self._conversations.glance(who.key(request.conversation)).cancel(request.run):
            return None
        message = f"no run {request.run} is in progress in this conversation"
        return Error(code="not_found", message=message, ref=request.conversation)

    async def _take_answer(self, request: Answer, who: Identity) -> Error | None:
        ask, text = request.ask, request.text
        unfit = self._unfit(text, ask)
        if unfit is not None:
            return unfit
        try:
            problem = await self._conversations.glance(who.key(request.conversation)).answer(ask, text, who.user)
        except NotAChoice as refusal:
            return Error(code="malformed", message=str(refusal), ref=ask)
        return None if problem is None else Error(code="not_found", message=problem, ref=ask)

    def _unfit(self, text: str, ref: str) -> Error | None:
        """Return why a text is none that the log can take, if so."""
        settings = self._settings
        limit = settings.text_characters
        if len(text) > limit:
            self._metrics.limit_hits.add("text_characters")
            return Error(code="too_long", message=f"{len(text)} characters are over the limit of {limit}", ref=ref)
        if len(_encode(text)) > settings.event_bytes - ENVELOPE:
            self._metrics.limit_hits.add("event_bytes")
            return Error(code="too_long", message="the text does not fit into an event", ref=ref)
        if not text.strip():
            return Error(code="malformed", message="the text is empty", ref=ref)
        return None


def _ref(request: Open | Post | Cancel | Answer | Leave | Ping) -> str | None:
    """Return what a refusal of a request is about."""
    match request:
        case Post():
            return request.id
        case Answer():
            return request.ask
        case Ping():
            return None
    return request.conversation


def _unavailable(message: str, ref: str | None) -> Error:
    return Error(code="unavailable", message=message, ref=ref, retry_after=LOG_RETRY)


def decode(message: str | bytes) -> ClientRequest | Error:
    """Decode one object that a client sent, or say what is wrong with it."""
    if isinstance(message, bytes):
        return Error(code="malformed", message="a binary message; objects are sent as text")
    try:
        request: ClientRequest = _decode_request(message)
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
    # What is no id is not repeated: it may be as long as a message, and many replies may wait for a client to read.
    ref = next(filter(is_id, (envelope.id, envelope.ask, envelope.conversation)), None)
    if isinstance(envelope.type, str) and envelope.type not in _KNOWN_TYPES:
        return Error(code="unknown_type", message=f"no request has the type {envelope.type[:64]!r}", ref=ref)
    return Error(code="malformed", message=str(error), ref=ref)
