"""A client that does what it is told to and nothing by itself."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from bench.process import Server


def handshake(path: str = "/") -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: server\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ).encode()


def frame(opcode: int, payload: bytes) -> bytes:
    """A whole masked frame (RFC 6455 §5.2), under the mask of zeros."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


def text(payload: str) -> bytes:
    return frame(1, payload.encode())


class Client:
    """A client that does what it is told to, and nothing by itself."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self._buffer = b""

    @classmethod
    async def connect(cls, server: Server, path: str = "/", *, receive_buffer: int | None = None) -> Client:
        """Raises OSError where there is no handshake, and trio.TooSlowError after 30 seconds."""
        sock = trio.socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            with trio.fail_after(30):
                await sock.connect((server.host, server.port))
                client = cls(sock)
                await sock.send(handshake(path))
                head = b""
                while b"\r\n\r\n" not in head:
                    data = await sock.recv(4096)
                    if not data:
                        raise OSError("no handshake")
                    head += data
        except BaseException:
            sock.close()
            raise
        client._buffer = head.partition(b"\r\n\r\n")[2]
        return client

    async def next(self) -> tuple[int, bytes]:
        """The next frame of the server; raises OSError where there is none."""
        while True:
            if len(self._buffer) >= 2:
                size, at = self._buffer[1] & 127, 2
                if size >= 126:
                    at = 4 if size == 126 else 10
                    size = int.from_bytes(self._buffer[2:at], "big") if len(self._buffer) >= at else 1 << 62
                if len(self._buffer) >= at + size:
                    opcode, payload = self._buffer[0] & 15, self._buffer[at : at + size]
                    self._buffer = self._buffer[at + size :]
                    return opcode, payload
            data = await self.sock.recv(1 << 18)
            if not data:
                raise EOFError
            self._buffer += data

    async def echo(self) -> None:
        await self.sock.send(text("hello"))
        while (await self.next())[0] != 1:
            pass

    async def end(self) -> str:
        """How it ends: the code of the close frame, or what came instead. Answers nothing."""
        try:
            while True:
                opcode, payload = await self.next()
                if opcode == 8:
                    return str(int.from_bytes(payload[:2], "big") or 1005)
        except EOFError:
            return "bare EOF"
        except OSError:
            return "RST"


@asynccontextmanager
async def connected(server: Server, number: int) -> AsyncIterator[list[Client]]:
    """So many clients, until the end of the block."""
    clients: list[Client] = []
    try:
        for _ in range(number):
            clients.append(await Client.connect(server))
        yield clients
    finally:
        for client in clients:
            client.sock.close()
