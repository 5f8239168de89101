"""Clients that nobody here wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import websockets.exceptions
import websockets.sync.client

from tricorn.chat.protocol import BATCH_SUBPROTOCOL, SUBPROTOCOL

pytestmark = pytest.mark.any_server

Chatting = Callable[..., Any]


async def test_python_websockets(chatting: Chatting) -> None:
    def talk(port: int) -> list[dict[str, Any]]:
        address = f"ws://127.0.0.1:{port}/ws"
        with websockets.sync.client.connect(address, subprotocols=[SUBPROTOCOL], open_timeout=10) as ws:
            assert ws.subprotocol == SUBPROTOCOL
            seen = [json.loads(ws.recv(10))]
            ws.send(json.dumps({"type": "open", "conversation": "c"}))
            ws.send(json.dumps({"type": "post", "id": "p", "conversation": "c", "text": "hello"}))
            while seen[-1]["type"] != "agent_completed":
                seen.append(json.loads(ws.recv(10)))
        assert ws.close_code == 1000
        return seen

    async with chatting() as server:
        seen = await trio.to_thread.run_sync(talk, server.port)
        assert seen[0]["type"] == "welcome"
        assert seen[-1]["text"] == "It is 5 long."
        assert [each["seq"] for each in seen if "at" in each] == [1, 2, 3, 4, 5, 6, 7, 8]


async def test_python_websockets_takes_a_close(chatting: Chatting) -> None:
    def listen(port: int) -> None:
        with websockets.sync.client.connect(f"ws://127.0.0.1:{port}/ws", subprotocols=[SUBPROTOCOL]) as ws:
            assert json.loads(ws.recv(10))["type"] == "welcome"
            trio.from_thread.run_sync(server.scope.cancel)
            assert json.loads(ws.recv(10))["type"] == "closing"
            with pytest.raises(websockets.exceptions.ConnectionClosedError):
                ws.recv(10)
        assert ws.close_code == 1012

    async with trio.open_nursery() as nursery, chatting() as server:
        nursery.start_soon(trio.to_thread.run_sync, listen, server.port)
        await server.session_ended.wait()


NODE_MODULES = Path("/usr/share/nodejs")
node_ws = pytest.mark.skipif(
    not (shutil.which("node") and (NODE_MODULES / "ws").exists()),
    reason="needs Node's ws: apt-get install nodejs node-ws",
)


@node_ws
@pytest.mark.parametrize("subprotocol", [SUBPROTOCOL, BATCH_SUBPROTOCOL])
async def test_node_ws(chatting: Chatting, subprotocol: str) -> None:
    """It talks, is cancelled, breaks off and comes back with its cursor."""
    script = Path(__file__).with_name("client.mjs")
    async with chatting() as server:
        done = await trio.run_process(
            ["node", script, f"ws://127.0.0.1:{server.port}/ws", subprotocol],
            env={**os.environ, "NODE_PATH": str(NODE_MODULES)},
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == 0, done.stdout.decode()
        events = json.loads(done.stdout)
        assert events == await server.recorded()
        outcomes = [each["outcome"] for each in events if each["type"] == "agent_completed"]
        assert outcomes == ["success", "cancelled", "success"]
