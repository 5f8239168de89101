"""The chat in a terminal, or in a script: `tricorn chat`."""

from __future__ import annotations

import sys
from contextlib import suppress
from math import inf
from os import isatty, read
from secrets import token_hex
from signal import SIGINT
from urllib.parse import urlsplit, urlunsplit

import msgspec
import trio
from trio_websocket import (
    CloseReason,
    ConnectionClosed,
    ConnectionRejected,
    HandshakeError,
    WebSocketConnection,
    wrap_client_stream,
)

from tricorn.chat.protocol import (
    SUBPROTOCOL,
    AgentCompleted,
    AgentStarted,
    AnyEvent,
    Cancel,
    Error,
    Event,
    Open,
    Opened,
    Outcome,
    Post,
    Reply,
    Request,
    UserMessage,
    Welcome,
)
from tricorn.chat.screen import Screen, one_line
from tricorn.settings import Secret, SettingError

CONNECT_TIMEOUT = 10.0  # seconds; for the handshake, and for the first message after it
DISCONNECT_TIMEOUT = 2.0  # seconds
MAX_MESSAGE_BYTES = 2**26  # an event with a whole answer in it can be long
STDIN = 0
SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
INTERRUPTED = 130  # the exit status that shells use for Ctrl-C

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Reply | AnyEvent).decode


def websocket_url(text: str) -> str:
    """The URL of the chat where `text` names a server: http means ws, and the path is `/ws` where there is none.

    Raises `SettingError`.
    """
    problem = SettingError(f"URL {one_line(text)}: must be a URL like ws://127.0.0.1:8080/ws")
    try:
        parts = urlsplit(text)
        valid = parts.scheme in SCHEMES and parts.hostname and parts.port != 0 and parts.username is None
    except ValueError:
        raise problem from None
    if not valid or not text.isascii() or not text.isprintable() or " " in text:
        raise problem
    path = "/ws" if parts.path in {"", "/"} else parts.path
    return urlunsplit((SCHEMES[parts.scheme], parts.netloc, path, parts.query, ""))


async def chat(url: str, *, conversation: str, message: str | None, raw: bool, token: Secret | None = None) -> int:
    """Post `message`, or else each line of the input in turn, draw what happens, and return the exit status.

    0 where a person left, or every run was a success; 1 where one was not, a post was refused, or the connection could
    not be made or was lost, which is said in one line on stderr; 130 for Ctrl-C. With `raw` events are written as the
    server sent them, one a line. With `message` it is only those of its own post. Cancelled, it closes the connection.
    """
    client = Client(url, conversation, message, raw, token)
    try:
        await client.run()
    except* SystemExit:
        client.status = 1  # this is how rich says that nobody reads stdout any more
    return client.status


class Turn:
    """A post and the run that answers it."""

    def __init__(self) -> None:
        self.post = token_hex(8)
        self.run: str | None = None
        self.cancelled = False
        self.outcome: Outcome | None = None
        self.ended = trio.Event()

    def has(self, event: AnyEvent) -> bool:
        return event.id == self.post if isinstance(event, UserMessage) else event.run == self.run


class Client:
    """One conversation over one connection."""

    def __init__(self, url: str, conversation: str, message: str | None, raw: bool, token: Secret | None) -> None:
        self.status = INTERRUPTED
        self._url = urlsplit(url)
        self._conversation = conversation
        self._message = message
        self._raw = raw
        self._credentials = [(b"Authorization", b"Bearer " + token.reveal().encode())] if token else []
        self._interactive = message is None and not raw and isatty(STDIN)
        self._screen = Screen()
        self._lines = Lines(STDIN)
        self._turn: Turn | None = None
        self._at_prompt = False
        self._head: int | None = None
        self._caught_up = trio.Event()
        self._scope = trio.CancelScope()
        self._ws: WebSocketConnection

    async def run(self) -> None:
        """Talk until there is nothing more to say, or no way to say it. `status` is then the exit status."""
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            await nursery.start(self._obey_interrupts)
            nursery.start_soon(self._screen.animate)
            await self._connect()
            nursery.cancel_scope.cancel()
        self._screen.end_line()

    async def _connect(self) -> None:
        problem = None
        with trio.move_on_after(CONNECT_TIMEOUT) as connecting:
            try:
                async with await self._open_stream() as stream, trio.open_nursery() as nursery:
                    # Not open_websocket_url: its timeout waits for a server that says nothing.
                    self._ws = await wrap_client_stream(
                        nursery,
                        stream,
                        self._url.netloc,
                        urlunsplit(("", "", self._url.path, self._url.query, "")),
                        subprotocols=[SUBPROTOCOL],
                        extra_headers=self._credentials,
                        max_message_size=MAX_MESSAGE_BYTES,
                    )
                    connecting.deadline = inf
                    await self._talk()
                    with trio.move_on_after(DISCONNECT_TIMEOUT):
                        await self._ws.aclose()
                    nursery.cancel_scope.cancel()
            except* (HandshakeError, OSError, trio.BrokenResourceError) as errors:
                problem = what_failed(errors)
        if connecting.cancelled_caught:
            problem = f"no answer within {CONNECT_TIMEOUT:g} seconds"
        if problem is not None:
            self._leave(1, problem)

    async def _open_stream(self) -> trio.SocketStream | trio.SSLStream[trio.SocketStream]:
        host, port = self._url.hostname or "", self._url.port
        if self._url.scheme == "wss":
            return await trio.open_ssl_over_tcp_stream(host, port or 443, https_compatible=True)
        return await trio.open_tcp_stream(host, port or 80)

    async def _talk(self) -> None:
        if self._ws.subprotocol != SUBPROTOCOL:
            self._leave(1, f"the server does not speak {SUBPROTOCOL}")
            return
        # Leaving cancels what is inside the connection, so that the connection itself is closed properly.
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            nursery.start_soon(self._converse)
            problem = await self._listen()
            await trio.lowlevel.checkpoint()  # for the end of a run that was heard just before
            self._leave(1, problem)

    def _leave(self, status: int, problem: str | None = None) -> None:
        self.status = status
        if problem is not None:
            self._screen.end_line()
            print(f"tricorn: {self._url.geturl()}: {one_line(problem)}", file=sys.stderr)
        self._scope.cancel()

    async def _obey_interrupts(self, task_status: trio.TaskStatus[None]) -> None:
        """The first Ctrl-C in a run cancels the run, any other leaves."""
        with trio.open_signal_receiver(SIGINT) as signals:
            task_status.started()
            async with trio.open_nursery() as nursery:
                async for _ in signals:
                    turn = self._turn
                    if turn is None or turn.run is None or turn.cancelled:
                        self._leave(0 if self._at_prompt else INTERRUPTED)
                    else:
                        turn.cancelled = True
                        nursery.start_soon(self._send, Cancel(conversation=self._conversation, run=turn.run))

    async def _converse(self) -> None:
        await self._caught_up.wait()
        if self._message is not None:
            self._leave(await self._say(self._message))
            return
        if self._interactive:
            self._screen.note("Ctrl-C cancels a run, Ctrl-D leaves.")
        statuses = {0}
        while (line := await self._next_line()) is not None:
            if line.strip():
                statuses.add(await self._say(line))
        self._leave(0 if self._interactive else max(statuses))

    async def _next_line(self) -> str | None:
        if not self._interactive:
            return await self._lines.next()
        self._screen.prompt()
        self._at_prompt = True
        line = await self._lines.next()
        self._at_prompt = False
        if line is not None:
            self._screen.line_was_entered()
        return line

    async def _say(self, text: str) -> int:
        """Post, and wait for the run that answers: 0 if that was a success, else 1."""
        self._turn = Turn()
        await self._send(Post(id=self._turn.post, conversation=self._conversation, text=text))
        await self._turn.ended.wait()
        outcome, self._turn = self._turn.outcome, None
        return 0 if outcome == "success" else 1

    async def _send(self, request: Request) -> None:
        with suppress(ConnectionClosed):  # _listen hears of that too, and says so
            await self._ws.send_message(_encode(request).decode())

    async def _listen(self) -> str:
        """Take in what the server says until the connection is lost, and say how it was."""
        patience = CONNECT_TIMEOUT
        while True:
            try:
                with trio.fail_after(patience):
                    text = await self._ws.get_message()
            except trio.TooSlowError:
                return f"connection lost: nothing heard for {patience:g} seconds"
            except ConnectionClosed as closed:
                return _why_closed(closed.reason)
            try:
                message: Reply | AnyEvent = _decode(text)
            except msgspec.DecodeError:
                continue  # something newer than this program
            match message:
                case Welcome():
                    patience = 2 * message.heartbeat
                    await self._send(Open(conversation=self._conversation))
                case Opened():
                    self._head = message.head
                    self._catch_up(0)
                case Error():
                    self._take_refusal(message)
                case Event():
                    self._hear(message, str(text))

    def _hear(self, event: AnyEvent, text: str) -> None:
        turn = self._turn
        if turn and isinstance(event, AgentStarted) and event.post == turn.post:
            turn.run = event.run
        own = turn is not None and turn.has(event)
        if self._raw:
            if own or self._message is None:
                self._screen.write(text)
        elif own and self._interactive and isinstance(event, UserMessage):
            pass  # it stands there as it was typed
        elif own or self._message is None:
            self._screen.draw(event)
        if isinstance(event, AgentCompleted):
            if own and turn:
                turn.outcome = event.outcome
                turn.ended.set()
            elif self._at_prompt:
                self._screen.prompt()
        self._catch_up(event.seq)

    def _catch_up(self, seq: int) -> None:
        """What was said before is heard first."""
        if self._head is not None and seq >= self._head:
            self._caught_up.set()

    def _take_refusal(self, error: Error) -> None:
        turn = self._turn
        if self._head is None:
            self._leave(1, error.message)
        elif turn and turn.run is None and error.ref in {turn.post, None}:
            if self._interactive:
                self._screen.note(error.message)
                turn.ended.set()
            else:
                self._leave(1, error.message)


class Lines:
    """Lines of text from a file descriptor, read without a thread, so that whoever waits for one can be cancelled."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = b""
        self._ended = False

    async def next(self) -> str | None:
        """The next line without its end, or None after the last. A checkpoint; cancelled, it has lost nothing."""
        await trio.lowlevel.checkpoint()
        while b"\n" not in self._buffer and not self._ended:
            with suppress(PermissionError):  # epoll refuses a regular file, which never makes its reader wait
                await trio.lowlevel.wait_readable(self._fd)
            chunk = read(self._fd, 65536)
            self._buffer += chunk
            self._ended = not chunk
        line, end, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace") if line or end else None


def what_failed(error: BaseException) -> str:
    """A few words for people: what the operating system said, which is innermost, once for each address tried."""
    while cause := error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__:
        error = cause
    if isinstance(error, ConnectionRejected):
        return f"the server answered {error.status_code} instead of opening a WebSocket"
    text: str = getattr(error, "strerror", None) or str(error) or "connection lost"
    return text.rpartition(": ")[2].lower()


def _why_closed(reason: CloseReason | None) -> str:
    if reason is None or reason.code == 1006:
        return "connection lost"
    return f"the server closed the connection: {reason.code} {reason.reason or reason.name}"
