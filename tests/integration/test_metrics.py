"""`/metrics` of a real `tricorn serve`, read by Prometheus's own parser; and that it is nowhere else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio_websocket import open_websocket_url

SERVE = [sys.executable, "-m", "tricorn", "serve", "--audit", "off", "--bind", "127.0.0.1:0"]
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
Samples = dict[tuple[str, ...], float]


async def get(url: str) -> tuple[int, str]:
    where = urlsplit(url)
    request = f"GET {where.path or '/'} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n\r\n"
    async with await trio.open_tcp_stream(where.hostname, where.port) as stream:
        await stream.send_all(request.encode())
        head, _, body = b"".join([part async for part in stream]).partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


class Server:
    def __init__(self, process: trio.Process, metrics: str, url: str) -> None:
        self.process = process
        self.metrics = metrics
        self.url = url

    async def scrape(self) -> Samples:
        """Each sample by its name and the values of its labels."""
        status, text = await get(self.metrics)
        assert status == 200
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def until(self, wanted: Samples) -> None:
        """Scrape until these samples are among what is there: a connection is counted when it has ended."""
        with trio.fail_after(10):
            while not wanted.items() <= (found := await self.scrape()).items():
                assert found
                await trio.sleep(0.01)


@pytest.fixture
async def server(nursery: trio.Nursery, tmp_path: Path) -> AsyncIterator[Server]:
    environ = {"TRICORN_METRICS": "127.0.0.1:0", "TRICORN_LOG": f"sqlite:///{tmp_path}/log.db"}
    start = partial(trio.run_process, SERVE, stdout=subprocess.PIPE, env=os.environ | environ)
    with trio.fail_after(30):
        process = await nursery.start(start)
        said = b""
        while said.count(b"\n") < 2:
            said += await process.stdout.receive_some()
    metrics, url = re.findall(rb"http://\S+", said)
    yield Server(process, metrics.decode(), url.decode())
    process.terminate()
    with trio.fail_after(10):
        assert await process.wait() == 0


async def test_what_happens_is_counted_while_it_happens(server: Server) -> None:
    before = await server.scrape()
    assert before["tricorn_connections", "open"] == before["tricorn_connections_opened_total",] == 0
    assert before["tricorn_events_delivered_total",] == before["tricorn_log_append_seconds_count",] == 0
    assert before["tricorn_teardown_seconds_count",] == 0  # no rehearsal shows
    assert before["tricorn_errors_reported_total",] == 0
    async with open_websocket_url(f"ws{server.url[4:]}/ws") as ws:
        await ws.get_message()
        await ws.send_message(json.dumps({"type": "open", "conversation": "c"}))
        await ws.send_message(json.dumps({"type": "post", "id": "p", "conversation": "c", "text": "slow 100"}))
        await ws.send_message(json.dumps({"type": "post", "id": "q", "conversation": "c", "text": "2*21"}))
        while json.loads(await ws.get_message())["type"] != "tool_executing":
            pass
        during = await server.scrape()
        assert during["tricorn_connections", "open"] == 1
        assert during["tricorn_tasks",] > before["tricorn_tasks",]
        assert during["tricorn_messages_total", "received"] == 3
        assert during["tricorn_messages_total", "sent"] >= 5
        assert during["tricorn_bytes_total", "received"] > 100
        assert during["tricorn_bytes_total", "sent"] > 500
        assert during["tricorn_conversations",] == during["tricorn_runs",] == during["tricorn_runs_waiting",] == 1
        assert during["tricorn_events_appended_total", "user_message"] == 2
        assert during["tricorn_log_append_seconds_count",] >= 5
        assert during["tricorn_events_delivered_total",] >= 5
    await server.until({("tricorn_connections", "open"): 0, ("tricorn_connections_closed_total", "1000"): 1})
    after = await server.scrape()
    assert after["tricorn_teardown_seconds_count",] == after["tricorn_teardown_seconds_bucket", "2.0"] == 1
    assert after["tricorn_messages_total", "received"] == 3
    assert after["tricorn_late_imports_total",] == 0  # not even for this
    assert after["process_open_fds",] > 0


async def test_runs_are_counted_by_outcome(server: Server) -> None:
    async with open_websocket_url(f"ws{server.url[4:]}/ws") as ws:
        await ws.send_message(json.dumps({"type": "open", "conversation": "c"}))
        await ws.send_message(json.dumps({"type": "post", "id": "p", "conversation": "c", "text": "2*21"}))
        while json.loads(await ws.get_message())["type"] != "agent_completed":
            pass
        samples = await server.scrape()
    assert samples["tricorn_run_seconds_count", "success"] == 1
    assert samples["tricorn_run_seconds_bucket", "+Inf", "success"] == 1
    assert samples["tricorn_run_seconds_count", "failed"] == 0


async def test_limits_of_the_server_layer_are_counted(server: Server) -> None:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    for head, status in ((b"GET / HTTP/1.1\r\nX: ", b"431"), (b"GET /", b"414")):
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(head + b"x" * 20_000)
            assert status in await stream.receive_some()
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(UPGRADE + b"\x81\xff" + (1 << 30).to_bytes(8) + bytes(4))
        await stream.receive_some()
        await stream.send_all(b"and more of it")
        async for _ in stream:
            pass
    await server.until(
        {("tricorn_limit_hits_total", "max_head_bytes"): 2, ("tricorn_limit_hits_total", "max_message_bytes"): 1}
    )
    await server.until({("tricorn_connections_closed_total", "1009"): 1})


async def test_the_public_address_does_not_have_it(server: Server) -> None:
    for elsewhere in (f"{server.url}/metrics", server.metrics.removesuffix("metrics")):
        status, _ = await get(elsewhere)
        assert status == 404


async def test_an_address_that_cannot_be_had_is_said_in_one_line(server: Server) -> None:
    taken = server.url.removeprefix("http://")
    done = await trio.run_process(
        SERVE, capture_stdout=True, capture_stderr=True, check=False, env=os.environ | {"TRICORN_METRICS": taken}
    )
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.decode().endswith(f"tricorn: TRICORN_METRICS={taken}: address already in use\n")
    assert b"Traceback" not in done.stderr
