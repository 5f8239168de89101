"""Servers under test as processes of their own, and a client that does what it is told to and nothing by itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

PRODUCTION = Path(__file__).with_name("production")
PYTHON = [sys.executable, "-P"]
ASGI = ["--app-dir", str(PRODUCTION), "asgi_echo:app"]
SERVERS = {
    "tricorn": [*PYTHON, "tricorn_run.py", "{host}", "{port}"],
    "trio-websocket": [*PYTHON, "trio_websocket_serve.py", "{host}", "{port}"],
    "websockets (trio)": [*PYTHON, "websockets_trio_serve.py", "{host}", "{port}"],
    "websockets (asyncio)": [*PYTHON, "websockets_asyncio_serve.py", "{host}", "{port}"],
    "hypercorn (trio)": [sys.executable, "-m", "hypercorn", "-k", "trio", "-b", "{host}:{port}", "asgi_echo:app"],
    "hypercorn (asyncio)": [sys.executable, "-m", "hypercorn", "-k", "asyncio", "-b", "{host}:{port}", "asgi_echo:app"],
    "uvicorn (websockets)": [
        *(sys.executable, "-m", "uvicorn", "--ws", "websockets-sansio"),
        *("--host", "{host}", "--port", "{port}", *ASGI),
    ],
    "uvicorn (wsproto)": [
        *(sys.executable, "-m", "uvicorn", "--ws", "wsproto"),
        *("--host", "{host}", "--port", "{port}", *ASGI),
    ],
    "aiohttp": [*PYTHON, "aiohttp_run.py", "{host}", "{port}"],
}

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: server\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
MIB = 1 << 20


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
    async def connect(cls, host: str, port: int, *, receive_buffer: int | None = None) -> Client:
        sock = trio.socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await sock.connect((host, port))
            client = cls(sock)
            await sock.send(HANDSHAKE)
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


class Server:
    """A server's process, and those that it has started."""

    def __init__(self, name: str, process: trio.Process, host: str, port: int) -> None:
        self.name = name
        self.process = process
        self.host = host
        self.port = port

    async def connect(self, **options: int) -> Client:
        with trio.fail_after(30):
            return await Client.connect(self.host, self.port, **options)

    @asynccontextmanager
    async def clients(self, number: int) -> AsyncIterator[list[Client]]:
        clients: list[Client] = []
        try:
            for _ in range(number):
                clients.append(await self.connect())
            yield clients
        finally:
            for client in clients:
                client.sock.close()

    def _pids(self) -> list[int]:
        pids = [self.process.pid]
        for pid in pids:
            try:
                pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            except OSError:
                continue
        return pids

    def _sum(self, read: Callable[[int], float]) -> float:
        total = 0.0
        for pid in self._pids():
            try:
                total += read(pid)
            except OSError:
                continue
        return total

    def memory(self) -> float:
        """MiB that are resident."""
        page = os.sysconf("SC_PAGE_SIZE")
        return self._sum(lambda pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page) / MIB

    def cpu(self) -> float:
        """Seconds of CPU so far."""

        def read(pid: int) -> float:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        return self._sum(read)

    def descriptors(self) -> int:
        return int(self._sum(lambda pid: len(os.listdir(f"/proc/{pid}/fd"))))

    def is_alive(self) -> bool:
        return self.process.poll() is None


@asynccontextmanager
async def serving(
    name: str, *, host: str = "127.0.0.1", bind: str = "127.0.0.1", before: tuple[str, ...] = ()
) -> AsyncIterator[Server]:
    """Run a server until the end of the block. `before` is what its command stands behind."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    command = [*before, *(part.format(host=bind, port=port) for part in SERVERS[name])]
    process = await trio.lowlevel.open_process(
        command, cwd=PRODUCTION, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        server = Server(name, process, host, port)
        with trio.fail_after(30):
            while True:
                try:
                    (await Client.connect(host, port)).sock.close()
                    break
                except OSError:
                    await trio.sleep(0.05)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
            await process.wait()
