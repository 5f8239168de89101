"""`tricorn run module:handler`, as a process."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
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
APPS = """
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute

async def page(request):
    return PlainTextResponse(request.state.greeting)

async def echo(ws):
    await ws.accept()
    async for text in ws.iter_text():
        await ws.send_text(text)

@asynccontextmanager
async def lifespan(app):
    yield {"greeting": "hello"}

@asynccontextmanager
async def broken_lifespan(app):
    raise ValueError("no database")
    yield

routes = [Route("/", page), WebSocketRoute("/echo", echo)]
app = Starlette(routes=routes, lifespan=lifespan)
broken = Starlette(routes=routes, lifespan=broken_lifespan)
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(HANDLERS)
    (tmp_path / "apps.py").write_text(APPS)
    monkeypatch.chdir(tmp_path)


async def test_a_handler_is_served_until_sigterm(serving: Serving) -> None:
    async with (
        serving(*TRICORN, "mine:echo", "--bind", "127.0.0.1:0") as port,
        open_websocket("127.0.0.1", port, "/", use_ssl=False) as ws,
    ):
        await ws.send_message("hello")
        assert await ws.get_message() == "hello"


async def test_an_application_of_starlette_is_served_with_its_pages_and_websockets(serving: Serving) -> None:
    async with serving(*TRICORN, "apps:app", "--bind", "127.0.0.1:0") as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b"".join([bytes(data) async for data in stream]).endswith(b"\r\n\r\nhello")
        async with open_websocket("127.0.0.1", port, "/echo", use_ssl=False) as ws:
            await ws.send_message("hello")
            assert await ws.get_message() == "hello"


@pytest.mark.parametrize(("name", "scheme"), [("mine:echo", "ws"), ("apps:app", "http")])
async def test_the_address_is_printed_in_one_line(name: str, scheme: str) -> None:
    command = [*TRICORN, name, "--bind", "127.0.0.1:0"]
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(partial(trio.run_process, command, stdout=subprocess.PIPE))
            said = await process.stdout.receive_some()
            process.terminate()
            said += b"".join([part async for part in process.stdout])
    assert re.fullmatch(rf"Tricorn is listening on {scheme}://127\.0\.0\.1:[1-9]\d*\n", said.decode())


async def test_an_application_that_does_not_start_up_is_a_record_and_exit_status_1() -> None:
    command = [*TRICORN, "apps:broken", "--bind", "127.0.0.1:0"]
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    record, line = done.stderr.splitlines()
    assert json.loads(record)["severity"] == "ERROR"
    assert line == b"tricorn: run apps:broken: the application did not start up: ValueError: no database"


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
        ("mine:other", "there is no other in mine (mine.py)"),
        (
            "mine:plain",
            "is not async; must be an ASGI application, or an async function of one parameter, "
            "like: async def plain(ws) (mine.py, line 6)",
        ),
    ],
)
async def test_what_is_no_handler_is_one_line(name: str, problem: str) -> None:
    assert await refused(name) == f"tricorn: run {name}: {problem}\n"
