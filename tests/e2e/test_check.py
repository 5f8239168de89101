"""`tricorn check`, against servers that are well and servers that are not."""

from __future__ import annotations

import json
import os
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol

import tricorn
from fixtures.cutting_proxy import CuttingProxy
from fixtures.ports import port_that_stays_free
from fixtures.real_services import RedisServer
from fixtures.service import KEY, WAYS, Instance, Replica, Service, Tricorn
from tricorn.chat import SUBPROTOCOLS
from tricorn.service.pages import pages

PATIENCE = 120  # seconds, for a whole test
DEMO = "tricorn.chat.agents.demo:demo"
CHECKS = ["health", "readiness", "handshake", "events", "resume", "close codes", "import stability", "recovery"]
AFTER_HANDSHAKE = CHECKS[3:]

AGENTS = """
async def works(run):
    await run.say(run.message)

async def fails(run):
    await run.think("about it")
    raise RuntimeError("not for the people")
"""


@dataclass
class Checked:
    status: int
    results: dict[str, dict[str, Any]]
    stderr: str

    @property
    def failed(self) -> list[str]:
        return [name for name, result in self.results.items() if result["outcome"] == "failed"]

    @property
    def skipped(self) -> list[str]:
        return [name for name, result in self.results.items() if result["outcome"] == "skipped"]

    def why(self, name: str) -> str:
        return self.results[name]["detail"]

    def check_well(self) -> None:
        assert self.failed == self.skipped == [], [self.why(name) for name in self.failed]
        assert list(self.results) == CHECKS
        assert (self.status, self.stderr) == (0, "")


class Pipeline:
    """Deploys servers and checks them."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory = directory
        self.nursery = nursery
        (directory / "agents_of_mine.py").write_text(AGENTS)

    async def deploy(self, kind: type[Service] = Tricorn, agent: str = DEMO, way: str = WAYS[0], **environ: str) -> Any:
        service = kind(self.directory, self.nursery, lambda *_: None)
        service.environ = environ
        if isinstance(service, Tricorn):
            service.come_in_by(way)
        return await service.start({}, agent)

    async def run(self, *arguments: str, **environ: str) -> tuple[int, str, str]:
        done = await trio.run_process(
            [sys.executable, "-m", "tricorn", "check", *arguments],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=self.directory,
            env=os.environ | environ,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    async def check(self, port: int, *options: str, scheme: str = "http", **environ: str) -> Checked:
        status, stdout, stderr = await self.run(f"{scheme}://127.0.0.1:{port}", "--json", *options, **environ)
        results = [json.loads(line) for line in stdout.splitlines()]
        return Checked(status, {each["check"]: each for each in results}, stderr)


@pytest.fixture
async def pipeline(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Pipeline]:
    with trio.fail_after(PATIENCE):
        yield Pipeline(tmp_path, nursery)
    nursery.cancel_scope.cancel()


async def token(instance: Instance) -> dict[str, str]:
    """The environment of a client that may come in."""
    [(_, credentials)] = await instance.service.credentials("pipeline")
    return {"TRICORN_TOKEN": credentials.decode().removeprefix("Bearer ")}


@pytest.mark.parametrize("way", ["native", "hypercorn"])
async def test_all_is_well(pipeline: Pipeline, way: str) -> None:
    server = await pipeline.deploy(way=way)
    checked = await pipeline.check(server.port)
    checked.check_well()
    assert checked.why("events") == "all five kinds of events, in order"
    assert checked.why("resume") == "cut after event 2, a new connection brought 3 to 8, each once and in order"
    assert ("as under plain Hypercorn" in checked.why("import stability")) is (way == "hypercorn")
    assert not [record for record in server.records if record["severity"] == "ERROR"]


async def test_all_is_well_with_a_token_inside_tls(pipeline: Pipeline) -> None:
    server = await pipeline.deploy(way="tls", **KEY)
    context: ssl.SSLContext = server.service.tls
    [authority] = context.get_ca_certs(binary_form=True)[-1:]
    (pipeline.directory / "authority.pem").write_text(ssl.DER_cert_to_PEM_cert(authority))
    environ = {**await token(server), "SSL_CERT_FILE": "authority.pem"}
    checked = await pipeline.check(server.port, scheme="wss", **environ)
    checked.check_well()
    assert "for the user pipeline" in checked.why("handshake")
    assert "without a token with 4500" in checked.why("close codes")
    distrusted = await pipeline.check(server.port, scheme="https", **environ | {"SSL_CERT_FILE": os.devnull})
    assert (distrusted.status, distrusted.failed, distrusted.skipped) == (1, ["health"], CHECKS[1:])
    assert "certificate" in distrusted.why("health")


async def test_a_table_has_a_row_for_each_check(pipeline: Pipeline) -> None:
    server = await pipeline.deploy()
    status, stdout, stderr = await pipeline.run(f"ws://127.0.0.1:{server.port}/ws")
    head, *rows = stdout.splitlines()
    assert (status, stderr, head.split()) == (0, "", ["check", "result", "seconds", "detail"])
    assert [row[: head.index("result")].strip() for row in rows] == CHECKS
    assert {row[head.index("result") :].split()[0] for row in rows} == {"ok"}


async def test_an_agent_of_ones_own_needs_only_to_succeed(pipeline: Pipeline) -> None:
    server = await pipeline.deploy(agent="agents_of_mine:works")
    checked = await pipeline.check(server.port)
    checked.check_well()
    assert "of the five kinds of events it had agent_started, agent_completed" in checked.why("events")


async def test_an_agent_that_fails(pipeline: Pipeline) -> None:
    server = await pipeline.deploy(agent="agents_of_mine:fails")
    checked = await pipeline.check(server.port)
    assert (checked.status, checked.failed) == (1, ["events", "recovery"])
    [error_id, _] = [record["error_id"] for record in server.records if record["severity"] == "ERROR"][::2]
    ended = f"the run ended with `failed` (error {error_id}) after agent_started, agent_thinking, agent_completed"
    assert checked.why("events") == f"{ended}; it should end with `success`"


async def test_a_wrong_token(pipeline: Pipeline) -> None:
    server = await pipeline.deploy(**KEY)
    good = await token(server)
    checked = await pipeline.check(server.port, TRICORN_TOKEN=good["TRICORN_TOKEN"] + "x")
    assert (checked.status, checked.failed, checked.skipped) == (1, ["handshake"], AFTER_HANDSHAKE)
    assert "the server closed with 4500 " in checked.why("handshake")
    assert good["TRICORN_TOKEN"] not in json.dumps(checked.results) + checked.stderr


async def test_nobody_listens(pipeline: Pipeline) -> None:
    port = port_that_stays_free()
    checked = await pipeline.check(port)
    assert (checked.status, checked.failed, checked.skipped) == (1, ["health"], CHECKS[1:])
    assert checked.why("health") == f"there is no connection to 127.0.0.1:{port}: connection refused"


async def test_a_server_that_is_not_ready(pipeline: Pipeline, pytestconfig: pytest.Config) -> None:
    with TemporaryDirectory(prefix="redis-") as directory:
        redis = RedisServer(pytestconfig, directory)
        redis.start()
        server = await pipeline.deploy(TRICORN_LOG=f"unix://{redis.path}", TRICORN_LOG_TIMEOUT="1")
        redis.kill()
        checked = await pipeline.check(server.port)
    assert checked.status == 1
    assert checked.failed[0] == "readiness"
    assert checked.why("readiness").startswith("GET /readyz answered 503 (")
    assert checked.why("readiness").endswith("); a server that is ready answers 200")


class CutsTheFourth(CuttingProxy):
    """Lets three connections pass, for health, readiness and handshake, and little of the fourth."""

    async def _connect(self, client: trio.SocketStream) -> None:
        if self.connections == 3:
            self.answers_left = 1
        await super()._connect(client)


async def test_a_connection_that_is_cut(pipeline: Pipeline) -> None:
    server = await pipeline.deploy()
    proxy = CutsTheFourth(0, server.port)
    await pipeline.nursery.start(proxy.serve)
    assert isinstance(proxy.address, int)
    checked = await pipeline.check(proxy.address)
    assert (checked.status, checked.failed) == (1, ["events"])
    assert checked.why("events").startswith("connection lost while waiting for ")


async def test_a_server_that_does_not_answer_in_time(pipeline: Pipeline) -> None:
    server = await pipeline.deploy()
    proxy = CuttingProxy(0, server.port)
    proxy.stalled = True
    await pipeline.nursery.start(proxy.serve)
    assert isinstance(proxy.address, int)
    status, stdout, _ = await pipeline.run(f"http://127.0.0.1:{proxy.address}", "--json", "--timeout", "0.1")
    results = [json.loads(line) for line in stdout.splitlines()]
    assert status == 1
    assert results[0]["detail"] == "not done within 0.1 s: still waiting for the answer to GET /healthz"


async def test_the_service_of_the_incident(pipeline: Pipeline) -> None:
    server = await pipeline.deploy(Replica, "incident.faults:agent", K_SERVICE="chat")
    checked = await pipeline.check(server.port)
    assert checked.status == 1
    assert "import stability" in checked.failed
    assert checked.why("import stability") == (
        "a text that is not JSON: the server ended the connection with 1011 (name 'time' is not defined); "
        "right would be the error `malformed`"
    )


EVENTS = ("user_message", "agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed")
Wrong = Callable[[int], list[int]]  # the events after a cursor


LIMITS = ("message_bytes", "event_bytes", "text_characters", "open_conversations", "user_runs", "posts_per_minute")
WELCOME = {"connection": "c", "user": "local", "heartbeat": 60.0, "limits": dict.fromkeys(LIMITS, 1)}


async def broken(wrong: Wrong, ws: tricorn.WebSocket, *, epochs: list[str]) -> None:
    """A chat with one conversation in which everything was said already, and something is wrong."""
    await say(ws, "welcome", **WELCOME)
    conversation, after = "", 0
    async for text in ws:
        request = json.loads(text)
        if request["type"] == "open":
            conversation, after = request["conversation"], request.get("after", 0)
            await say(ws, "opened", conversation=conversation, epoch=epochs.pop(0), head=0)
        if request["type"] == "post" or after:
            for seq in wrong(after):
                await say_event(ws, conversation, seq)


async def ends_with_1001(stream: trio.SocketStream) -> None:
    """Welcome whoever opens a WebSocket, and answer the first thing that comes with a close frame."""
    protocol = ServerProtocol(subprotocols=[SUBPROTOCOLS[0]])
    async with stream:
        while not (requests := protocol.events_received()):
            protocol.receive_data(await stream.receive_some())
        assert isinstance(requests[0], Request)
        protocol.send_response(protocol.accept(requests[0]))
        if protocol.state is State.OPEN:
            protocol.send_text(json.dumps({"type": "welcome", **WELCOME}).encode())
        await stream.send_all(b"".join(protocol.data_to_send()))
        await stream.receive_some()
        with suppress(trio.BrokenResourceError):
            await stream.send_all(Frame(Opcode.CLOSE, Close(1001, "bye").serialize()).serialize(mask=False))


async def test_a_server_that_closes_with_another_code(pipeline: Pipeline) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    pipeline.nursery.start_soon(trio.serve_listeners, ends_with_1001, [listener])
    checked = await pipeline.check(listener.socket.getsockname()[1])
    assert checked.results["handshake"]["outcome"] == "ok"
    wrong = "the client asked to close with 1000: the server ended the connection with 1001 (bye); right would be 1000"
    assert checked.why("close codes") == wrong
    assert checked.why("import stability").endswith("1001 (bye); right would be 1002")


async def say(ws: tricorn.WebSocket, type_: str, **fields: Any) -> None:
    await ws.send(json.dumps({"type": type_, **fields}))


async def say_event(ws: tricorn.WebSocket, conversation: str, seq: int) -> None:
    fields = {"id": "p", "user": "local", "text": "", "run": "r", "agent": "demo", "post": "p", "post_seq": 1}
    fields |= {"call": "t", "tool": "t", "arguments": {}, "seconds": 0.0, "outcome": "success"}
    await say(ws, EVENTS[seq - 1], conversation=conversation, seq=seq, at=0.0, **fields)


@pytest.mark.parametrize(
    ("wrong", "epochs", "failed", "why"),
    [
        pytest.param(
            lambda after: [*range(after or 1, 7)],
            ["e"] * 9,
            "resume",
            "over two connections, cut after 2, came the events [1, 2, 2, 3, 4, 5, 6]; each should come once",
            id="one event twice",
        ),
        pytest.param(
            lambda after: [*range(after + 2 if after else 1, 7)],
            ["e"] * 9,
            "resume",
            "over two connections, cut after 2, came the events [1, 2, 4, 5, 6]; each should come once",
            id="one event lost",
        ),
        pytest.param(
            lambda after: [*range(after + 1, 7)],
            list("abcdefghi"),
            "resume",
            "the second connection found another log than the first; instances that clients may come back to should "
            "share one",
            id="a log of its own",
        ),
        pytest.param(
            lambda after: [1, 2, 3, 5, 4, 6],
            ["e"] * 9,
            "events",
            "the events have the sequence numbers [1, 2, 3, 5, 4, 6]; they should count from 1 without gaps",
            id="out of order",
        ),
    ],
)
async def test_a_server_that_breaks_its_promise(
    pipeline: Pipeline, wrong: Wrong, epochs: list[str], failed: str, why: str
) -> None:
    async def ready() -> None:
        await trio.lowlevel.checkpoint()

    handler = partial(broken, wrong, epochs=epochs)
    serve = partial(tricorn.serve, handler, 0, app=pages(ready), subprotocols=SUBPROTOCOLS)
    server = await pipeline.nursery.start(serve)
    checked = await pipeline.check(server.addresses[0][1])
    assert checked.status == 1
    assert checked.why(failed) == why


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "tricorn check: the following arguments are required: URL\n"),
        (["ftp://example.com"], "tricorn: URL ftp://example.com: must be a URL like ws://127.0.0.1:8080/ws\n"),
        (["http://a", "--timeout", "0"], "tricorn: --timeout 0: must be a number of seconds above 0\n"),
        (["http://a", "--timeout", "soon"], "tricorn: --timeout soon: must be a number of seconds above 0\n"),
    ],
)
async def test_what_is_asked_wrongly(pipeline: Pipeline, arguments: list[str], problem: str) -> None:
    assert await pipeline.run(*arguments) == (2, "", problem)
