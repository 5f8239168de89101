"""CPU that servers spend on an echoed message, in interleaved rounds.

    python bench/echo.py [--connections 100] [--in-flight 1] [--bytes 64] [--messages 40000] [--rounds 5]

What counts is the user and system time of the server's process, not the time on the wall: it hardly depends on what
else the machine is doing. The load is raw frames over raw sockets, so that it costs less than any server; each echo is
checked by its length.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from platform import python_version
from statistics import median

SERVERS = Path(__file__).with_name("servers")
TICKS = os.sysconf("SC_CLK_TCK")
KEY = b"AAAAAAAAAAAAAAAAAAAAAA=="
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n\r\n" % KEY
)


def length(size: int, mask: int) -> bytes:
    """The length field of a frame, RFC 6455 §5.2."""
    if size < 126:
        return bytes([mask | size])
    if size < 1 << 16:
        return bytes([mask | 126]) + size.to_bytes(2, "big")
    return bytes([mask | 127]) + size.to_bytes(8, "big")


class Server:
    """A server's process and the connections to it."""

    def __init__(self, program: Path, connections: int, stack: ExitStack) -> None:
        self.name = program.stem
        self._process = stack.enter_context(
            subprocess.Popen([sys.executable, "-P", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        )
        stack.callback(self._process.kill)
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        self._poll = stack.enter_context(select.epoll())
        self._sockets = {}
        for _ in range(connections):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(REQUEST)
            head = b""
            while b"\r\n\r\n" not in head:
                head += sock.recv(4096)
            self._poll.register(sock, select.EPOLLIN)
            self._sockets[sock.fileno()] = sock

    def cpu(self) -> float:
        """Seconds of user and system time that the process has spent."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def echo(self, messages: int, in_flight: int, size: int) -> float:
        """Have messages echoed; return the seconds of CPU for each."""
        burst = (b"\x81" + length(size, 0x80) + bytes(4) + b"x" * size) * in_flight
        answer = (len(length(size, 0)) + 1 + size) * in_flight
        missing = dict.fromkeys(self._sockets, 0)
        rounds = dict.fromkeys(self._sockets, -(-messages // (len(self._sockets) * in_flight)))
        began = self.cpu()
        for descriptor, sock in self._sockets.items():
            sock.sendall(burst)
            missing[descriptor] = answer
        while missing:
            for descriptor, _ in self._poll.poll():
                sock = self._sockets[descriptor]
                received = len(sock.recv(1 << 20))
                missing[descriptor] -= received
                if not received or missing[descriptor] < 0:
                    raise RuntimeError(f"{self.name} did not echo what was sent")
                if missing[descriptor] == 0:
                    rounds[descriptor] -= 1
                    if rounds[descriptor]:
                        sock.sendall(burst)
                        missing[descriptor] = answer
                    else:
                        del missing[descriptor]
        return (self.cpu() - began) / messages


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU that servers spend on an echoed message.")
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--in-flight", type=int, default=1, help="messages sent before the first answer is awaited")
    parser.add_argument("--bytes", type=int, default=64, help="of a message")
    parser.add_argument("--messages", type=int, default=40000, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        servers = [Server(program, arguments.connections, stack) for program in sorted(SERVERS.glob("*.py"))]
        for server in servers:  # warm
            server.echo(arguments.messages // 4, arguments.in_flight, arguments.bytes)
        spent: dict[str, list[float]] = {server.name: [] for server in servers}
        for _ in range(arguments.rounds):
            for server in servers:
                spent[server.name].append(server.echo(arguments.messages, arguments.in_flight, arguments.bytes) * 1e6)
    ours = median(spent["tricorn_native"]) or float("nan")  # too few messages for the clock, which has ticks of 10 ms
    print(f"µs of CPU per message, {os.cpu_count()} cores, Python {python_version()}")
    print(f"{arguments.connections} connections, {arguments.in_flight} in flight, {arguments.bytes} bytes\n")
    print(f"{'':24}{'median':>8}{'min':>8}{'max':>8}{'× ours':>8}")
    for name, values in spent.items():
        print(f"{name:24}{median(values):8.1f}{min(values):8.1f}{max(values):8.1f}{median(values) / ours:8.2f}")


if __name__ == "__main__":
    main()
