"""A person with a browser: Chromium, the page and the server, each as what it is."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Protocol

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, WebSocketRoute, expect

from fixtures.ports import port_that_stays_free

pytestmark = pytest.mark.any_server

MARKUP = "<img src=x onerror=\"document.title='broken in'\">"


class Serving(Protocol):
    def __call__(self, bind: str = ..., status: int = ...) -> AbstractContextManager[str]: ...


@pytest.fixture(scope="module")
def serving(serve: list[str]) -> Serving:
    """A server until the end of the block, where SIGTERM ends it with this status. Gives its address."""

    @contextmanager
    def serving(bind: str = "127.0.0.1:0", status: int = 0) -> Iterator[str]:
        with Popen([*serve, "--bind", bind], stdout=PIPE, text=True) as process:
            try:
                line = process.stdout.readline() if process.stdout else ""
                address = re.search(r"http://[^\s/]+", line)
                assert address, f"no address in {line!r}"
                yield address[0]
            finally:
                process.terminate()
                process.wait(20)
        assert process.returncode == status

    return serving


def kill_server(log: str) -> None:
    """Kill the `tricorn serve` that has this log."""
    for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        if f"TRICORN_LOG={log}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(scope="module")
def address(serving: Serving) -> Iterator[str]:
    with serving() as address:
        yield address


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser's profile. No page in it may have a script that fails."""
    context = browser.new_context()
    failures: list[object] = []
    context.on("weberror", lambda error: failures.append(error.error))
    yield context
    context.close()
    assert not failures


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


def visit(page: Page, address: str) -> None:
    page.goto(address)
    connected(page)


def connected(page: Page) -> None:
    expect(page.get_by_role("status")).to_have_text("Connected")


def write(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


def run(page: Page) -> Locator:
    """The agent's last run."""
    return page.get_by_role("log").locator(".run").last


def ended(run: Locator) -> None:
    expect(run).to_have_attribute("aria-busy", "false")


def test_a_person_sees_the_agent_work_as_it_goes(page: Page, address: str) -> None:
    visit(page, address)
    expect(page.get_by_text("The demo agent understands")).to_be_visible()
    write(page, "12*(7+5)^2")
    expect(page.locator(".message > p")).to_have_text("12*(7+5)^2")
    expect(page.get_by_text("The demo agent understands")).to_be_hidden()
    expect(run(page).locator("h3")).to_have_text("demo")
    expect(run(page).locator(".thinking")).not_to_be_empty()
    expect(run(page).locator(".tool h4")).to_have_text("calculate")
    expect(run(page).locator(".tool dl")).to_have_text("expression12*(7+5)^2")
    expect(run(page).locator(".tool .result")).to_have_text("1728")
    expect(run(page).locator(".tool .status")).to_have_text(re.compile(r"^done · \d+ ms$"))
    expect(run(page).locator(".answer")).to_have_text("12*(7+5)^2 = 1728")
    ended(run(page))
    assert run(page).locator(".answer").evaluate("answer => answer.childNodes.length") > 1  # it came in pieces
    expect(run(page).locator(".outcome")).to_have_count(0)
    assert run(page).evaluate("run => [...run.children].map(part => part.className)") == [
        "",
        "thinking",
        "tool",
        "answer",
    ]


def test_a_reload_shows_the_same_conversation_once(page: Page, address: str) -> None:
    visit(page, address)
    write(page, "reverse tricorn")
    ended(run(page))
    write(page, "12*(7+5)^2")
    expect(page.locator(".run")).to_have_count(2)
    ended(run(page))
    before = page.get_by_role("log").inner_text()
    page.reload()
    expect(page.locator(".run[aria-busy=false]")).to_have_count(2)
    assert page.get_by_role("log").inner_text() == before


@pytest.mark.parametrize("how", ["button", "key"])
def test_a_run_can_be_stopped(page: Page, address: str, how: str) -> None:
    visit(page, address)
    write(page, "slow 60")
    expect(run(page).locator(".tool .status")).to_have_text("running")
    stop = page.get_by_role("button", name="Stop")
    if how == "button":
        stop.click()
    else:
        page.keyboard.press("Escape")
    expect(run(page).locator(".tool .status")).to_have_text(re.compile("^failed"))
    expect(run(page).locator(".outcome")).to_have_text(re.compile("^Stopped"))
    ended(run(page))
    expect(stop).to_be_hidden()


def test_two_pages_share_a_conversation(context: BrowserContext, page: Page, address: str) -> None:
    visit(page, address)
    other = context.new_page()
    visit(other, page.url)
    write(page, "slow 60")
    expect(run(other).locator(".tool .status")).to_have_text("running")
    other.get_by_role("button", name="Stop").click()
    expect(run(page).locator(".outcome")).to_have_text(re.compile("^Stopped"))
    write(other, "12*(7+5)^2")
    for each in (page, other):
        expect(each.locator(".message > p")).to_have_text(["slow 60", "12*(7+5)^2"])
        expect(run(each).locator(".answer")).to_have_text("12*(7+5)^2 = 1728")


def test_other_conversations_hear_nothing_of_it(context: BrowserContext, page: Page, address: str) -> None:
    visit(page, address)
    other = context.new_page()
    visit(other, address)
    for each, text in ((page, "1+1"), (other, "2+2")):
        write(each, text)
        ended(run(each))
    expect(page.locator(".message > p")).to_have_text(["1+1"])
    expect(other.locator(".message > p")).to_have_text(["2+2"])


def test_a_run_goes_on_while_the_connection_is_cut(page: Page, address: str) -> None:
    connections: list[tuple[WebSocketRoute, WebSocketRoute]] = []
    page.route_web_socket(re.compile(r"/ws$"), lambda ws: connections.append((ws, ws.connect_to_server())))
    visit(page, address)
    write(page, "slow 60")
    expect(run(page).locator(".tool .status")).to_have_text("running")
    for end in connections[0]:
        end.close(code=4000, reason="cut")
    expect(page.get_by_role("status")).to_have_text("Reconnecting… (cut)")
    connected(page)
    assert len(connections) == 2
    page.get_by_role("button", name="Stop").click()
    expect(run(page).locator(".outcome")).to_have_text(re.compile("^Stopped"))
    expect(page.locator(".run")).to_have_count(1)
    expect(page.locator(".message")).to_have_count(1)


def test_what_is_written_while_the_server_is_away_is_answered_when_it_is_back(page: Page, serving: Serving) -> None:
    bind = f"127.0.0.1:{port_that_stays_free()}"
    with serving(bind) as address:
        visit(page, address)
        write(page, "slow 60")
        expect(run(page).locator(".tool .status")).to_have_text("running")
    expect(page.get_by_role("status")).to_have_text(re.compile("^Reconnecting"))
    expect(run(page).locator(".outcome")).to_have_text(re.compile("^The server stopped before the agent was done"))
    write(page, "12*(7+5)^2")
    expect(page.locator(".message[data-state=sending] > p")).to_have_text("12*(7+5)^2")
    with serving(bind):
        expect(page.get_by_role("status")).to_have_text("Connected", timeout=30_000)
        expect(run(page).locator(".answer")).to_have_text("12*(7+5)^2 = 1728")
        expect(page.locator(".message[data-state=sent] > p").last).to_have_text("12*(7+5)^2")
        page.close()


@pytest.mark.not_asyncio("it has no log that outlives the process")
def test_the_page_goes_on_after_the_server_was_killed(
    page: Page, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-answer, by SIGKILL; the next process has the same log, and goes on with what waits."""
    log = f"sqlite:///{tmp_path}/log.db"
    monkeypatch.setenv("TRICORN_LOG", log)
    bind = f"127.0.0.1:{port_that_stays_free()}"
    with serving(bind, -signal.SIGKILL) as address:
        visit(page, address)
        write(page, "slow 60")
        expect(run(page).locator(".tool .status")).to_have_text("running")
        write(page, "12*(7+5)^2")
        expect(page.locator(".message[data-state=sent]")).to_have_count(2)
        kill_server(log)
        expect(page.get_by_role("status")).to_have_text(re.compile("^Reconnecting"))
    with serving(bind):
        expect(page.get_by_role("status")).to_have_text("Connected", timeout=30_000)
        expect(page.locator(".run").first.locator(".outcome")).to_have_text(re.compile("^The server stopped before"))
        expect(page.locator(".run").last.locator(".answer")).to_have_text("12*(7+5)^2 = 1728")
        expect(page.locator(".message > p")).to_have_text(["slow 60", "12*(7+5)^2"])
        page.close()


def test_markup_is_shown_as_what_was_written(page: Page, address: str) -> None:
    visit(page, address)
    write(page, f"count the words in {MARKUP}")
    ended(run(page))
    expect(page.locator(".message > p")).to_have_text(f"count the words in {MARKUP}")
    expect(run(page).locator(".tool dl")).to_contain_text(MARKUP)
    expect(page.locator("body img")).to_have_count(0)
    expect(page).to_have_title("Tricorn chat")
