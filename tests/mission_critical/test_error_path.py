"""Rule E3 over real sockets: with the ground taken away, the first error is the one that is reported.

A server in a process of its own serves two clients. One of them has it sabotaged and then crashes its handler.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import ClientConnection, connect

from fixtures.uncovered import uncovered

PATIENCE = 60  # seconds

# What fails: the message of the incident, a name that is not bound when a rarely taken path runs.
CRASHING = """
import trio

async def handler(ws):
    async for message in ws:
        if message == "crash":
            await rarely_taken(ws)
        elif message == "crash in tasks":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(rarely_taken, ws)
                nursery.start_soon(trio.sleep_forever)
        elif message == "sabotage":
            sabotage()
        await ws.send(message)

async def rarely_taken(ws):
    started = time.time()

async def agent(run):
    if run.message == "crash":
        async with run.tool("lookup"):
            started = time.time()
    if run.message == "sabotage":
        sabotage()
    await run.say(run.message)
"""

SABOTAGE = """
import builtins, sys
import tricorn.errors.report, crashing

def refuse(*args, **kwargs):
    raise ImportError("there is nothing to import")

def wipe_report():
    vars(tricorn.errors.report).clear()

def wipe_what_fails():
    kept = crashing.handler.__code__.co_names + crashing.agent.__code__.co_names + ("__builtins__",)
    for name in set(vars(crashing)) - set(kept):
        del vars(crashing)[name]

def empty_modules():
    sys.modules.clear()

def forbid_imports():
    builtins.__import__ = refuse

def everything():
    wipe_report()
    wipe_what_fails()
    empty_modules()
    forbid_imports()

def nothing():
    pass
"""

SERVE = """
import sys
import trio
import crashing, sabotage
from tricorn.chat import Chat
from tricorn.chat.protocol import SUBPROTOCOLS
from tricorn.errors.report import send_records
from tricorn.errors.last_resort import exit_in_time
from tricorn.listening.binds import listen
from tricorn.listening.site import Site
from tricorn.server import Server, serve_until_signal
from tricorn.settings import Settings

async def main():
    send_records("stderr", "INFO")
    listeners = await listen(0, "127.0.0.1")
    print(listeners[0].getsockname()[1], flush=True)
    async with Chat(crashing.agent) as chat:
        handler, drain = (chat.session, chat.drain) if sys.argv[2] == "chat" else (crashing.handler, None)
        server = Server(Site(handler, Settings(), subprotocols=SUBPROTOCOLS), listeners, drain=drain)
        async with exit_in_time(Settings().drain_timeout) as last_resort:
            await serve_until_signal(server, last_resort)

crashing.sabotage = vars(sabotage)[sys.argv[1]]
trio.run(main)
"""

SABOTAGES = pytest.mark.parametrize(
    "sabotage", ["nothing", "wipe_report", "wipe_what_fails", "empty_modules", "forbid_imports", "everything"]
)


@dataclass
class Server:
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @contextmanager
    def client(self, **options: Any) -> Iterator[ClientConnection]:
        with connect(
            f"ws://127.0.0.1:{self.port}/", open_timeout=PATIENCE, close_timeout=PATIENCE, **options
        ) as client:
            yield client

    def end(self) -> list[dict[str, Any]]:
        """Stop it as one stops a server; return its records."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0
        return [json.loads(line) for line in self.log.read_text().splitlines()]


Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a server on a port of its own. `stderr` is a file by default; `redirect` is the shell's."""
    for name, source in (("crashing", CRASHING), ("sabotage", SABOTAGE), ("serve", SERVE)):
        (tmp_path / f"{name}.py").write_text(source)
    log = tmp_path / "log"
    processes: list[subprocess.Popen[bytes]] = []
    # Not measured: coverage itself ends with imports, which sabotage forbids.
    environ = uncovered()

    def start(sabotage: str = "nothing", what: str = "handler", stderr: Any = None, redirect: str = "") -> Server:
        command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, str(tmp_path / "serve.py"), sabotage, what],
                stdout=subprocess.PIPE,
                stderr=file if stderr is None else stderr,
                env=environ,
            )
        processes.append(process)
        assert process.stdout is not None
        return Server(int(process.stdout.readline()), process, log)

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def echo(client: ClientConnection, text: str) -> None:
    client.send(text)
    assert client.recv(PATIENCE) == text


def crash(client: ClientConnection, text: str = "crash") -> str:
    """Have the handler crash; return the id that the client gets, which is all it gets."""
    client.send(text)
    with pytest.raises(ConnectionClosedError) as closed:
        client.recv(PATIENCE)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011
    return closed.value.rcvd.reason


@SABOTAGES
@pytest.mark.parametrize("how", ["crash", "crash in tasks"])
def test_the_first_error_is_reported_and_nobody_else_notices(start: Start, sabotage: str, how: str) -> None:
    server = start(sabotage)
    with server.client() as bystander, server.client() as victim:
        echo(bystander, "hello")
        echo(victim, "sabotage")
        error_id = crash(victim, how)
        echo(bystander, "still here")
        with server.client() as newcomer:
            echo(newcomer, "and served")
            second_id = crash(newcomer, how)
    records = server.end()
    errors = [record for record in records if record["severity"] == "ERROR"]
    assert [error["error_id"] for error in errors] == [error_id, second_id]
    for error in errors:
        assert error["message"] == "NameError: name 'time' is not defined"
        assert "in rarely_taken" in error["stack_trace"]
        assert "crashing.py" in error["stack_trace"]
    ended = [record for record in records if record["message"] == "connection closed"]
    assert [record["code"] for record in ended] == [1011, 1011, 1000]
    assert [record.get("error_id") for record in ended] == [error_id, second_id, None]


@SABOTAGES
def test_an_agent_that_crashes_ends_its_own_run(start: Start, sabotage: str) -> None:
    server = start(sabotage, "chat")
    with server.client(subprotocols=["tricorn.v1"]) as bystander, server.client(subprotocols=["tricorn.v1"]) as victim:
        assert run(bystander, "theirs", "hello")["outcome"] == "success"
        assert run(victim, "ours", "sabotage")["outcome"] == "success"
        failed = run(victim, "ours", "crash")
        assert run(victim, "ours", "the same connection goes on")["outcome"] == "success"
        assert run(bystander, "theirs", "still here")["outcome"] == "success"
    assert failed["outcome"] == "failed"
    [error] = [record for record in server.end() if record["severity"] == "ERROR"]
    assert error["error_id"] == failed["error_id"]
    assert error["message"] == "NameError: name 'time' is not defined"
    assert "in agent" in error["stack_trace"]


def run(client: ClientConnection, conversation: str, text: str) -> dict[str, Any]:
    """Post a text; return how its run ended."""
    client.send(json.dumps({"type": "open", "conversation": conversation}))
    client.send(json.dumps({"type": "post", "id": token_hex(8), "conversation": conversation, "text": text}))
    posted = completed = None
    while not (posted and completed and completed["seq"] > posted["seq"]):
        event = json.loads(client.recv(PATIENCE))
        assert event["type"] != "error", event
        if event["type"] == "posted":
            posted = event
        elif event["type"] == "agent_completed":
            completed = event
    return completed


def test_the_client_gets_the_id_and_nothing_else(start: Start) -> None:
    server = start()
    with server.client() as victim:
        assert len(bytes.fromhex(crash(victim))) == 4


def test_nobody_reads_stderr(start: Start) -> None:
    """Its pipe runs full, which delays nobody; what did not fit was counted."""
    ours, theirs = os.pipe()
    server = start(stderr=theirs)
    os.close(theirs)
    with server.client() as bystander:
        for _ in range(100):
            with server.client() as victim:
                crash(victim)
            echo(bystander, "hello")
        written = os.read(ours, 1 << 20)
        with server.client() as victim:
            error_id = crash(victim)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE) == 0
    with os.fdopen(ours, "rb") as rest:
        lines = (written + rest.read()).splitlines()
    records = [json.loads(line) for line in lines if line.endswith(b"}")]
    assert error_id in [record.get("error_id") for record in records]
    dropped = sum(record.get("records_dropped", 0) for record in records)
    assert dropped > 0
    assert len(records) + dropped == 2 * 101 + 1


def test_stderr_is_closed(start: Start) -> None:
    """Its number goes to one of the server's own descriptors then; no client gets to see a record."""
    server = start(redirect="2>&-")
    with ExitStack() as stack:
        bystander, *victims = [stack.enter_context(server.client()) for _ in range(5)]
        for victim in victims:
            echo(victim, "hello")
            assert len(bytes.fromhex(crash(victim))) == 4
            echo(bystander, "nothing else came")
    assert server.end() == []
