"""The quick start and the tutorial: commands print what the pages say, and each step does what it is there for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from fixtures.real_services import RedisServer
from integration.conftest import port_of

DOCS = Path(__file__).parents[2] / "docs"
STEPS = DOCS / "examples" / "tutorial"
AGENT_STEPS = DOCS / "examples" / "agent_tutorial"
TRICORN = Path(sys.executable).with_name("tricorn")
PATIENCE = 60  # seconds, for what takes one or two
KEY = "a secret key of at least 32 bytes"

TALK = """
from websockets.sync.client import connect
with connect("ws://127.0.0.1:8080") as ws:
    ws.send("hello")
    print(ws.recv())
"""


@asynccontextmanager
async def serving(
    *command: str | Path, environ: dict[str, str] | None = None, cwd: Path | None = None
) -> AsyncGenerator[tuple[trio.Process, int]]:
    """Run a program that serves until SIGTERM, and then exits with 0."""
    async with trio.open_nursery() as nursery:
        environ = {**os.environ, **(environ or {})}
        process = await nursery.start(partial(trio.run_process, command, env=environ, cwd=cwd))
        try:
            yield process, await port_of(process)
        finally:
            process.terminate()


def step(name: str) -> tuple[str, ...]:
    """The command that runs a step as it is, but for its port."""
    source, count = re.subn(r"\b8080\b", "0", (STEPS / name).read_text())
    assert count == 1
    return sys.executable, "-c", source


async def printed(*command: str) -> str:
    with trio.fail_after(PATIENCE):
        return (await trio.run_process(command, capture_stdout=True)).stdout.decode()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


async def test_the_quick_start_prints_what_the_server_sent_back() -> None:
    [source] = blocks("quickstart.md", "python")
    assert source == (STEPS / "step1_echo.py").read_text()
    assert f".venv/bin/python -c '{TALK}'\n" in blocks("quickstart.md", "sh")
    async with serving(*step("step1_echo.py")) as (_, port):
        assert (
            await printed(sys.executable, "-c", TALK.replace("8080", str(port))) == blocks("quickstart.md", "text")[0]
        )


async def test_the_quick_start_prints_what_the_agent_does() -> None:
    assert ".venv/bin/tricorn serve\n" in blocks("quickstart.md", "sh")
    [command] = [each for each in blocks("quickstart.md", "sh") if " chat --message " in each]
    question = command.split("'")[1]
    async with serving(TRICORN, "serve", "--bind", "127.0.0.1:0") as (_, port):
        said = await printed(str(TRICORN), "chat", f"ws://127.0.0.1:{port}/ws", "--message", question)
    assert re.sub(r"\(\d+\.\d s\)", "(0.0 s)", said) == blocks("quickstart.md", "text")[1]


async def test_both_talkers_hear_who_speaks_and_who_leaves_until_the_room_is_stopped() -> None:
    room = {"ROOM_KEY": KEY, "HOST": "127.0.0.1"}
    async with serving(*step("step3_members.py"), environ=room) as (server, port), trio.open_nursery() as nursery:
        environ = {**os.environ, **room, "ROOM_URL": f"ws://127.0.0.1:{port}"}
        ann, bob = [
            await nursery.start(
                partial(
                    trio.run_process,
                    (sys.executable, STEPS / "talk.py", name),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environ,
                    check=False,
                )
            )
            for name in ("ann", "bob")
        ]
        with trio.fail_after(PATIENCE):
            await ann.stdin.send_all(b"are you there?\n")
            assert await line(ann) == "ann: are you there?"
            await bob.stdin.send_all(b"hello\n")
            while (heard := await line(bob)) != "bob: hello":
                assert heard == "ann: are you there?"
            assert await line(ann) == "bob: hello"
            await bob.stdin.aclose()
            assert await line(ann) == "bob has left"
            server.terminate()
            assert await server.wait() == 0
            await ann.stdin.aclose()


async def line(process: trio.Process) -> str:
    assert process.stdout is not None
    said = b""
    while not said.endswith(b"\n"):
        said += await process.stdout.receive_some(1)
    return said.decode().strip()


async def test_the_first_agent_prints_what_the_page_says() -> None:
    agent = ("--agent", "step1_agent:agent")
    async with serving(TRICORN, "serve", "--bind", "127.0.0.1:0", *agent, cwd=AGENT_STEPS) as (_, port):
        said = await printed(str(TRICORN), "chat", f"ws://127.0.0.1:{port}/ws", "--message", "tea")
    assert re.sub(r"\(\d+\.\d s\)", "(0.0 s)", said) == blocks("tutorial-agent.md", "text")[0]


async def test_what_is_asked_at_one_instance_is_seen_at_the_other(another_redis_server: RedisServer) -> None:
    another_redis_server.ask("FLUSHALL")
    log = f"unix://{another_redis_server.path}"
    command = (TRICORN, "serve", "--bind", "127.0.0.1:0", "--agent", "step1_agent:agent", "--log", log)
    async with serving(*command, cwd=AGENT_STEPS) as (_, one), serving(*command, cwd=AGENT_STEPS) as (_, other):
        asked = [
            await printed(
                *(str(TRICORN), "chat", f"ws://127.0.0.1:{port}/ws", "--json"),
                *("--conversation", "shop", "--message", item),
            )
            for port, item in ((one, "tea"), (other, "coffee"))
        ]
    first, second = (json.loads(said.splitlines()[-1]) for said in asked)
    assert (first["text"], second["text"]) == ("We have 12 packets of tea.", "We have 0 packets of coffee.")
    assert first["seq"] < second["seq"]


PAGES = {"tutorial.md": STEPS, "tutorial-agent.md": AGENT_STEPS}


@pytest.mark.parametrize("page", PAGES)
def test_a_tutorial_links_to_each_file_and_shows_it(page: str) -> None:
    text = (DOCS / page).read_text()
    files = {path.name for path in PAGES[page].iterdir() if path.is_file()}
    shown = {Path(name).name for name in re.findall(r"^```{literalinclude} (.*)", text, re.MULTILINE)}
    linked = {Path(name).name for name in re.findall(r"\]\((examples/\w*tutorial/[^)]*)\)", text)}
    assert shown | linked == files
    assert shown - linked <= {"pytest.ini"}
    assert linked - shown <= {"pytest.ini"}


@pytest.mark.parametrize("page", PAGES)
async def test_the_tests_of_a_tutorial_pass(page: str) -> None:
    steps = PAGES[page]
    command = (sys.executable, "-m", "pytest", "-q", "-p", "pytest_tricorn", "-p", "no:cacheprovider", steps)
    done = await trio.run_process(command, cwd=steps, capture_stdout=True, check=False)
    [said] = [each for each in blocks(page, "console") if "pytest" in each]
    count = re.findall(r"\d+ passed", said)[0]
    assert (done.returncode, count in done.stdout.decode()) == (0, True), done.stdout.decode()
