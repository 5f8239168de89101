"""The benchmarks run and find something. What they measure is not a test's business."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import trio

from bench import anatomy, logs
from bench.load import Clients, Failed, echoes
from bench.process import NotStarted, serving
from bench.servers import SERVERS, Program
from bench.suites import SUITES
from bench.suites.chat import measure

ROOT = Path(__file__).parents[2]


async def test_every_suite_finds_something_of_every_server(tmp_path: Path) -> None:
    servers = ["tricorn", "websockets-asyncio", "tricorn-serve", "asyncio-version-uvloop"]
    if find_spec("picows"):
        servers.insert(2, "picows-websockets-uvloop")
    servers.append("tricorn-model")
    if find_spec("openai"):
        servers.append("asyncio-version-openai-uvloop")
    command = [sys.executable, "-m", "bench", "tiny", "--servers", ",".join(servers), "--results", str(tmp_path)]
    finished = await trio.run_process(command, cwd=ROOT, capture_stdout=True, capture_stderr=True)
    printed = finished.stdout.decode()
    found = json.loads((tmp_path / "results.json").read_text())["suites"]
    assert list(found) == list(SUITES)
    for name, suite in found.items():
        assert f"\n## {name}\n" in f"\n{printed}"
        if name != "model" or find_spec("openai"):
            assert re.search(r" is ahead in “.+\d of [a-z-]+\)\.\n", printed.partition(f"## {name}\n")[2])
        assert not suite["notes"]
        for case in suite["cases"].values():
            assert list(case) == [server for server in servers if server in SUITES[name].servers]
            for figures in case.values():
                assert figures
                assert all(isinstance(value, int | float) for [value] in figures.values())


def test_a_log_without_its_server_is_skipped_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="skipped: there is no redis-server: apt-get install redis-server"):
        logs.redis().__enter__()


@pytest.mark.parametrize("log", [logs.sqlite, logs.redis, logs.postgres])
def test_the_chat_is_measured_with_each_log(
    monkeypatch: pytest.MonkeyPatch, log: Callable[[], AbstractContextManager[str]]
) -> None:
    monkeypatch.setitem(SERVERS, "with-a-log", replace(SERVERS["tricorn-serve"], beside=log))
    with ExitStack() as stack:
        try:
            server = stack.enter_context(serving("with-a-log"))
        except FileNotFoundError as missing:
            pytest.skip(str(missing))
        figures = measure(server, conversations=2, readers=2, posts=1, subprotocol="tricorn.v1")
    assert figures["µs CPU"] > 0


async def test_log() -> None:
    command = [sys.executable, ROOT / "bench/log.py", "--events", "20", "--rounds", "1", "--readers", "1"]
    finished = await trio.run_process(command, capture_stdout=True)
    assert finished.stdout.decode().splitlines()[2].split() == ["memory", "sqlite"]


async def test_faults() -> None:
    servers, faults = "tricorn,websockets-asyncio", "half-close;handler crashes;SIGTERM, idle clients"
    command = [sys.executable, "-m", "bench.faults", "--quick", "--servers", servers, "--faults", faults]
    finished = await trio.run_process(command, cwd=ROOT, capture_stdout=True, capture_stderr=True)
    rows = [line.split(" | ") for line in finished.stdout.decode().splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in rows[1:]] == faults.split(";")
    assert all("fails" not in cell for row in rows for cell in row)


LIAR = """
from websockets.sync.server import serve

def lie(ws):
    for number, message in enumerate(ws):
        ws.send(message if number < 3 else message[:-1] + "?")

with serve(lie, "127.0.0.1", 0, compression=None) as server:
    print(f"listening on http://127.0.0.1:{server.socket.getsockname()[1]}", flush=True)
    server.serve_forever()
"""


def test_a_wrong_echo_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "liar.py").write_text(LIAR)
    monkeypatch.setitem(SERVERS, "liar", Program((sys.executable, str(tmp_path / "liar.py"))))
    with serving("liar") as server, Clients(server) as clients:
        clients.connect(1)
        clients.exchange(echoes(64), 3)
        with pytest.raises(Failed, match="something else"):
            clients.exchange(echoes(64), 1)


def test_the_parts_of_a_message_have_a_cost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(anatomy, "RUNS", 2)
    anatomy.main()
    costs = [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()]
    assert len(costs) == 13


def test_a_server_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVERS, "absent", Program((sys.executable, "-m", "no_such_server")))
    with pytest.raises(NotStarted, match="No module named no_such_server"), serving("absent"):
        raise AssertionError
