"""What becomes of WebSocket servers when things go wrong, in one table.

    pip install -e '.[bench]'
    python -m bench.faults [--servers a,b] [--faults x,y] [--quick] [--churn 20000] [--json FILE]

Each server is a process of its own, run as its documentation has it (`bench/servers`), with its own defaults, and
new for each fault. What stands in the table was seen by a client or read from `/proc`. Times are on the wall: what
counts is their magnitude. The load is raw frames over sockets of this machine; `vanish` needs to be root and has a
network namespace of its own. Without `--quick` it takes about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from platform import python_version
from struct import pack
from typing import Any

import trio

from bench.client import Client, connected, frame, handshake, text
from bench.process import NotStarted, Server, serving

MIB = 1 << 20
RESET = pack("ii", 1, 0)  # for SO_LINGER: close with RST


SERVERS = (
    "tricorn",
    "trio-websocket",
    "websockets-trio",
    "websockets-asyncio",
    "hypercorn-trio",
    "hypercorn-asyncio",
    "uvicorn-websockets",
    "uvicorn-wsproto",
    "aiohttp",
)


@dataclass
class Sizes:
    """How much of everything."""

    patience: float  # seconds after which something counts as never
    clients: int
    neighbours: int
    storm: int
    churn: int
    pings: int


FULL = Sizes(patience=45, clients=100, neighbours=1000, storm=500, churn=20_000, pings=200_000)
QUICK = Sizes(patience=5, clients=10, neighbours=50, storm=50, churn=500, pings=5000)


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 0.1 else f"{value * 1000:.0f} ms"


def counted(ends: list[str]) -> str:
    return ", ".join(f"{end}" if number == len(ends) else f"{number}× {end}" for end, number in Counter(ends).items())


# The faults


async def _terminated(server: Server, clients: list[Client], sizes: Sizes) -> str:
    """SIGTERM: how long until the exit, with which status, and what the clients see that read."""
    ends: list[str] = []

    async def watch(client: Client) -> None:
        end = await client.end()
        ends.append(end)
        if end.isdecimal():
            await client.sock.send(frame(8, int(end).to_bytes(2, "big")))
        client.sock.close()

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(watch, client)
        os.kill(server.process.pid, signal.SIGTERM)
        with trio.move_on_after(sizes.patience) as scope:
            status = await trio.to_thread.run_sync(server.process.wait, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
    if scope.cancelled_caught:
        return f"does not end ({sizes.patience:.0f} s); {counted(ends) or 'nothing'}"
    ended = f"exit {status}" if status >= 0 else signal.Signals(-status).name
    return f"{seconds(trio.current_time() - began)}, {ended}; {counted(ends) or 'nothing'}"


async def sigterm_idle(server: Server, sizes: Sizes) -> str:
    async with connected(server, sizes.clients) as clients:
        return await _terminated(server, clients, sizes)


async def sigterm_busy(server: Server, sizes: Sizes) -> str:
    async with connected(server, sizes.clients) as clients:
        for client in clients:
            await client.sock.send(text("hello") * 200)
        return await _terminated(server, clients, sizes)


async def sigterm_stalled(server: Server, sizes: Sizes) -> str:
    """One client has asked for a flood and reads nothing; the others are idle."""
    stalled = await Client.connect(server, "/flood", receive_buffer=4096)
    await stalled.sock.send(text("hello"))
    await trio.sleep(0.5)
    async with connected(server, sizes.clients) as clients:
        found = await _terminated(server, clients, sizes)
    stalled.sock.close()
    return found


async def never_reads(server: Server, sizes: Sizes) -> str:
    """Clients that asked for a flood and read nothing: memory for each, and when the server gives them up."""
    before, number = server.memory(), 20
    clients = [await Client.connect(server, "/flood", receive_buffer=4096) for _ in range(number)]
    for client in clients:
        await client.sock.send(text("hello"))
    began, peak = trio.current_time(), before
    dropped = 0
    while trio.current_time() - began < sizes.patience and dropped < number:
        await trio.sleep(0.5)
        peak = max(peak, server.memory())
        dropped = sum(_is_reset(client) for client in clients)
    took = trio.current_time() - began
    for client in clients:
        client.sock.close()
    kept = f"{max(0, peak - before) / number / MIB:.1f} MiB each"
    return (
        f"{kept}; dropped after {took:.0f} s" if dropped == number else f"{kept}; not dropped ({sizes.patience:.0f} s)"
    )


def _is_reset(client: Client) -> bool:
    """Whether the other end is gone, without reading: the state of the socket, as the kernel has it."""
    state: int = client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state != 1  # TCP_ESTABLISHED


async def rst_storm(server: Server, sizes: Sizes) -> str:
    """Resets in the middle of a frame, while another client is served."""
    other = await Client.connect(server)
    worst, resets, began = 0.0, 0, server.cpu()
    for _ in range(sizes.storm):
        client = await Client.connect(server)
        await client.sock.send(b"\x81\xfe\x10\x00half")
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.sock.close()
        resets += 1
        if resets % 10 == 0:
            worst = max(worst, await _latency(other))
    cpu = (server.cpu() - began) / resets * 1000
    return f"{'others served' if worst < 30 else 'others not served'}, {cpu:.1f} ms CPU each"


async def _latency(client: Client) -> float:
    began = trio.current_time()
    with trio.move_on_after(30):
        try:
            await client.echo()
        except (OSError, EOFError):
            return 30.0
    return trio.current_time() - began


async def slow_handshake(server: Server, sizes: Sizes) -> str:
    """A request head that comes a byte a second."""
    sock = trio.socket.socket()
    await sock.connect((server.host, server.port))
    began, gone = trio.current_time(), trio.Event()

    async def drip() -> None:
        try:
            for byte in handshake():
                await sock.send(bytes([byte]))
                await trio.sleep(1)
        except OSError:
            gone.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        answer = b""
        with trio.move_on_after(sizes.patience) as scope:
            with suppress(OSError):
                answer = await sock.recv(100)
        nursery.cancel_scope.cancel()
    sock.close()
    if scope.cancelled_caught:
        return f"not dropped ({sizes.patience:.0f} s)"
    status = answer.split(b" ")[1].decode() if answer.startswith(b"HTTP/1.1 ") else "no answer"
    return f"{status} after {trio.current_time() - began:.0f} s"


async def descriptors(server: Server, sizes: Sizes) -> str:
    """More connections than there are descriptors (the limit is 64): CPU meanwhile, and whether it recovers."""
    socks = []
    for _ in range(100):
        sock = trio.socket.socket()
        socks.append(sock)
        await sock.connect((server.host, server.port))
        await sock.send(handshake())
    await trio.sleep(0.5)
    if not server.is_alive():
        return "the server ends"
    began = server.cpu()
    await trio.sleep(3)
    load = (server.cpu() - began) / 3
    for sock in socks:
        sock.close()
    with trio.move_on_after(10) as scope:
        while True:
            try:
                client = await Client.connect(server)
                await client.echo()
                client.sock.close()
                break
            except (OSError, EOFError):
                await trio.sleep(0.1)
    return f"{load:.0%} CPU, {'serves no more' if scope.cancelled_caught else 'recovers'}"


async def half_close(server: Server, sizes: Sizes) -> str:
    """A client that asks, closes its side, and waits for the answer."""
    client = await Client.connect(server)
    await client.sock.send(text("hello"))
    client.sock.shutdown(socket.SHUT_WR)
    began = trio.current_time()
    answered = False
    end = "not closed"
    with trio.move_on_after(sizes.patience):
        try:
            while True:
                opcode, payload = await client.next()
                answered = answered or opcode == 1
                if opcode == 8:
                    end = str(int.from_bytes(payload[:2], "big"))
        except (OSError, EOFError) as error:
            end = f"{end if end.isdecimal() else 'EOF' if isinstance(error, EOFError) else 'RST'}"
    client.sock.close()
    return f"{'answer' if answered else 'no answer'}, {end} after {seconds(trio.current_time() - began)}"


async def ping_flood(server: Server, sizes: Sizes) -> str:
    """Pings without end, whose pongs nobody reads: memory, and what another client waits for."""
    other, flooder = await Client.connect(server), await Client.connect(server, receive_buffer=4096)
    before, worst, peak, sent = server.memory(), 0.0, 0, 0
    burst = frame(9, b"x" * 100) * 100
    refused = False
    while sent < sizes.pings and not refused:
        with trio.move_on_after(0.5) as scope:
            try:
                await trio.SocketStream(flooder.sock).send_all(burst)
            except trio.BrokenResourceError:
                refused = True
        sent += 100
        if scope.cancelled_caught:
            break
        if sent % 5000 == 0:
            worst, peak = max(worst, await _latency(other)), max(peak, server.memory())
    worst, peak = max(worst, await _latency(other)), max(peak, server.memory())
    flooder.sock.close()
    slowed = "reading stops" if scope.cancelled_caught else "dropped" if refused else "all read"
    return f"+{max(0, peak - before) / MIB:.0f} MiB, {slowed}; others wait {seconds(worst)}"


async def churn(server: Server, sizes: Sizes) -> str:
    """Connects and disconnects: memory and descriptors, from behind the first tenth to the end."""

    async def come_and_go(number: int) -> None:
        for turn in range(number):
            client = await Client.connect(server)
            if turn % 3 == 0:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            elif turn % 3 == 1:
                await client.sock.send(frame(8, b"\x03\xe8"))
                await client.end()
            client.sock.close()

    async def many(number: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(come_and_go, number // 20)
        await trio.sleep(1)

    await many(sizes.churn // 10)
    memory, held = server.memory(), server.descriptors()
    await many(sizes.churn)
    return f"{(server.memory() - memory) / MIB:+.1f} MiB, {server.descriptors() - held:+d} descriptors"


async def crash(server: Server, sizes: Sizes) -> str:
    """A handler that raises among many others: what its client sees, and how many others notice."""
    async with connected(server, sizes.neighbours) as neighbours:
        client = await Client.connect(server, "/crash")
        await client.sock.send(text("hello"))
        end = "nothing"
        with trio.move_on_after(10):
            end = await client.end()
            if end.isdecimal():
                await client.sock.send(frame(8, int(end).to_bytes(2, "big")))
                await client.end()
        client.sock.close()
        noticed = 0
        for neighbour in neighbours:
            try:
                with trio.fail_after(10):
                    await neighbour.echo()
            except (OSError, EOFError, trio.TooSlowError):
                noticed += 1
        return f"{end}; {noticed or 'none'} of {sizes.neighbours} notice"


async def vanish(server: Server, sizes: Sizes) -> str:
    """A peer whose network is gone, without a FIN: when its connection is."""
    client = await Client.connect(server)
    await client.echo()
    await trio.run_process(["ip", "link", "set", _link(server.name), "down"])
    began = trio.current_time()
    held = server.descriptors()
    patience = max(sizes.patience, 90) if sizes is FULL else sizes.patience
    while trio.current_time() - began < patience:
        if server.descriptors() < held:
            return f"noticed after {trio.current_time() - began:.0f} s"
        await trio.sleep(0.2)
    return f"not noticed ({patience:.0f} s)"


@asynccontextmanager
async def _served(name: str, **options: Any) -> AsyncIterator[Server]:
    with ExitStack() as stack:
        yield await trio.to_thread.run_sync(stack.enter_context, serving(name, "defaults", **options))


def _link(name: str) -> str:
    return f"tricorn{SERVERS.index(name)}"


@asynccontextmanager
async def _apart(name: str) -> AsyncIterator[Server]:
    """A server in a network namespace of its own, behind a link that can be taken down."""
    link, index = _link(name), SERVERS.index(name)
    host = f"10.213.{index}.2"
    steps = [
        f"ip netns add {link}",
        f"ip link add {link} type veth peer name {link}p netns {link}",
        f"ip addr add 10.213.{index}.1/24 dev {link}",
        f"ip link set {link} up",
        f"ip -n {link} addr add {host}/24 dev {link}p",
        f"ip -n {link} link set {link}p up",
    ]
    try:
        for step in steps:
            await trio.run_process(step.split(), capture_stderr=True)
        async with _served(name, host="0.0.0.0", before=("ip", "netns", "exec", link)) as server:
            server.host = host
            yield server
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
            await trio.run_process(["ip", "netns", "del", link], check=False, capture_stderr=True)


Fault = Callable[[Server, Sizes], Awaitable[str]]

# With what is best in each.
FAULTS: dict[str, tuple[Fault, str]] = {
    "SIGTERM, idle clients": (sigterm_idle, "at once, exit 0, a close code that says come back"),
    "SIGTERM, busy clients": (sigterm_busy, "the same"),
    "SIGTERM, a stalled client": (sigterm_stalled, "the same, within a bound"),
    "client never reads": (never_reads, "little memory, and dropped in the end"),
    "resets in mid-frame": (rst_storm, "others served, little CPU"),
    "slow handshake": (slow_handshake, "408 after a bounded time"),
    "peer vanishes": (vanish, "noticed"),
    "no descriptors left": (descriptors, "no CPU, recovers"),
    "half-close": (half_close, "the answer, then the end"),
    "ping flood": (ping_flood, "no memory, others do not wait"),
    "connects and disconnects": (churn, "flat"),
    "handler crashes": (crash, "1011, nobody else notices"),
}
AT_ONCE = {never_reads, slow_handshake, vanish}  # mostly waiting: all servers together


async def try_out(name: str, fault: Fault, sizes: Sizes) -> str:
    try:
        if fault is vanish:
            async with _apart(name) as server:
                return await fault(server, sizes)
        before = ("prlimit", "--nofile=64") if fault is descriptors else ()
        async with _served(name, before=before) as server:
            return await fault(server, sizes)
    except (OSError, NotStarted, trio.TooSlowError, subprocess.CalledProcessError) as error:
        return f"fails: {error or type(error).__name__}"


async def run(servers: list[str], faults: list[str], sizes: Sizes) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for title in faults:
        found[title] = dict.fromkeys(servers, "")
        if FAULTS[title][0] in AT_ONCE:
            async with trio.open_nursery() as nursery:
                for name in servers:
                    nursery.start_soon(fill, found, title, name, sizes)
        else:
            for name in servers:
                await fill(found, title, name, sizes)
    return found


async def fill(found: dict[str, dict[str, str]], title: str, name: str, sizes: Sizes) -> None:
    found[title][name] = await try_out(name, FAULTS[title][0], sizes)
    print(f"{title}: {name}: {found[title][name]}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What becomes of WebSocket servers when things go wrong.")
    parser.add_argument("--servers", help=f"of: {', '.join(SERVERS)} (all)")
    parser.add_argument("--faults", help=f"of: {'; '.join(FAULTS)} (all)")
    parser.add_argument("--quick", action="store_true", help="small, and for a look only")
    parser.add_argument("--churn", type=int, help="how many connects and disconnects (20000)")
    parser.add_argument("--json", metavar="FILE", help="write what was found there, too")
    arguments = parser.parse_args()
    servers = arguments.servers.split(",") if arguments.servers else list(SERVERS)
    faults = arguments.faults.split(";") if arguments.faults else list(FAULTS)
    sizes = QUICK if arguments.quick else FULL
    sizes.churn = arguments.churn or sizes.churn
    found = trio.run(partial(run, servers, faults, sizes))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{os.cpu_count()} cores, Python {python_version()}\n")
    print(f"| | best | {' | '.join(servers)} |\n|{'---|' * (len(servers) + 2)}")
    for title, row in found.items():
        print(f"| {title} | {FAULTS[title][1]} | {' | '.join(row.values())} |")


if __name__ == "__main__":
    main()
