"""Pages that want what is not theirs, in a real browser."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, check_output

import pytest
from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.any_server

SECRET = "a secret of thirty-two bytes or more"
CONNECT = """([url, protocols]) => new Promise(resolve => {
    const ws = new WebSocket(url, protocols);
    ws.onmessage = ({data}) => resolve(JSON.parse(data).type);
    ws.onclose = ({code}) => resolve(code);
})"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


Serving = Callable[..., AbstractContextManager[int]]


@pytest.fixture
def serving(serve: list[str]) -> Serving:
    """`with serving(**environ) as port`."""

    @contextmanager
    def serving(**environ: str) -> Iterator[int]:
        command = [*serve, "--bind", "127.0.0.1:0"]
        with Popen(command, stdout=PIPE, stderr=DEVNULL, text=True, env={**os.environ, **environ}) as process:
            try:
                address = re.search(r":(\d+)\n", process.stdout.readline() if process.stdout else "")
                assert address
                yield int(address[1])
            finally:
                process.terminate()
                process.wait(20)

    return serving


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    yield context.new_page()
    context.close()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[str]:
    """The address of a page on another origin."""
    (tmp_path / "index.html").write_text("<!doctype html><title>Elsewhere</title>")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_page_of_another_origin_gets_nothing(page: Page, serving: Serving, elsewhere: str) -> None:
    with serving() as port:
        page.goto(elsewhere)
        assert page.evaluate(CONNECT, [f"ws://127.0.0.1:{port}/ws", ["tricorn.v1"]]) == 1006
        page.goto(f"http://127.0.0.1:{port}/healthz")
        page.goto("about:blank")  # whose origin is null
        assert page.evaluate(CONNECT, [f"ws://127.0.0.1:{port}/ws", ["tricorn.v1"]]) == 1006


def test_a_page_of_a_listed_origin_comes_in(page: Page, serving: Serving, elsewhere: str) -> None:
    with serving(TRICORN_ORIGINS=elsewhere) as port:
        page.goto(elsewhere)
        assert page.evaluate(CONNECT, [f"ws://127.0.0.1:{port}/ws", ["tricorn.v1"]]) == "welcome"


def test_a_name_that_was_made_to_lead_here_gets_nothing(page: Page, serving: Serving) -> None:
    """DNS rebinding: to the browser it is one origin, so only the name gives it away."""
    with serving() as port:
        page.goto(f"http://rebound.example:{port}/")
        expect(page.get_by_role("status")).to_contain_text("Closed")


def test_a_browser_brings_its_token_as_a_subprotocol(page: Page, serving: Serving) -> None:
    make = [sys.executable, "-m", "tricorn", "token", "--user", "ada"]
    token = check_output(make, env={**os.environ, "TRICORN_JWT_KEY": SECRET}, text=True).strip()
    with serving(TRICORN_JWT_KEY=SECRET) as port:
        page.goto(f"http://127.0.0.1:{port}/")
        page.evaluate("sessionStorage.setItem('tricorn.token', 'x.y.z')")
        page.reload()
        expect(page.get_by_role("status")).to_have_text("Closed (the token is not valid)")
        page.evaluate("token => sessionStorage.setItem('tricorn.token', token)", token)
        page.reload()
        expect(page.get_by_role("status")).to_have_text("Connected")
        page.get_by_label("Your message").fill("1+1")
        page.get_by_label("Your message").press("Enter")
        expect(page.locator(".answer")).to_have_text("1+1 = 2")
        assert token not in page.url
