"""`tricorn run`: serve a handler or an ASGI application, without the chat."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

import trio
from hypercorn.utils import LifespanFailureError

from tricorn.asgi_handler import AsgiHandler
from tricorn.errors.last_resort import exit_in_time
from tricorn.errors.reason import innermost
from tricorn.errors.report import report_error, send_records
from tricorn.listening.binds import check_bind, listen_on
from tricorn.listening.site import Site
from tricorn.server import Server, serve_until_signal
from tricorn.service.bind import bind_or_explain, show_urls
from tricorn.service.loader import load_handler
from tricorn.service.systemd import ALL, expand, notify
from tricorn.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tricorn.websocket import Handler


def command(arguments: Namespace) -> int:
    """Serve until SIGTERM or SIGINT. The handler or application is looked for in the current directory too."""
    send_records("stderr", "INFO")  # before the module is imported, which may choose otherwise
    for each in arguments.bind or ():
        if each != ALL:
            check_bind(each, "--bind ")
    binds = expand(arguments.bind or (), "127.0.0.1:8080")
    handler = load_handler(arguments.handler)
    try:
        trio.run(_serve, handler, binds)
    except* LifespanFailureError as errors:
        report_error(errors)
        *_, problem = str(innermost(errors)).strip("\n'").splitlines()  # frameworks send a traceback
    else:
        return 0
    print(f"tricorn: run {arguments.handler}: the application did not start up: {problem}", file=sys.stderr)
    return 1


async def _serve(handler: Handler | AsgiHandler, binds: Sequence[str]) -> None:
    settings = Settings()
    listeners = await bind_or_explain(lambda each: listen_on([each]), binds)
    server = Server(Site(handler, settings), listeners, drain=_stopping)
    scheme = "http" if isinstance(handler, AsgiHandler) else "ws"
    async with exit_in_time(settings.drain_timeout) as last_resort:
        await serve_until_signal(server, last_resort, task_status=_Announcement(scheme))


async def _stopping() -> None:
    notify("STOPPING=1")


class _Announcement(trio.TaskStatus[Server]):
    """Prints the addresses when the server listens, and unlike `nursery.start` allows that it never does."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme

    def started(self, value: Server | None = None) -> None:
        if value is not None:
            print(f"Tricorn is listening on {show_urls(self._scheme, value.addresses)}", flush=True)
            notify("READY=1")
