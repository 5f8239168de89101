from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme

TRICORN = [sys.executable, "-m", "tricorn"]
TIMEOUT = 60  # seconds; for what takes one or two
AGENTS = """
async def works(run):
    await run.say(run.message)

async def fails(run):
    await run.say("so far so good")
    raise RuntimeError("not for the people")

async def asks(run):
    await run.say(await run.ask("Send it?", choices=["yes", "no"]))
"""
FACTORIES = """
from contextlib import asynccontextmanager
from pathlib import Path
import trio

def step(text):
    with open("steps", "a") as file:
        file.write(text + "\\n")

@asynccontextmanager
async def factory():
    step("opened")
    async with trio.open_nursery() as nursery:
        async def agent(run):
            try:
                if run.message == "wait":
                    await run.say("waiting")
                    await trio.sleep_forever()
                return run.message
            finally:
                step("run over")
        yield agent
        nursery.cancel_scope.cancel()
    step("closed")

@asynccontextmanager
async def fails_to_close():
    async with factory() as agent:
        yield agent
    raise OSError("already gone")

@asynccontextmanager
async def fails():
    await trio.open_unix_socket("no such socket")
    yield

@asynccontextmanager
async def never_opens():
    try:
        print("opening", flush=True)
        await trio.sleep_forever()
        yield
    finally:
        step("closed")
"""


@dataclass
class Server:
    process: trio.Process
    url: str
    stderr: Path

    async def stop(self, by: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(by)
        with trio.fail_after(TIMEOUT):
            return await self.process.wait()


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.stdout.splitlines()]


class Cli:
    """Runs `tricorn` in a directory that has agents in it."""

    def __init__(self, serve: list[str], directory: Path, nursery: trio.Nursery) -> None:
        self.command = serve
        self.directory = directory
        self.nursery = nursery
        (directory / "agents_of_mine.py").write_text(AGENTS)
        (directory / "factories.py").write_text(FACTORIES)

    @property
    def steps(self) -> list[str]:
        return (self.directory / "steps").read_text().splitlines()

    async def run(self, *arguments: str, stdin: bytes = b"", **environ: str) -> Result:
        with trio.fail_after(TIMEOUT):
            done = await trio.run_process(
                [*TRICORN, *arguments],
                stdin=stdin,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                cwd=self.directory,
                env=os.environ | environ,
            )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    async def serve(self, *arguments: str, **environ: str) -> Server:
        stderr = self.directory / "stderr"
        with stderr.open("wb") as file, trio.fail_after(TIMEOUT):
            process = await self.nursery.start(
                partial(
                    trio.run_process,
                    [*self.command, "--bind", "127.0.0.1:0", *arguments],
                    stdout=subprocess.PIPE,
                    stderr=file,
                    check=False,
                    cwd=self.directory,
                    env=os.environ | environ,
                )
            )
            line = await read_until(process.stdout, b"\n")
        assert re.match(rb"Tricorn is listening on https?://127\.0\.0\.1:", line), line
        return Server(process, line.split()[-1].decode(), stderr)


async def read_until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    received = b""
    while end not in received:
        chunk = await stream.receive_some()
        assert chunk, received
        received += chunk
    return received


@pytest.fixture
async def cli(serve: list[str], tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Cli]:
    yield Cli(serve, tmp_path, nursery)
    # What a test left running gets SIGTERM, and SIGKILL if that does not end it.
    nursery.cancel_scope.cancel()


@pytest.mark.any_server
async def test_a_script_posts_and_reads_the_events_of_its_run(cli: Cli) -> None:
    server = await cli.serve()
    done = await cli.run("chat", server.url, "--json", "--message", "12*(7+5)^2")
    assert (done.status, done.stderr) == (0, "")
    types = [event["type"] for event in done.events]
    assert types[:5] == ["user_message", "agent_started", "agent_thinking", "tool_executing", "tool_completed"]
    assert set(types[5:-1]) == {"agent_message"}
    assert types[-1] == "agent_completed"
    assert [event["seq"] for event in done.events] == list(range(1, len(types) + 1))
    assert done.events[1]["post"] == done.events[0]["id"]
    assert done.events[4]["result"] == "1728"
    assert done.events[-1]["text"] == "".join(event["text"] for event in done.events[5:-1])


async def test_inside_tls(cli: Cli) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(cli.directory / "server.pem")
    authority.cert_pem.write_to_path(cli.directory / "authority.pem")
    (cli.directory / "config.toml").write_text("certfile = 'server.pem'\nkeyfile = 'server.pem'\n")
    server = await cli.serve("--config", "config.toml")
    assert server.url.startswith("https://")
    done = await cli.run("chat", server.url, "--message", "6*7", SSL_CERT_FILE="authority.pem")
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith("42")
    server.process.terminate()
    assert await server.process.wait() == 0
    assert "imported after start-up" not in server.stderr.read_text()


async def test_options_that_mean_nothing_are_named(cli: Cli) -> None:
    (cli.directory / "config.toml").write_text("bind = '0.0.0.0:80'\n")
    done = await cli.run("serve", "--config", "config.toml")
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr == "tricorn: --config config.toml: bind means nothing here; there is --bind\n"


async def test_a_run_is_drawn(cli: Cli) -> None:
    server = await cli.serve()
    done = await cli.run("chat", server.url, "--message", "12*(7+5)^2")
    assert (done.status, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "› 12*(7+5)^2"
    assert lines[2] == '▸ calculate expression="12*(7+5)^2"'
    assert lines[3].startswith("  calculate → 1728 (")
    assert lines[4:] == ["12*(7+5)^2 = 1728"]


async def test_lines_of_a_pipe_are_posted_in_turn(cli: Cli) -> None:
    server = await cli.serve("--agent", "agents_of_mine:works")
    done = await cli.run("chat", server.url, stdin="one\n\nzwei \x1b[31mü".encode())
    assert done == Result(0, "› one\none\n› zwei [31mü\nzwei [31mü\n", "")


async def test_lines_of_a_file_are_posted_in_turn(cli: Cli) -> None:
    server = await cli.serve("--agent", "agents_of_mine:works")
    (cli.directory / "lines").write_text("one\ntwo\n")
    with (cli.directory / "lines").open() as file, trio.fail_after(TIMEOUT):
        done = await trio.run_process([*TRICORN, "chat", server.url], stdin=file, capture_stdout=True)
    assert done.stdout.decode() == "› one\none\n› two\ntwo\n"


async def test_a_conversation_that_goes_on(cli: Cli) -> None:
    server = await cli.serve("--agent", "agents_of_mine:works")
    first = await cli.run("chat", server.url, "--conversation", "ours", "--json", "--message", "one")
    second = await cli.run("chat", server.url, "--conversation", "ours", "--json", "--message", "two")
    everything = await cli.run("chat", server.url, "--conversation", "ours", "--json")
    assert [event["text"] for event in second.events if event["type"] == "user_message"] == ["two"]
    assert everything == Result(0, first.stdout + second.stdout, "")


@pytest.mark.any_server
async def test_an_agent_that_fails_is_exit_status_1_and_nothing_else(cli: Cli) -> None:
    server = await cli.serve("--agent", "agents_of_mine:fails")
    failed = await cli.run("chat", server.url, "--json", "--message", "x")
    assert (failed.status, failed.stderr) == (1, "")
    assert "not for the people" not in failed.stdout
    assert failed.events[-1]["outcome"] == "failed"
    assert await server.stop() == 0
    reports = [json.loads(line) for line in server.stderr.read_text().splitlines()]
    assert [report["message"] for report in reports if report.get("error_id") == failed.events[-1]["error_id"]] == [
        "RuntimeError: not for the people"
    ]


@pytest.mark.any_server
async def test_a_post_that_is_refused(cli: Cli) -> None:
    server = await cli.serve(TRICORN_TEXT_CHARACTERS="3")
    done = await cli.run("chat", server.url, "--message", "four")
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.startswith("tricorn: ws://")
    assert done.stderr.count("\n") == 1


@pytest.mark.any_server
async def test_a_run_that_the_end_of_the_server_interrupts(cli: Cli) -> None:
    server = await cli.serve()
    chat = [*TRICORN, "chat", server.url, "--json", "--message", "slow 30"]
    process = await cli.nursery.start(partial(trio.run_process, chat, stdout=subprocess.PIPE, check=False))
    with trio.fail_after(TIMEOUT):
        await read_until(process.stdout, b'"tool_executing"')
        assert await server.stop() == 0
        rest = await read_until(process.stdout, b'"outcome":"interrupted"')
        assert b'"tool_completed"' in rest
        assert await process.wait() == 1


async def test_a_server_that_falls_silent(cli: Cli) -> None:
    server = await cli.serve(TRICORN_HEARTBEAT="1")
    chat = [*TRICORN, "chat", server.url, "--json", "--message", "slow 3"]
    pipe = subprocess.PIPE
    process = await cli.nursery.start(partial(trio.run_process, chat, stdout=pipe, stderr=pipe, check=False))
    with trio.fail_after(TIMEOUT):
        heard = await read_until(process.stdout, b'"tool_executing"')
        server.process.send_signal(signal.SIGSTOP)
        try:
            told = await read_until(process.stderr, b"\n")
        finally:
            server.process.send_signal(signal.SIGCONT)
        assert b": connection lost: nothing heard for 2 seconds; trying again in " in told
        heard += b"".join([chunk async for chunk in process.stdout])
        assert await process.wait() == 0
    seqs = [json.loads(line)["seq"] for line in heard.splitlines()]
    assert seqs == list(range(1, len(seqs) + 1))


@pytest.mark.any_server
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_server_with_exit_status_0(cli: Cli, by: signal.Signals) -> None:
    server = await cli.serve()
    assert await server.stop(by) == 0
    assert await server.process.stdout.receive_some() == b""
    assert server.stderr.read_text() == ""


async def test_stderr_that_is_closed_does_not_become_a_socket(cli: Cli) -> None:
    closed = 'exec "$@" 2>&-'
    command = ["sh", "-c", closed, "sh", *TRICORN, "serve", "--bind", "127.0.0.1:0"]
    process = await cli.nursery.start(partial(trio.run_process, command, stdout=subprocess.PIPE))
    with trio.fail_after(TIMEOUT):
        url = (await read_until(process.stdout, b"\n")).split()[-1].decode()
        assert os.readlink(f"/proc/{process.pid}/fd/2") == os.devnull
        assert (await cli.run("chat", url, "--message", "hello")).status == 0


async def test_a_port_in_use(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        done = await cli.run("serve", "--bind", bind)
    assert done == Result(2, "", f"tricorn: --bind {bind}: address already in use\n")


async def test_a_host_that_there_is_not(cli: Cli) -> None:
    done = await cli.run("serve", "--auth", "none", "--bind", "no-such-host.invalid:0")
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr.startswith("tricorn: --bind no-such-host.invalid:0: ")
    assert done.stderr.count("\n") == 1


async def test_a_bad_setting(cli: Cli) -> None:
    done = await cli.run("serve", TRICORN_LINGER="long")
    assert done == Result(2, "", "tricorn: TRICORN_LINGER=long: must be a number of seconds, 0 or more\n")


async def test_a_bad_agent(cli: Cli) -> None:
    done = await cli.run("serve", "--agent", "agents_of_mine:other")
    assert done == Result(
        2, "", "tricorn: --agent agents_of_mine:other: there is no other in agents_of_mine (agents_of_mine.py)\n"
    )


async def test_what_an_agent_needs_is_opened_before_the_first_run_and_closed_after_the_drain(cli: Cli) -> None:
    server = await cli.serve("--agent", "factories:factory")
    assert cli.steps == ["opened"]
    for text in ("one", "two"):
        assert (await cli.run("chat", server.url, "--message", text)).stdout == f"› {text}\n{text}\n"
    chat = [*TRICORN, "chat", server.url, "--json", "--message", "wait"]
    process = await cli.nursery.start(partial(trio.run_process, chat, stdout=subprocess.PIPE, check=False))
    with trio.fail_after(TIMEOUT):
        await read_until(process.stdout, b'"waiting"')
        assert await server.stop() == 0
        await read_until(process.stdout, b'"outcome":"interrupted"')
    assert cli.steps == ["opened", "run over", "run over", "run over", "closed"]
    assert '"ERROR"' not in server.stderr.read_text()


async def test_what_fails_to_close_is_a_record(cli: Cli) -> None:
    server = await cli.serve("--agent", "factories:fails_to_close")
    assert await server.stop() == 0
    [record] = map(json.loads, server.stderr.read_text().splitlines())
    assert (record["severity"], record["message"]) == ("ERROR", "OSError: already gone")
    assert cli.steps == ["opened", "closed"]


async def test_what_fails_to_open_is_one_line_and_exit_status_1(cli: Cli) -> None:
    done = await cli.run("serve", "--bind", "127.0.0.1:0", "--agent", "factories:fails")
    line = FACTORIES.splitlines().index('    await trio.open_unix_socket("no such socket")') + 1
    problem = "FileNotFoundError: [Errno 2] No such file or directory"
    place = f"(factories.py, line {line})"
    assert done == Result(1, "", f"tricorn: --agent factories:fails: starting it raised {problem} {place}\n")


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_while_an_agent_is_opened_ends_the_start(cli: Cli, by: signal.Signals) -> None:
    serve = [*cli.command, "--bind", "127.0.0.1:0", "--agent", "factories:never_opens"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    start = partial(trio.run_process, serve, **pipes, check=False, cwd=cli.directory)
    process = await cli.nursery.start(start)
    with trio.fail_after(TIMEOUT):
        assert await read_until(process.stdout, b"\n") == b"opening\n"
        process.send_signal(by)
        assert await process.wait() == 0
        assert b"".join([part async for part in process.stderr]) == b""
    assert cli.steps == ["closed"]


async def test_nobody_there(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"ws://127.0.0.1:{closed.getsockname()[1]}/ws"
    assert await cli.run("chat", url) == Result(1, "", f"tricorn: {url}: connection refused\n")


async def test_something_else_there(cli: Cli) -> None:
    server = await cli.serve()
    url = server.url.replace("http:", "ws:") + "/healthz"
    done = await cli.run("chat", url)
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.startswith(f"tricorn: {url}: the server answered ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("how", [[], ["--json"]])
async def test_stdout_that_nobody_reads(cli: Cli, how: list[str]) -> None:
    server = await cli.serve()
    reader, writer = os.pipe()
    os.close(reader)
    with trio.fail_after(TIMEOUT):
        done = await trio.run_process(
            [*TRICORN, "chat", server.url, "--message", "hello", *how], stdout=writer, capture_stderr=True, check=False
        )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


async def test_a_person_at_a_terminal(cli: Cli) -> None:
    server = await cli.serve()
    ours, theirs = pty.openpty()
    async with trio.lowlevel.FdStream(ours) as terminal:
        # setsid makes the pseudo-terminal the one whose Ctrl-C the client gets.
        process = await cli.nursery.start(
            partial(
                trio.run_process,
                ["setsid", "--ctty", "--wait", *TRICORN, "chat", server.url],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                check=False,
            )
        )
        os.close(theirs)
        prompt = "› ".encode()
        with trio.fail_after(TIMEOUT):
            await read_until(terminal, prompt)
            await terminal.send_all(b"12*(7+5)^2\n")
            answer = (await read_until(terminal, prompt)).decode()
            assert "calculate → 1728" in answer
            assert "12*(7+5)^2 = 1728" in answer

            await terminal.send_all(b"slow 60\n")
            await read_until(terminal, "▸ slow".encode())
            await terminal.send_all(b"\x03")
            assert "cancelled" in (await read_until(terminal, prompt)).decode()

            await terminal.send_all(b"\x04")
            assert await process.wait() == 0


async def test_a_person_at_a_terminal_is_asked(cli: Cli) -> None:
    server = await cli.serve("--agent", "agents_of_mine:asks")
    ours, theirs = pty.openpty()
    async with trio.lowlevel.FdStream(ours) as terminal:
        command = ["setsid", "--ctty", "--wait", *TRICORN, "chat", server.url]
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        process = await cli.nursery.start(partial(trio.run_process, command, **streams, check=False))
        os.close(theirs)
        prompt = "› ".encode()
        with trio.fail_after(TIMEOUT):
            await read_until(terminal, prompt)
            await terminal.send_all(b"mail\n")
            assert "? Send it? (yes / no)" in (await read_until(terminal, prompt)).decode()
            await terminal.send_all(b"maybe\n")
            assert "answer with one of: yes, no" in (await read_until(terminal, prompt)).decode()
            await terminal.send_all(b"yes\n")
            assert (await read_until(terminal, prompt)).count(b"yes") == 3  # typed, asked, said

            await terminal.send_all(b"mail\n")
            await read_until(terminal, prompt)
            await terminal.send_all(b"\x03")
            said = (await read_until(terminal, prompt)).decode()
            assert "no longer asked" in said
            assert "cancelled" in said
            await terminal.send_all(b"\x04")
            assert await process.wait() == 0


@pytest.mark.any_server
async def test_the_first_record_on_cloud_run_says_what_this_is_an_instance_of(cli: Cli) -> None:
    place = {"service": "chat", "revision": "chat-00042-abc", "configuration": "chat"}
    server = await cli.serve(**{f"K_{name.upper()}": value for name, value in place.items()})
    assert await server.stop() == 0
    first = json.loads(server.stderr.read_text().splitlines()[0])
    assert first == {"severity": "INFO", "message": "an instance has started", **place}
    server = await cli.serve()
    assert await server.stop() == 0
    assert server.stderr.read_text() == ""
