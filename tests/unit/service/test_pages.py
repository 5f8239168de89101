"""The pages as an ASGI application: what it answers, and that it needs nothing but what was read at import."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from typing import Any
from urllib.parse import urljoin

import pytest

from tricorn.service.pages import pages

Headers = dict[bytes, bytes]


async def run(scope: dict[str, Any], events: Iterable[str] = (), reason: str | None = None) -> list[dict[str, Any]]:
    """What the app sends for this scope, when it receives these events, and is not ready for this reason."""

    async def why_not_ready() -> str | None:
        return reason

    incoming = deque(events)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": incoming.popleft()}

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    await pages(why_not_ready)(scope, receive, send)
    assert not incoming
    return sent


async def ask(method: str, path: str, reason: str | None = None) -> tuple[int, Headers, bytes]:
    start, body = await run({"type": "http", "method": method, "path": path, "headers": []}, reason=reason)
    assert (start["type"], body["type"]) == ("http.response.start", "http.response.body")
    names = [name for name, _ in start["headers"]]
    assert len(set(names)) == len(names)
    return start["status"], dict(start["headers"]), body["body"]


@pytest.mark.parametrize(
    ("path", "content_type", "part"),
    [
        ("/", b"text/html; charset=utf-8", b"<!doctype html>"),
        ("/chat.css", b"text/css; charset=utf-8", b"prefers-reduced-motion"),
        ("/client.js", b"text/javascript; charset=utf-8", b"export class Client"),
        ("/healthz", b"application/json", b'{"status":"ok"}'),
        ("/readyz", b"application/json", b'{"status":"ok"}'),
    ],
)
async def test_get(path: str, content_type: bytes, part: bytes) -> None:
    status, headers, body = await ask("GET", path)
    assert status == 200
    assert part in body
    assert headers[b"content-type"] == content_type
    assert headers[b"content-length"] == str(len(body)).encode()
    assert headers[b"cache-control"] == b"no-cache"


async def test_why_it_is_not_ready_is_told_and_is_no_matter_of_health() -> None:
    status, headers, body = await ask("GET", "/readyz", "draining")
    assert (status, body) == (503, b'{"status":"draining"}')
    assert headers[b"content-type"] == b"application/json"
    assert await ask("HEAD", "/readyz", "draining") == (status, headers, b"")
    assert (await ask("POST", "/readyz", "draining"))[0] == 405
    assert (await ask("GET", "/healthz", "draining"))[0] == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/nowhere"])
async def test_head_is_get_without_the_body(path: str) -> None:
    status, headers, _ = await ask("GET", path)
    assert await ask("HEAD", path) == (status, headers, b"")


@pytest.mark.parametrize("path", ["/nowhere", "", "//", "/chat.html", "/pages.py", "/../pages.py", "/client.js/"])
async def test_no_such_page(path: str) -> None:
    status, headers, body = await ask("GET", path)
    assert (status, body) == (404, b"not found")
    assert headers[b"content-type"] == b"text/plain; charset=utf-8"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get"])
async def test_method_not_allowed(method: str) -> None:
    status, headers, _ = await ask(method, "/")
    assert status == 405
    assert headers[b"allow"] == b"GET, HEAD"


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/client.js"), ("GET", "/nowhere"), ("PUT", "/")])
async def test_every_answer_is_guarded(method: str, path: str) -> None:
    _, headers, _ = await ask(method, path)
    assert headers[b"x-content-type-options"] == b"nosniff"
    policy = headers[b"content-security-policy"].decode()
    assert headers[b"referrer-policy"] == b"no-referrer"
    assert headers[b"cross-origin-opener-policy"] == headers[b"cross-origin-resource-policy"] == b"same-origin"
    directives = dict(directive.strip().split(" ", 1) for directive in policy.split(";"))
    assert directives["frame-ancestors"] == directives["base-uri"] == directives["form-action"] == "'none'"
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"


async def test_the_page_keeps_to_its_own_policy() -> None:
    """No inline script or style, nothing from elsewhere, and every file that it names is there."""
    html = (await ask("GET", "/"))[2].decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", html)
    used = re.findall(r'(?:src|href)="([^"]+)"', html)
    for path in used:
        assert path.startswith("data:image/") or (await ask("GET", urljoin("/", path)))[0] == 200
    assert {"client.js", "chat.css"} < set(used)  # relative: a proxy may have a prefix before them


async def test_a_websocket_is_refused_before_it_is_accepted() -> None:
    assert await run({"type": "websocket", "path": "/ws"}, ["websocket.connect"]) == [{"type": "websocket.close"}]


async def test_lifespan() -> None:
    sent = await run({"type": "lifespan"}, ["lifespan.startup", "lifespan.shutdown"])
    assert [event["type"] for event in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
