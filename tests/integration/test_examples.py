"""What README.md and docs/examples show is true: each example runs as a process and does what it is there for."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import trio
from trio_websocket import CloseReason, ConnectionClosed, ConnectionRejected, WebSocketConnection, wrap_client_stream

from tricorn.chat import Run
from tricorn.chat.testing import ask

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
TRICORN = Path(sys.executable).with_name("tricorn")

MANY = 300
PATIENCE = 60  # seconds, for what takes one or two
WAITS = 2**20  # bytes that a broadcast lets wait for a slow connection

Headers = Sequence[tuple[str, str]]
Serving = Callable[..., AbstractAsyncContextManager[int]]


def on_a_free_port(example: str) -> tuple[str, ...]:
    """The command that runs an example as it is, but for its port."""
    source, count = re.subn(r"\b8080\b", "0", (EXAMPLES / example).read_text())
    assert count == 1
    return sys.executable, "-c", source


def test_the_readme_shows_the_examples_as_they_are() -> None:
    shown = re.findall(r"\]\((docs/examples/[^)]+)\):\n\n```python\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    assert [Path(name).name for name, _ in shown] == ["weather_agent.py", "echo.py", "authenticate.py"]
    for name, source in shown:
        assert source == (ROOT / name).read_text()


def test_the_readme_shows_no_other_python() -> None:
    assert readme().count("```python") == 3


def test_the_page_about_tools_shows_parts_of_the_examples_as_they_are() -> None:
    page = (ROOT / "docs" / "tools.md").read_text()
    shown = re.findall(r"\]\((examples/[^)]+)\)[^\n]*\n\n```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [Path(name).name for name, _ in shown] == [
        "tools_agent.py",
        "sync_library.py",
        "asyncio_library.py",
        "mcp_agent.py",
    ]
    for name, source in shown:
        assert source in (ROOT / "docs" / name).read_text()


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


async def test_everybody_in_a_room_hears_a_message(serving: Serving) -> None:
    async with (
        serving(*on_a_free_port("room.py")) as port,
        connected(port) as one,
        connected(port) as other,
    ):
        await other.send_message("here")
        assert await other.get_message() == "here"
        assert await one.get_message() == "here"
        await one.send_message("hello")
        assert [await ws.get_message() for ws in (one, other)] == ["hello", "hello"]


async def test_a_member_that_does_not_read_is_closed_with_1008_and_nobody_waits_for_it(serving: Serving) -> None:
    news = b"." * 2**17  # so that MANY of it are more than sockets and a broadcast hold
    async with (
        serving(*on_a_free_port("room.py")) as port,
        connected(port) as slow,
        connected(port) as quick,
    ):
        for _ in range(MANY):
            await quick.send_message(news)
            assert await quick.get_message() == news
        with trio.fail_after(PATIENCE):
            heard, end = await all_messages(slow)
    assert WAITS // len(news) <= heard < MANY
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


async def test_a_client_with_a_token_is_greeted_by_name(serving: Serving) -> None:
    async with (
        serving(*on_a_free_port("authenticate.py")) as port,
        connected(port, headers=[("Authorization", "Bearer tok-ann")]) as ws,
    ):
        assert await ws.get_message() == "Hello Ann!"
        await ws.send_message("hi")
        assert await ws.get_message() == "Ann said: 'hi'"


@pytest.mark.parametrize("headers", [[], [("Authorization", "Bearer tok-eve")], [("Authorization", "Basic tok-ann")]])
async def test_a_client_without_a_known_token_gets_401(serving: Serving, headers: Headers) -> None:
    async with serving(*on_a_free_port("authenticate.py")) as port:
        refused = await refusal(port, "/", headers)
    assert (refused.status_code, refused.body) == (401, b"a known token is needed\n")
    assert (b"www-authenticate", b"Bearer") in refused.headers


async def test_each_path_has_its_handler_and_others_get_404(serving: Serving) -> None:
    async with (
        serving(*on_a_free_port("routes.py")) as port,
        connected(port, "/echo") as echo,
        connected(port, "/latency") as latency,
    ):
        await echo.send_message("hello")
        assert await echo.get_message() == "hello"
        await latency.send_message("how long?")
        assert re.fullmatch(r"\d+\.\d ms", await latency.get_message())
        assert (await refusal(port, "/other")).status_code == 404


@pytest.mark.parametrize(
    ("city", "answer", "forecast"),
    [
        ("Oslo", "Oslo: rain.", {"result": "rain"}),
        (
            "Atlantis",
            "I cannot say: there is no weather station in Atlantis.",
            {"error": "no weather station in Atlantis"},
        ),
    ],
)
async def test_the_weather_agent(serving: Serving, city: str, answer: str, forecast: dict[str, str]) -> None:
    agent = ("--agent", "weather_agent:weather")
    async with serving(TRICORN, "serve", "--bind", "127.0.0.1:0", *agent, cwd=EXAMPLES) as port:
        ask = (TRICORN, "chat", f"ws://127.0.0.1:{port}/ws", "--json", "--message", city)
        chat = await trio.run_process(ask, capture_stdout=True)
    events = {event["type"]: event for event in map(json.loads, chat.stdout.splitlines())}
    assert events["tool_executing"]["arguments"] == {"city": city}
    assert forecast.items() <= events["tool_completed"].items()
    assert {"outcome": "success", "text": answer}.items() <= events["agent_completed"].items()


async def test_runs_share_a_client_that_lives_as_long_as_the_server(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    connections = 0

    async def service(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        async for data in stream:
            target = data.split()[1]
            status, body = (b"404 Not Found", b"") if b"Atlantis" in target else (b"200 OK", b"rain")
            await stream.send_all(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    [listener] = await nursery.start(partial(trio.serve_tcp, service, 0, host="127.0.0.1"))
    its_port = str(listener.socket.getsockname()[1])
    source, count = re.subn(r"\b8000\b", its_port, (EXAMPLES / "shared_client.py").read_text())
    assert count == 1
    (tmp_path / "shared_client.py").write_text(source)
    monkeypatch.setenv("TRICORN_IMPORT_GUARD", "deny")
    agent = ("--agent", "shared_client:weather_service")
    async with serving(TRICORN, "serve", "--bind", "127.0.0.1:0", *agent, cwd=tmp_path) as port:
        for city, answer in (("Oslo", "Oslo: rain."), ("Atlantis", "I cannot say: there is no weather station in")):
            ask = (TRICORN, "chat", f"ws://127.0.0.1:{port}/ws", "--message", city)
            chat = await trio.run_process(ask, capture_stdout=True)
            assert answer in chat.stdout.decode()
    assert connections == 1
    nursery.cancel_scope.cancel()


@pytest.fixture
def examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.mark.usefixtures("examples_can_be_imported")
async def test_stop_reaches_a_library_that_is_not_async_where_it_reads(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    said, hung_up = trio.Event(), trio.Event()

    async def model(stream: trio.SocketStream) -> None:
        """Answer with one line, and never end: until the client is gone."""
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\none line\n")
            assert await stream.receive_some() == b""
            hung_up.set()

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, model, [listener])
    example = import_module("sync_library")
    monkeypatch.setattr(example, "PORT", listener.socket.getsockname()[1])

    async def agent(run: Run) -> None:
        say = run.say

        async def say_and_tell(text: str) -> None:
            await say(text)
            said.set()

        monkeypatch.setattr(run, "say", say_and_tell)
        async with trio.open_nursery() as run_nursery:
            run_nursery.start_soon(example.agent, run)
            await said.wait()
            run_nursery.cancel_scope.cancel()

    with trio.fail_after(20):  # less than the 30 s that the library would wait for
        result = await ask(agent, "go")
        await hung_up.wait()
    assert (result.outcome, result.answer) == ("success", "one line\n")
    nursery.cancel_scope.cancel()


async def test_the_tests_beside_the_examples_pass() -> None:
    files = [*EXAMPLES.glob("test_*.py"), *EXAMPLES.glob("testing_*.py")]
    assert len(files) > 10
    options = ("-p", "pytest_tricorn", "-p", "no:cacheprovider", "--import-mode=prepend", "-q")
    result = await trio.run_process(
        (sys.executable, "-m", "pytest", *options, *files), cwd=ROOT, capture_stdout=True, check=False
    )
    assert result.returncode == 0, result.stdout.decode()


def test_each_example_has_a_test_beside_it() -> None:
    served = {"trio_websocket_server", "mcp_weather_server"}  # the tests of others use them, as processes
    tested = {"weather_agent"}  # by testing_an_agent.py
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    without = {name for name in names if not name.startswith("test") and f"test_{name}" not in names}
    assert without == served | tested


@asynccontextmanager
async def connected(port: int, path: str = "/", headers: Headers = ()) -> AsyncGenerator[WebSocketConnection]:
    """A client on a socket that is closed here: where the server closes, trio-websocket leaves its own open."""
    async with (
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
        trio.open_nursery() as nursery,
        await wrap_client_stream(nursery, stream, "127.0.0.1", path, extra_headers=list(headers)) as ws,
    ):
        yield ws


async def refusal(port: int, path: str, headers: Headers = ()) -> ConnectionRejected:
    """The response to a handshake that is refused."""
    with pytest.RaisesGroup(ConnectionRejected, flatten_subgroups=True) as raised:
        async with connected(port, path, headers):
            raise AssertionError("it was not refused")
    [error] = raised.value.exceptions
    assert isinstance(error, ConnectionRejected)
    return error


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
