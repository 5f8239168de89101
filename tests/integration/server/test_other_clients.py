"""WebSocket clients that nobody here wrote."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, open_websocket_url
from websockets.sync.client import connect as connect_in_thread

from fixtures.handlers import echo

Served = Callable[..., AbstractAsyncContextManager[Any]]

NODE = """
const WebSocket = require("ws");
const ws = new WebSocket(process.argv[1]);
const sent = ["text", "", Buffer.from([0, 255]), "é".repeat(70000), Buffer.alloc(1000000, 7)];
let next = 0;
ws.on("open", () => { for (const each of sent) ws.send(each); ws.ping("are you there"); });
ws.on("message", (data, binary) => {
    const wanted = sent[next++];
    if (binary !== Buffer.isBuffer(wanted) || !Buffer.from(wanted).equals(data)) process.exit(1);
    if (next === sent.length) ws.close(4321, "enough");
});
let pong = null;
ws.on("pong", data => pong = data.toString());
ws.on("close", (code, reason) => console.log(code, reason.toString(), pong));
"""


async def test_websockets_in_threads(served: Served) -> None:
    def talk(port: int, number: int) -> None:
        with connect_in_thread(f"ws://127.0.0.1:{port}/", compression=None, proxy=None, max_size=None) as ws:
            for message in (f"{number}", bytes([number]) * 300_000, "é" * 70_000):
                ws.send(message)
                assert ws.recv() == message
            assert ws.ping().wait(30)

    async with served(echo) as server, trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(trio.to_thread.run_sync, talk, server.port, number)


async def test_trio_websocket(served: Served) -> None:
    async with served(echo) as server:
        async with open_websocket_url(f"ws://127.0.0.1:{server.port}/") as ws:
            for message in ("é" * 70_000, b"\0" * 300_000):
                await ws.send_message(message)
                assert await ws.get_message() == message
            await ws.ping(b"there")
        with pytest.raises(ConnectionClosed):
            await ws.get_message()


async def test_ws_of_node(served: Served) -> None:
    node = shutil.which("node")
    if node is None or (await node_runs(node, "require('ws')")).returncode:
        pytest.skip("apt-get install node-ws")
    async with served(echo) as server:
        result = await node_runs(node, NODE, f"ws://127.0.0.1:{server.port}/")
    print(result.stderr.decode(), file=sys.stdout)
    assert result.stdout == b"4321 enough are you there\n"


async def node_runs(node: str, *arguments: str) -> Any:
    return await trio.run_process(
        [node, "-e", *arguments],
        env={"NODE_PATH": "/usr/share/nodejs"},
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
