"""What README.md and docs/examples show is true: each example runs as a process and does what it is there for."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio_websocket import CloseReason, ConnectionClosed, WebSocketConnection, wrap_client_stream

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
TRICORN = Path(sys.executable).with_name("tricorn")

MANY = 300

Serving = Callable[..., AbstractAsyncContextManager[int]]


def on_a_free_port(example: str) -> tuple[str, ...]:
    """The command that runs an example as it is, but for its port."""
    source, count = re.subn(r"\b8080\b", "0", (EXAMPLES / example).read_text())
    assert count == 1
    return sys.executable, "-c", source


def test_the_readme_shows_the_examples_as_they_are() -> None:
    shown = re.findall(r"\]\((docs/examples/[^)]+)\):\n\n```python\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    assert [name for name, _ in shown] == ["docs/examples/weather_agent.py", "docs/examples/echo.py"]
    for name, source in shown:
        assert source == (ROOT / name).read_text()


def test_the_readme_shows_no_other_python() -> None:
    assert readme().count("```python") == 2


def test_the_links_of_the_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_command_that_serves_is_there() -> None:
    serve, test = re.findall(r"^```sh\n(.*?)\n```", readme(), re.MULTILINE | re.DOTALL)[:2]
    assert serve.endswith(" && .venv/bin/tricorn serve")
    assert test.endswith(" && .venv/bin/pytest -n 4 --dist loadgroup")


@pytest.mark.parametrize("example", ["echo.py", "trio_websocket_server.py"])
async def test_echo(serving: Serving, example: str) -> None:
    async with (
        serving(*on_a_free_port(example)) as port,
        connected(port) as ws,
    ):
        for message in ("hello", b"\0\xff"):
            await ws.send_message(message)
            assert await ws.get_message() == message


async def test_everybody_hears_a_broadcast(serving: Serving) -> None:
    async with (
        serving(*on_a_free_port("broadcast.py")) as port,
        connected(port) as one,
        connected(port) as other,
    ):
        await other.send_message("here")
        assert await other.get_message() == "here"
        assert await one.get_message() == "here"
        await one.send_message("hello")
        assert [await ws.get_message() for ws in (one, other)] == ["hello", "hello"]


async def test_who_does_not_read_a_broadcast_is_let_go(serving: Serving) -> None:
    news = b"." * 2**17  # so that MANY of it are more than a socket and 100 messages hold
    async with (
        serving(*on_a_free_port("broadcast.py")) as port,
        connected(port) as slow,
        connected(port) as quick,
    ):
        for _ in range(MANY):
            await quick.send_message(news)
            assert await quick.get_message() == news
        heard, end = await all_messages(slow)
    assert 100 <= heard < MANY
    assert (end.code, end.reason) == (1008, "too slow")


async def test_a_handler_beside_an_application_of_starlette(serving: Serving) -> None:
    async with (
        serving(*on_a_free_port("beside_starlette.py")) as port,
        connected(port, "/room") as member,
        connected(port, "/announce") as speaker,
    ):
        await member.send_message("here")
        assert await member.get_message() == "here"
        await speaker.send_message("news")
        assert await member.get_message() == "news"
        assert await speaker.get_message() == "announced to 1"
        assert (await page(port)).endswith(b"\r\n\r\n1 in the room\n")


@pytest.mark.parametrize(
    ("city", "status", "outcome", "forecast"),
    [
        ("Oslo", 0, {"outcome": "success", "text": "Oslo: rain."}, {"result": "rain"}),
        ("Atlantis", 1, {"outcome": "failed"}, {"error": "no weather station in Atlantis"}),
    ],
)
async def test_the_weather_agent(
    serving: Serving, city: str, status: int, outcome: dict[str, str], forecast: dict[str, str]
) -> None:
    agent = ("--agent", "weather_agent:weather")
    async with serving(TRICORN, "serve", "--bind", "127.0.0.1:0", *agent, cwd=EXAMPLES) as port:
        ask = (TRICORN, "chat", f"ws://127.0.0.1:{port}/ws", "--json", "--message", city)
        chat = await trio.run_process(ask, capture_stdout=True, check=False)
    assert chat.returncode == status
    events = {event["type"]: event for event in map(json.loads, chat.stdout.splitlines())}
    assert events["tool_executing"]["arguments"] == {"city": city}
    assert forecast.items() <= events["tool_completed"].items()
    assert outcome.items() <= events["agent_completed"].items()


async def test_a_handler_is_tested_without_sockets() -> None:
    tests = EXAMPLES / "testing_a_handler.py"
    command = (sys.executable, "-m", "pytest", "-p", "pytest_tricorn", "-p", "no:cacheprovider", "-q", tests)
    result = await trio.run_process(command, cwd=ROOT, capture_stdout=True, check=False)
    assert (result.returncode, b"4 passed" in result.stdout) == (0, True), result.stdout.decode()


@asynccontextmanager
async def connected(port: int, path: str = "/") -> AsyncGenerator[WebSocketConnection]:
    """A client on a socket that is closed here: where the server closes, trio-websocket leaves its own open."""
    async with (
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
        trio.open_nursery() as nursery,
        await wrap_client_stream(nursery, stream, "127.0.0.1", path) as ws,
    ):
        yield ws


async def page(port: int) -> bytes:
    """The response that has the page at /."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return b"".join([bytes(data) async for data in stream])


async def all_messages(ws: WebSocketConnection) -> tuple[int, CloseReason]:
    """How many messages come before the connection is closed, and how it is closed."""
    count = 0
    try:
        while True:
            await ws.get_message()
            count += 1
    except ConnectionClosed as closed:
        return count, closed.reason


def readme() -> str:
    return (ROOT / "README.md").read_text()
