from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tricorn.chat.agents.demo import demo
from tricorn.chat.client.screen import one_line
from tricorn.chat.client.terminal import chat, websocket_url
from tricorn.service.cli import main
from tricorn.service.loader import AgentFactory, load_agent
from tricorn.settings import SettingError

AGENTS = """
from contextlib import asynccontextmanager
from functools import partial

async def agent(run): ...
async def curried(style, run): ...
async def with_option(run, style="plain"): ...
async def of_two(run, city): ...
async def of_none(): ...
async def keyword(*, run): ...
async def generator(run): yield
def plain(run): ...
number = 5
nothing = None
partial_agent = partial(curried, "loud")

class Agent:
    async def __call__(self, run): ...
    async def method(self, run): ...

instance = Agent()

@asynccontextmanager
async def factory(): yield agent

@asynccontextmanager
async def with_default(url="sqlite:"): yield agent

@asynccontextmanager
async def factory_of_url(url): yield agent

class Factory:
    async def __aenter__(self): return agent
    async def __aexit__(self, *_): ...

class FactoryOfURL(Factory):
    def __init__(self, url): ...

def makes_one(): return factory()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module with agents, good and bad."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "agents_of_mine.py").write_text(AGENTS)
    yield "agents_of_mine"
    for name in ("agents_of_mine", "broken"):
        sys.modules.pop(name, None)


def test_the_demo_agent_loads() -> None:
    assert load_agent("tricorn.chat.agents.demo:demo") is demo


@pytest.mark.parametrize("path", ["agent", "with_option", "partial_agent", "instance", "instance.method"])
async def test_whatever_is_async_and_takes_the_run_is_an_agent(module: str, path: str) -> None:
    agent: Any = load_agent(f"{module}:{path}")
    assert await agent(None) is None


@pytest.mark.parametrize("path", ["factory", "with_default", "Factory", "makes_one"])
async def test_what_is_not_async_and_takes_nothing_makes_the_agent(module: str, path: str) -> None:
    found: Any = load_agent(f"{module}:{path}")
    assert isinstance(found, AgentFactory)
    async with found.open() as agent:
        assert await agent(None) is None


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("agnet", "there is no agnet in agents_of_mine (agents_of_mine.py)"),
        ("instance.mehtod", "there is no instance.mehtod in agents_of_mine (agents_of_mine.py)"),
        ("nothing", "there is no nothing in agents_of_mine (agents_of_mine.py)"),
        ("number", "is of type int; TAKES"),
        ("plain", "is not async; TAKES (agents_of_mine.py, line 12)"),
        ("generator", "is an async generator; put @asynccontextmanager above it (agents_of_mine.py, line 11)"),
        ("Agent", "is not async; TAKES (agents_of_mine.py, line 17)"),
        ("of_two", "takes (run, city); TAKES (agents_of_mine.py, line 8)"),
        ("of_none", "takes (); TAKES (agents_of_mine.py, line 9)"),
        ("keyword", "takes (*, run); TAKES (agents_of_mine.py, line 10)"),
        ("factory_of_url", "takes (url); what makes an agent must take nothing (agents_of_mine.py, line 29)"),
        ("FactoryOfURL", "takes (url); what makes an agent must take nothing (agents_of_mine.py, line 36)"),
    ],
)
def test_what_is_not_an_agent(module: str, path: str, error: str) -> None:
    takes = f"must be an async function of one parameter, like: async def {path}(run)"
    with pytest.raises(SettingError) as raised:
        load_agent(f"{module}:{path}")
    assert str(raised.value) == f"--agent {module}:{path}: {error.replace('TAKES', takes)}"


@pytest.mark.parametrize(
    "name", ["", "agents_of_mine", ":agent", "agents_of_mine:", ".relative:agent", "my/agent.py:agent"]
)
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(SettingError) as raised:
        load_agent(name)
    example = "must be module:function, for example tricorn.chat.agents.demo:demo"
    assert str(raised.value) == f"--agent {name}: {example}"


@pytest.mark.parametrize(
    ("name", "missing"),
    [("no_such:agent", "no_such"), ("no_such.deeper:agent", "no_such"), ("tricorn.no_such:agent", "tricorn.no_such")],
)
def test_a_module_that_is_not_there(name: str, missing: str) -> None:
    with pytest.raises(SettingError) as raised:
        load_agent(name)
    assert str(raised.value) == f"--agent {name}: there is no module {missing} in this directory or installed"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import no_such", "ModuleNotFoundError: No module named 'no_such' (broken.py, line 1)"),
        ("\nraise ValueError('one\\ntwo')", "ValueError: one two (broken.py, line 2)"),
        ("raise SystemExit(3)", "SystemExit: 3 (broken.py, line 1)"),
        ("import tricorn\ntricorn.x", "AttributeError: module 'tricorn' has no attribute 'x' (broken.py, line 2)"),
        ("def", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("import trio\n\ntrio.run(None)", "TypeError: 'NoneType' object is not callable (broken.py, line 3)"),
    ],
)
def test_a_module_that_fails(module: str, tmp_path: Path, source: str, error: str) -> None:
    (tmp_path / "broken.py").write_text(source)
    invalidate_caches()
    with pytest.raises(SettingError) as raised:
        load_agent("broken:agent")
    assert str(raised.value) == f"--agent broken:agent: importing broken raised {error}"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("ws://localhost:8080/ws", "ws://localhost:8080/ws"),
        ("http://localhost:8080", "ws://localhost:8080/ws"),
        ("https://example.org/", "wss://example.org/ws"),
        ("wss://example.org/deep/chat?a=b#c", "wss://example.org/deep/chat?a=b"),
        ("ws://[::1]:80", "ws://[::1]:80/ws"),
    ],
)
def test_the_url_of_the_chat(text: str, url: str) -> None:
    assert websocket_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost:8080",
        "ftp://localhost",
        "ws://",
        "ws://h:70000",
        "ws://[::1",
        "ws://höst",
        "ws://h/a b",
        "ws://h:0",
        "ws://me@h",
    ],
)
def test_no_url(text: str) -> None:
    with pytest.raises(SettingError) as raised:
        websocket_url(text)
    assert str(raised.value) == f"URL {text}: must be a URL like ws://127.0.0.1:8080/ws"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["serve", "--bind", "8080"], "--bind 8080: must be HOST:PORT, for example 127.0.0.1:8080"),
        (["serve", "--agent", "no_such:agent"], "--agent no_such:agent: there is no module no_such in this directory"),
        (
            ["serve", "--agent", "tricorn.chat.agents.demo:demo", "--model", "m"],
            "--model m: there is an --agent as well; only one of them can answer",
        ),
        (["serve", "--model", "m"], "OPENAI_API_KEY: must be set, because https://api.openai.com/v1 asks for a key"),
        (["serve", "--model", ""], "model=: must be a name that is not empty"),
        (["serve", "--base-url", "http://127.0.0.1:1/v1"], "--base-url: needs a --model"),
        (["serve", "--system-prompt", "prompt.txt"], "--system-prompt: needs a --model"),
        (
            ["serve", "--model", "m", "--base-url", "127.0.0.1:1"],
            "base_url=127.0.0.1:1: must be a URL like https://api.example.com/v1",
        ),
        (
            ["serve", "--model", "m", "--base-url", "http://127.0.0.1:1/v1", "--system-prompt", "/no/such"],
            "system_prompt=/no/such: cannot be read: No such file or directory",
        ),
        (["chat", "localhost"], "URL localhost: must be a URL like ws://127.0.0.1:8080/ws"),
        (["chat", "--conversation", "a b"], "--conversation: must be 1 to 128 letters, digits, or any of . _ : ~ -"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_status_2(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"tricorn: {error}")
    assert output.err.count("\n") == 1


def test_text_of_others_cannot_steer_the_terminal() -> None:
    assert one_line("a\x1b[2J\x9b2J\x07\r\n\tb\x7f\x00ü") == "a[2J2J bü"


async def test_a_server_that_says_nothing(autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, trio.fail_after(60):
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}/ws"
        assert await chat(url, conversation="c", message="hello", raw=False) == 1
    assert capsys.readouterr() == ("", f"tricorn: {url}: no answer within 10 seconds\n")
