"""An HTTP/1.1 client for server-sent events: POST a body, read the events of the answer as they come.

It is as much of HTTP as a model's endpoint needs: no redirects, no proxies, no compression, one connection.
"""

from __future__ import annotations

from math import inf
from ssl import SSLContext
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import urlsplit

import h11
import trio
from trio import BrokenResourceError, TooSlowError, current_time, fail_after, fail_at

EVENT_MAX = 1 << 20  # bytes of an event or a line
HEAD_MAX = 64 * 1024  # bytes of the head of an answer
READ_SIZE = 64 * 1024

BROKEN = (OSError, BrokenResourceError, h11.RemoteProtocolError)  # what a connection that fails may raise


class Lost(Exception):
    """The server cannot be reached, does not go on, or does not speak HTTP. The text is for operators."""


class Unreachable(Lost):
    """No connection can be made."""


class Silent(Lost):
    """A deadline has passed."""


class Timeouts(NamedTuple):
    """Seconds: to connect, from the request to the first event of the answer, and between two pieces after that."""

    connect: float = 10.0
    first: float = 180.0
    silence: float = 60.0


TIMEOUTS = Timeouts()


class Endpoint(NamedTuple):
    """Where to POST."""

    is_tls: bool
    host: str
    port: int
    netloc: str
    path: str


class Answer(NamedTuple):
    """The head of an answer. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]


def endpoint(base_url: str, path: str) -> Endpoint:
    """Return the endpoint of this path below a URL. Raises ValueError if the URL cannot be used."""
    try:
        url = urlsplit(base_url)
        is_tls = url.scheme == "https"
        port = url.port or (443 if is_tls else 80)
    except ValueError:
        url = urlsplit("")
        is_tls, port = False, 0
    good = url.scheme in ("http", "https") and url.hostname and url.username is None and not url.query
    if not good or url.fragment or not (base_url.isascii() and base_url.isprintable()) or " " in base_url:
        raise ValueError("must be a URL like https://api.example.com/v1")
    return Endpoint(is_tls, url.hostname or "", port, url.netloc, url.path.rstrip("/") + path)


class Client:
    """POSTs one request after the other to an endpoint, on one connection if the server keeps it open.

    Leaving the block closes the connection at once, without a checkpoint: the server sees that nobody listens any more.
    Every method raises `Lost` if the connection fails or a deadline passes; `post` then makes a new one.
    """

    def __init__(
        self, where: Endpoint, headers: dict[str, str], tls: SSLContext | None = None, timeouts: Timeouts = TIMEOUTS
    ) -> None:
        self._where = where
        self._headers = list({"Host": where.netloc, **headers, "Accept-Encoding": "identity"}.items())
        self._tls = tls
        self._timeouts = timeouts
        self._deadline = inf  # for the next piece
        self._begun = False  # there was an event
        self._socket: trio.socket.SocketType | None = None
        self._stream: trio.abc.Stream
        self._http: h11.Connection
        self._events = EventDecoder()
        self._ended = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, if there is one. Not a checkpoint."""
        if self._socket is not None:
            self._socket.close()  # also under TLS: nobody waits for its goodbye
            self._socket = None

    async def post(self, body: bytes) -> Answer:
        """Send a request, and return the head of the answer. What is left of the last answer is given up."""
        if self._socket is not None and self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            self.close()
            await self._connect()
        self._events, self._begun, self._ended = EventDecoder(), False, False
        self._deadline = current_time() + self._timeouts.first
        headers = [*self._headers, ("Content-Length", str(len(body)))]
        request = h11.Request(method="POST", target=self._where.path, headers=headers)
        events = (request, h11.Data(data=body), h11.EndOfMessage())
        try:
            with fail_at(self._deadline):
                await self._stream.send_all(b"".join([self._http.send(event) or b"" for event in events]))
        except BROKEN as error:
            raise Lost(f"{self._where.netloc} closed the connection: {error}") from error
        except TooSlowError:
            raise Silent(f"{self._where.netloc} did not take the request in time") from None
        while not isinstance(head := await self._next(), h11.Response):
            pass
        return Answer(head.status_code, {name.decode(): value.decode("latin-1") for name, value in head.headers})

    async def events(self) -> list[bytes] | None:
        """Return the data of the next events, as many as have come, or None at the end of the answer."""
        while not self._ended:
            found: list[bytes] = []
            while (event := self._parse()) is not h11.NEED_DATA and not self._ended:
                if type(event) is h11.Data:
                    found += self._events.feed(event.data)
            if self._ended:
                found += self._events.end()
            if found:
                if not self._begun:
                    self._begun, self._deadline = True, current_time() + self._timeouts.silence
                return found
            if not self._ended:
                await self._receive()
        return None

    async def text(self, limit: int) -> str:
        """Return the rest of the answer, at most `limit` bytes of it."""
        body = bytearray()
        while not self._ended and len(body) < limit:
            event = await self._next()
            if isinstance(event, h11.Data):
                body += event.data
        return body[:limit].decode(errors="replace")

    async def _connect(self) -> None:
        where = self._where
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_MAX)
        try:
            with fail_after(self._timeouts.connect):
                stream = await trio.open_tcp_stream(where.host, where.port)
                self._stream, self._socket = stream, stream.socket
                if where.is_tls:
                    assert self._tls is not None, "https needs a context"  # noqa: S101
                    tls = trio.SSLStream(stream, self._tls, server_hostname=where.host, https_compatible=True)
                    self._stream = tls
                    await tls.do_handshake()
        except BROKEN as error:
            raise Unreachable(f"cannot connect to {where.netloc}: {error.__cause__ or error}") from error
        except TooSlowError:
            raise Unreachable(f"cannot connect to {where.netloc} within {self._timeouts.connect:g} s") from None

    async def _next(self) -> object:
        """Return the next event of HTTP."""
        while (event := self._parse()) is h11.NEED_DATA:
            await self._receive()
        return event

    def _parse(self) -> object:
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            raise Lost(f"{self._where.netloc} broke off the answer: {error}") from error
        self._ended = self._ended or type(event) is h11.EndOfMessage
        return event

    async def _receive(self) -> None:
        try:
            with fail_at(self._deadline):
                data = await self._stream.receive_some(READ_SIZE)
            self._http.receive_data(bytes(data))
        except BROKEN as error:
            raise Lost(f"{self._where.netloc} broke off the answer: {error.__cause__ or error}") from error
        except TooSlowError:
            raise Silent(f"{self._where.netloc} has sent nothing for too long") from None
        if self._begun:
            self._deadline = current_time() + self._timeouts.silence


class EventDecoder:
    """Finds the data of events in the bytes of a stream (WHATWG HTML §9.2.6). Raises `Lost` over `EVENT_MAX`. Sans-I/O.

    Lines end with LF or CRLF. Everything but `data` is skipped.
    """

    def __init__(self) -> None:
        self._rest = bytearray()  # of a line
        self._data: list[bytes] = []  # of an event
        self._size = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of the events that end in this piece."""
        self._rest += piece
        found: list[bytes] = []
        if b"\n" in piece:
            *lines, rest = self._rest.split(b"\n")
            self._rest = rest
            for line in lines:
                if line.startswith(b"data:"):
                    self._size += len(line)
                    self._data.append(bytes(line[5:].strip()))  # JSON does not mind white space
                elif self._data and not line.strip():
                    found += self.end()
                if self._size > EVENT_MAX:
                    break
        if self._size + len(self._rest) > EVENT_MAX:
            raise Lost(f"an event has more than {EVENT_MAX} bytes")
        return found

    def end(self) -> list[bytes]:
        """Return the event that has not ended with an empty line, if there is one."""
        data, self._data, self._size = self._data, [], 0
        return [b"\n".join(data)] if data else []
