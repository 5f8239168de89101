"""The load: raw frames over raw sockets, made before the clock starts, so that it costs less than most servers.

Every answer is compared, byte by byte, with what must come back. Frames are made by `websockets`, under random masks.
"""

from __future__ import annotations

import random
import socket
from base64 import b64encode
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha1
from itertools import cycle
from select import EPOLLIN, epoll
from struct import pack
from time import perf_counter, process_time
from types import TracebackType
from typing import NamedTuple, Self

from websockets.frames import Close, Frame, Opcode

from bench.process import Server

PATIENCE = 30  # seconds without any answer after which there will be none
TIMEOUT = pack("ll", PATIENCE, 0)  # of a socket; Python's own would cost a system call for each
RESET = pack("ii", 1, 0)  # for SO_LINGER: close with RST
AT_ONCE = 64  # handshakes; fewer than any server keeps waiting
POOL = 1 << 22  # bytes of messages that are made; then they come again
READ = 1 << 20
CLOSE = 0x88  # the first byte of a close frame
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Failed(Exception):
    """The server did not do what is measured. The text says what it did."""


class Exchange(NamedTuple):
    """What a client sends, and what must come back, to the byte."""

    request: bytes
    answer: bytes


def text(payload: bytes) -> bytes:
    """A client's frame (RFC 6455 §5.2)."""
    return Frame(Opcode.TEXT, payload).serialize(mask=True)


def close(code: int) -> bytes:
    return Frame(Opcode.CLOSE, Close(code, "").serialize()).serialize(mask=True)


def exchange(payloads: Sequence[bytes]) -> Exchange:
    """Messages that are sent together, and their echoes."""
    answers = (Frame(Opcode.TEXT, payload).serialize(mask=False) for payload in payloads)
    return Exchange(b"".join(map(text, payloads)), b"".join(answers))


def echoes(size: int, in_flight: int = 1) -> list[Exchange]:
    """Exchanges of `in_flight` messages, each of so many random bytes of text."""
    number = max(3, min(256, POOL // (size * in_flight)))
    return [
        exchange([random.randbytes(-(-size // 2)).hex()[:size].encode() for _ in range(in_flight)])
        for _ in range(number)
    ]


def frames(heard: bytearray) -> list[tuple[int, bytes]]:
    """Take the whole frames of a server out of what was heard: the first byte and the payload of each."""
    found = []
    at = 0
    while len(heard) - at >= 2:
        size, begin = heard[at + 1], at + 2
        if size >= 126:
            begin += 2 if size == 126 else 8
            size = int.from_bytes(heard[at + 2 : begin], "big") if len(heard) >= begin else 1 << 62
        if len(heard) < begin + size:
            break
        found.append((heard[at], bytes(heard[begin : begin + size])))
        at = begin + size
    del heard[:at]
    return found


class Client:
    """One connection: the answer that it waits for and how much of it has come, or all that was heard."""

    __slots__ = ("answer", "at", "head", "heard", "sock")

    def __init__(self, sock: socket.socket, head: bytes) -> None:
        self.sock = sock
        self.head = head  # of the server's answer to the handshake
        self.answer = b""
        self.at = 0
        self.heard = bytearray()

    def answer_close(self, data: bytes) -> int | None:
        """Answer the close frame if it has come; its code, 1005 where it has none."""
        self.heard += data
        for first, payload in frames(self.heard):
            if first == CLOSE:
                code = int.from_bytes(payload[:2], "big") or 1005
                with suppress(OSError):
                    self.sock.sendall(close(1000))
                return code
        return None


class Meter:
    """CPU seconds of the server and of the load in a block, and the seconds that it took."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.cpu = self.load = self.seconds = 0.0

    def __enter__(self) -> Self:
        self.cpu, self.load, self.seconds = self._server.cpu(), process_time(), perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = perf_counter() - self.seconds
        self.load = process_time() - self.load
        self.cpu = self._server.cpu() - self.cpu


class Clients:
    """Connections to one server. Closed properly at the end of a block, and with RST where it failed."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._poll = epoll()
        self._clients: dict[int, Client] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def __iter__(self) -> Iterator[Client]:
        return iter(self._clients.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.say_goodbye()
        finally:
            self.vanish()
            self._poll.close()

    def connect(self, number: int, path: str | None = None, headers: str = "") -> None:
        """Open so many connections more. Raises `Failed` where a handshake does, and OSError."""
        for begin in range(0, number, AT_ONCE):
            opening = []
            try:
                for _ in range(min(AT_ONCE, number - begin)):
                    opening.append(_knock(self.server, path or self.server.path, headers))
                for sock, accept in opening:
                    client = Client(sock, _welcomed(sock, accept))
                    self._clients[sock.fileno()] = client
                    self._poll.register(sock, EPOLLIN)
            finally:
                for sock, _ in opening:
                    if sock.fileno() not in self._clients:
                        sock.close()

    def exchange(self, exchanges: Sequence[Exchange], number: int, at_once: int | None = None) -> None:
        """Have so many exchanges, no more than `at_once` at a time; who has waited longest is next.

        Raises `Failed` where something else comes back than must, or nothing, and OSError where a connection is lost.
        """
        clients, poll, more = self._clients, self._poll.poll, cycle(exchanges)
        read = min(READ, max(len(exchange.answer) for exchange in exchanges) + 1)
        waiting = deque(clients.values())
        going = min(at_once or len(clients), len(clients), number)
        left = number - going
        for _ in range(going):
            client = waiting.popleft()
            request, client.answer = next(more)
            client.sock.sendall(request)
        while going:
            events = poll(PATIENCE)
            if not events:
                raise Failed(f"does not answer in {PATIENCE} s")
            for descriptor, _ in events:
                client = clients[descriptor]
                data = client.sock.recv(read)
                if not data or not client.answer.startswith(data, client.at):
                    raise Failed("answers something else than it was sent" if data else "closes a connection")
                client.at += len(data)
                if client.at < len(client.answer):
                    continue
                client.answer, client.at = b"", 0
                if not left:
                    going -= 1
                    continue
                left -= 1
                waiting.append(client)
                client = waiting.popleft()
                request, client.answer = next(more)
                client.sock.sendall(request)

    def hear(self, patience: float = PATIENCE) -> list[tuple[Client, bytes]]:
        """What comes next, from whichever clients; nothing from one whose connection has ended, and is here no more.

        The list is empty where nothing came for `patience` seconds.
        """
        heard = []
        for descriptor, _ in self._poll.poll(patience):
            client = self._clients[descriptor]
            try:
                data = client.sock.recv(READ)
            except OSError:
                data = b""
            if not data:
                del self._clients[descriptor]
                client.sock.close()
            heard.append((client, data))
        return heard

    def say_goodbye(self) -> None:
        """Close all properly, from this side."""
        with suppress(OSError):
            for client in self:
                client.sock.sendall(close(1000))
            for client in self:
                while client.sock.recv(READ):
                    pass

    def vanish(self) -> None:
        """Reset all."""
        for client in self:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            client.sock.close()
        self._clients.clear()


def _knock(server: Server, path: str, headers: str) -> tuple[socket.socket, bytes]:
    """Send a handshake; return what must be in the answer too."""
    key = b64encode(random.randbytes(16))
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEOUT)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEOUT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((server.host, server.port))
        sock.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {key.decode()}\r\n{headers}\r\n".encode()
        )
    except BaseException:
        sock.close()
        raise
    return sock, b64encode(sha1(key + GUID, usedforsecurity=False).digest())


def _welcomed(sock: socket.socket, accept: bytes) -> bytes:
    """The head of the answer to a handshake. What may stand behind it stays in the socket."""
    seen = b""
    while (end := seen.find(b"\r\n\r\n")) < 0:
        seen = sock.recv(4096, socket.MSG_PEEK)
        if not seen:
            raise Failed("closes the connection instead of a handshake")
    head = sock.recv(end + 4)
    if not head.startswith(b"HTTP/1.1 101 ") or accept not in head:
        raise Failed(f"answers a handshake with {head.splitlines()[0].decode(errors='replace')}")
    return head
