"""The chat in a terminal, or in a script: `tricorn chat`."""

from __future__ import annotations

import sys
from contextlib import suppress
from math import inf
from os import isatty, read
from secrets import token_hex
from signal import SIGINT
from urllib.parse import urlsplit, urlunsplit

import trio

from tricorn.chat.client.connect import ReconnectingClient, ServerMessage
from tricorn.chat.client.screen import Screen, one_line
from tricorn.chat.protocol import (
    AgentAsked,
    AgentAsking,
    AgentCompleted,
    AgentStarted,
    Answer,
    AnyEvent,
    Cancel,
    ConversationEvent,
    Error,
    Open,
    Opened,
    Outcome,
    Post,
    Posted,
    UserMessage,
    Welcome,
)
from tricorn.settings import SettingError

STDIN = 0
SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
INTERRUPTED = 130  # the exit status that shells use for Ctrl-C
PATIENCE = 60.0  # seconds that a script waits for a connection to come back; a person can leave at any time
SEND_AGAIN = 1.0  # seconds after which what the log could not take is sent again, if the server says nothing


def websocket_url(text: str) -> str:
    """Return the chat's URL at the server that `text` names: http means ws, and the path is `/ws` if there is none.

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


async def chat(url: str, *, conversation: str, message: str | None, raw: bool, token: str | None = None) -> int:
    """Post `message`, or else each line of the input in turn, draw what happens, and return the exit status.

    While the agent asks something, the next line of the input is the answer; with `message`, somebody else has to
    answer.

    After a lost connection it reconnects and goes on where it was. The status is 0 if the user left or every run was a
    success; 1 if a run was not, a post was refused, or there is no connection: none could be made, the server does not
    want us back, or nobody sits at a terminal and the server was away for `PATIENCE` seconds. Then one line on stderr
    says why. It is 130 for Ctrl-C. With `raw`, events are written as the server sent them, one a line, each once; with
    `message`, only those of that post. If cancelled, it drops the connection without a closing handshake.
    """
    talk = TerminalChat(url, conversation, message, raw, token)
    try:
        await talk.run()
    except* SystemExit:
        talk.status = 1  # rich raises it if nobody reads stdout any more
    return talk.status


class Turn:
    """A post and the run that answers it."""

    def __init__(self, text: str) -> None:
        self.post = token_hex(8)
        self.text = text
        self.logged = False
        self.run: str | None = None
        self.children: set[str] = set()
        self.cancelled = False
        self.outcome: Outcome | None = None
        self.is_over = False

    def has(self, event: AnyEvent) -> bool:
        if isinstance(event, UserMessage):
            return event.id == self.post
        return event.run == self.run or event.run in self.children


class TerminalChat:
    """A conversation in a terminal or a script, over as many connections as it takes."""

    def __init__(self, url: str, conversation: str, message: str | None, raw: bool, token: str | None) -> None:
        self.status = INTERRUPTED
        self._url = url
        self._conversation = conversation
        self._message = message
        self._raw = raw
        self._interactive = message is None and not raw and isatty(STDIN)
        self._screen = Screen()
        self._lines = Lines(STDIN)
        self._client = ReconnectingClient(url, token, inf if self._interactive else PATIENCE)
        self._turn: Turn | None = None
        self._asks: dict[str, AgentAsking] = {}  # questions that wait, and that the next line answers
        self._answers: dict[str, str] = {}  # to those of them that have one already
        self._news = trio.Event()  # a question has come or gone, or the turn is over
        self._reading = trio.CancelScope()
        self._input_ended = False
        self._at_prompt = False
        self._epoch: str | None = None
        self._seq = 0  # of the last event received
        self._head: int | None = None
        self._caught_up = trio.Event()
        self._attached = False  # this connection follows the conversation

    async def run(self) -> None:
        """Talk until there is nothing left to post, or the connection is lost for good. Sets `status`."""
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self._obey_interrupts)
            self._nursery.start_soon(self._screen.animate)
            self._nursery.start_soon(self._converse)
            problem = await self._client.run(self._on_message, self._on_loss)
            await trio.lowlevel.checkpoint()  # a run may have ended just before
            if problem is not None and not self._client.left:
                self._leave(1, problem)
            self._nursery.cancel_scope.cancel()
        self._screen.end_line()

    def _leave(self, status: int, problem: str | None = None) -> None:
        self.status = status
        if problem is not None:
            self._complain(problem)
        self._client.leave()

    def _complain(self, problem: str) -> None:
        self._screen.end_line()
        print(f"tricorn: {self._url}: {one_line(problem)}", file=sys.stderr)

    def _on_loss(self, problem: str, pause: float) -> None:
        self._attached = False
        text = f"{problem}; trying again in {pause:.0f} s"
        if self._interactive:
            self._screen.note(text)
        else:
            self._complain(text)

    async def _obey_interrupts(self, task_status: trio.TaskStatus[None]) -> None:
        """Cancel the run at the first Ctrl-C in it; leave at any other."""
        with trio.open_signal_receiver(SIGINT) as signals:
            task_status.started()
            async for _ in signals:
                turn = self._turn
                if turn is None or turn.run is None or turn.cancelled:
                    self._leave(0 if self._at_prompt else INTERRUPTED)
                else:
                    turn.cancelled = True
                    self._nursery.start_soon(self._cancel, turn.run)

    async def _cancel(self, run: str) -> None:
        await self._client.send(Cancel(conversation=self._conversation, run=run))

    async def _converse(self) -> None:
        await self._caught_up.wait()
        if self._message is not None:
            self._leave(await self._say(self._message))
            return
        if self._interactive:
            self._screen.note("Ctrl-C cancels a run, Ctrl-D leaves.")
        statuses = {0}
        while (line := await self._next_line()) is not None:
            if self._open_ask() is not None:
                await self._answer(line)
            elif line.strip():
                statuses.add(await self._say(line))
        self._leave(0 if self._interactive else max(statuses))

    async def _next_line(self) -> str | None:
        if not self._interactive:
            return await self._lines.next()
        self._screen.prompt()
        self._at_prompt = True
        try:
            line = await self._lines.next()
        finally:
            self._at_prompt = False
        if line is not None:
            self._screen.line_was_entered()
        return line

    async def _say(self, text: str) -> int:
        """Post, and wait for the run that answers. Return 0 if that was a success, else 1."""
        turn = self._turn = Turn(text)
        if self._attached:  # otherwise `_attach` posts it
            await self._post(turn)
        while not turn.is_over:
            if self._message is None and not self._input_ended and self._open_ask() is not None:
                with trio.CancelScope() as self._reading:  # until somebody else has answered
                    line = await self._next_line()
                    if line is not None:
                        await self._answer(line)
                    elif self._interactive:
                        self._leave(0)
                    self._input_ended = line is None
            else:
                self._news = trio.Event()
                await self._news.wait()
        self._turn = None
        return 0 if turn.outcome == "success" else 1

    def _open_ask(self) -> AgentAsking | None:
        """Return the first question that has no answer yet."""
        return next((each for id, each in self._asks.items() if id not in self._answers), None)

    async def _answer(self, line: str) -> None:
        asking, text = self._open_ask(), line.strip()
        if asking is None or not text:
            return
        if asking.choices and text not in asking.choices:
            self._inform(f"answer with one of: {', '.join(asking.choices)}")
            return
        self._answers[asking.ask] = text
        if self._attached:  # otherwise `_attach` sends it
            await self._send_answer(asking.ask)

    async def _send_answer(self, ask: str) -> None:
        await self._client.send(Answer(conversation=self._conversation, ask=ask, text=self._answers[ask]))

    def _take_ask(self, event: AgentAsking | AgentAsked, *, own: bool) -> None:
        if isinstance(event, AgentAsked):
            self._asks.pop(event.ask, None)
            self._answers.pop(event.ask, None)
            self._reading.cancel()
        elif own or self._interactive:
            self._asks[event.ask] = event
        self._news.set()

    async def _post(self, turn: Turn) -> None:
        await self._client.send(Post(id=turn.post, conversation=self._conversation, text=turn.text))

    async def _post_again(self, turn: Turn, seconds: float) -> None:
        await trio.sleep(seconds)
        if self._attached and not turn.logged:
            await self._post(turn)

    async def _answer_again(self, ask: str, seconds: float) -> None:
        await trio.sleep(seconds)
        if self._attached and ask in self._answers:
            await self._send_answer(ask)

    async def _on_message(self, message: ServerMessage, text: str) -> None:
        match message:
            case Welcome():
                await self._open()
            case Opened():
                await self._attach(message)
            case Posted():
                if self._turn is not None and self._turn.post == message.id:
                    self._turn.logged = True
            case Error():
                self._take_refusal(message)
            case ConversationEvent():
                if message.seq > self._seq:  # else another connection brought it already
                    self._hear(message, text)

    async def _open(self) -> None:
        await self._client.send(Open(conversation=self._conversation, after=self._seq, epoch=self._epoch))

    async def _attach(self, opened: Opened) -> None:
        """Go on where the last connection ended, with the current turn."""
        turn = self._turn
        if self._epoch not in {None, opened.epoch}:
            self._inform("the server has lost what was said here before")
            self._seq = 0
            self._asks.clear()
            self._answers.clear()
            if turn is not None:
                turn.logged, turn.run = False, None
        elif 0 < self._seq < opened.first - 1:
            self._inform("older messages are no longer kept")
        self._epoch, self._head, self._attached = opened.epoch, opened.head, True
        self._note_caught_up(self._seq)
        if turn is not None and not turn.logged:
            await self._post(turn)
        elif turn is not None and turn.cancelled and turn.run is not None:
            await self._cancel(turn.run)
        for ask in list(self._answers):
            await self._send_answer(ask)

    def _inform(self, text: str) -> None:
        if self._interactive:
            self._screen.note(text)
        else:
            self._complain(text)

    def _hear(self, event: AnyEvent, text: str) -> None:
        turn = self._turn
        self._seq = event.seq
        if turn and isinstance(event, AgentStarted) and event.post == turn.post:
            turn.run = event.run
        elif (
            turn
            and isinstance(event, AgentStarted)
            and event.parent is not None
            and (event.parent == turn.run or event.parent in turn.children)
        ):
            turn.children.add(event.run)
        own = turn is not None and turn.has(event)
        if own and turn and isinstance(event, UserMessage):
            turn.logged = True
        if self._raw:
            if own or self._message is None:
                self._screen.write(text)
        elif own and self._interactive and isinstance(event, UserMessage):
            pass  # the user has typed it there
        elif own or self._message is None:
            self._screen.draw(event)
        if isinstance(event, AgentAsking | AgentAsked):
            self._take_ask(event, own=own)
        if isinstance(event, AgentCompleted) and turn and event.run == turn.run:
            turn.outcome, turn.is_over = event.outcome, True
            self._news.set()
        elif isinstance(event, AgentAsked) and turn is not None:
            pass  # `_say` goes on, and prompts if there is something left to answer
        elif isinstance(event, AgentCompleted | AgentAsking | AgentAsked) and self._at_prompt:
            self._screen.prompt()
        self._note_caught_up(event.seq)

    def _note_caught_up(self, seq: int) -> None:
        """Let the user post once everything that was said before has been received."""
        if self._head is not None and seq >= self._head:
            self._caught_up.set()

    def _take_refusal(self, error: Error) -> None:
        turn = self._turn
        for_now, again = error.retry_after is not None or error.code == "unavailable", error.retry_after or SEND_AGAIN
        if not self._attached:
            if error.code == "not_found" and self._seq > 0:  # the log has lost events that we have seen
                self._epoch, self._seq = "", 0
                self._nursery.start_soon(self._open)
            elif self._head is None:
                self._leave(1, error.message)
        elif error.ref in self._answers:
            if for_now:
                self._nursery.start_soon(self._answer_again, error.ref, again)
            elif error.code != "not_found":  # else somebody else was faster: an event says so
                del self._answers[error.ref]
                self._inform(error.message)
                self._news.set()
        elif turn and not turn.logged and error.ref in {turn.post, None}:
            if for_now:
                self._nursery.start_soon(self._post_again, turn, again)
            elif error.code == "closing":
                pass  # the next connection posts it again
            elif self._interactive:
                self._screen.note(error.message)
                turn.is_over = True
                self._news.set()
            else:
                self._leave(1, error.message)


class Lines:
    """Lines of text from a file descriptor, read without a thread, so that waiting can be cancelled."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = b""
        self._ended = False

    async def next(self) -> str | None:
        """Return the next line without its end, or None after the last. A checkpoint; if cancelled, no text is lost."""
        await trio.lowlevel.checkpoint()
        while b"\n" not in self._buffer and not self._ended:
            with suppress(PermissionError):  # epoll refuses a regular file, which can always be read
                await trio.lowlevel.wait_readable(self._fd)
            chunk = read(self._fd, 65536)
            self._buffer += chunk
            self._ended = not chunk
        line, end, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace") if line or end else None
