"""The chat page, its style, its client, `/healthz` and `/readyz`, as an ASGI 3.0 application.

All files are read when this module is imported: answering touches no disk and cannot fail for a missing file.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from importlib.resources import files
from typing import Any

from msgspec.json import encode

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]
WhyNotReady = Callable[[], Awaitable[str | None]]

TEXT = b"text/plain; charset=utf-8"
JSON = b"application/json"

# Nothing but the page's own two files and its own WebSocket; the icon is a data: URL in the page.
CONTENT_SECURITY_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _status(text: str) -> tuple[bytes, bytes]:
    return JSON, encode({"status": text})


def _page(name: str, content_type: bytes) -> tuple[bytes, bytes]:
    return content_type, files(__package__).joinpath(name).read_bytes()


PAGES = {
    "/": _page("chat.html", b"text/html; charset=utf-8"),
    "/chat.css": _page("chat.css", b"text/css; charset=utf-8"),
    "/client.js": _page("client.js", b"text/javascript; charset=utf-8"),
    "/healthz": _status("ok"),  # the loop turns, or else nobody would say so
}
READY = "/readyz"


def pages(why_not_ready: WhyNotReady) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The application. `why_not_ready` is asked at each `/readyz`: None is 200, a reason is told with 503."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """Answer GET and HEAD for `PAGES` and `READY`, and refuse every WebSocket, which an ASGI server turns into 403.

        Waits only in `receive`, `send` and `why_not_ready`, so it is a checkpoint where they are; when cancelled, it
        leaves nothing behind.
        """
        match scope["type"]:
            case "http":
                await _answer(scope["method"], scope["path"], send, why_not_ready)
            case "websocket":
                await receive()
                await send({"type": "websocket.close"})
            case "lifespan":
                await _live(receive, send)

    return app


async def _answer(method: str, path: str, send: Send, why_not_ready: WhyNotReady) -> None:
    if path not in PAGES and path != READY:
        await respond(send, method, 404, TEXT, b"not found")
    elif method not in ("GET", "HEAD"):
        await respond(send, method, 405, TEXT, b"method not allowed", [(b"allow", b"GET, HEAD")])
    elif path == READY:
        reason = await why_not_ready()
        await respond(send, method, 200 if reason is None else 503, *_status(reason or "ok"))
    else:
        await respond(send, method, 200, *PAGES[path])


async def respond(
    send: Send, method: str, status: int, content_type: bytes, body: bytes, more_headers: Headers = ()
) -> None:
    """Answer with headers that let a page do nothing but what ours does; without the body where it is HEAD."""
    headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-cache"),
        (b"content-security-policy", CONTENT_SECURITY_POLICY),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
        *more_headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body})


async def _live(receive: Receive, send: Send) -> None:
    """There is nothing to start and nothing to stop: say so. Returns after `lifespan.shutdown`."""
    phase = ""
    while phase != "lifespan.shutdown":
        phase = (await receive())["type"]
        await send({"type": f"{phase}.complete"})
