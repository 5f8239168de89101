"""`tricorn run module:handler`, as a process."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
from trio_websocket import open_websocket

Serving = Callable[..., AbstractAsyncContextManager[int]]

TRICORN = (sys.executable, "-m", "tricorn", "run")
PATIENCE = 60  # seconds, for what takes one or two
HANDLERS = """
async def echo(ws):
    async for message in ws:
        await ws.send(message)

def plain(ws): ...
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(HANDLERS)
    monkeypatch.chdir(tmp_path)


async def test_a_handler_is_served_until_sigterm(serving: Serving) -> None:
    async with (
        serving(*TRICORN, "mine:echo", "--bind", "127.0.0.1:0") as port,
        open_websocket("127.0.0.1", port, "/", use_ssl=False) as ws,
    ):
        await ws.send_message("hello")
        assert await ws.get_message() == "hello"


async def refused(*arguments: str) -> str:
    """What it says before it exits with 2."""
    with trio.fail_after(PATIENCE):
        done = await trio.run_process([*TRICORN, *arguments], capture_stdout=True, capture_stderr=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    return done.stderr.decode()


async def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        assert await refused("mine:echo", "--bind", bind) == f"tricorn: --bind {bind}: address already in use\n"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mine", "must be module:function, for example my_server:handler"),
        ("mine:other", "there is no other in mine"),
        ("mine:plain", "is not async; must be an async function of one parameter, like: async def plain(ws)"),
    ],
)
async def test_what_is_no_handler_is_one_line(name: str, problem: str) -> None:
    assert await refused(name) == f"tricorn: run {name}: {problem}\n"
