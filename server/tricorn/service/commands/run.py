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
from tricorn.listening.binds import listen
from tricorn.listening.site import Site
from tricorn.server import Server, serve_until_signal
from tricorn.service.bind import bind_or_explain, parse_bind, show_address
from tricorn.service.loader import load_handler
from tricorn.settings import Settings

if TYPE_CHECKING:
    from tricorn.websocket import Handler


def command(arguments: Namespace) -> int:
    """Serve until SIGTERM or SIGINT. The handler or application is looked for in the current directory too."""
    send_records("stderr", "INFO")  # before the module is imported, which may choose otherwise
    host, port = parse_bind(arguments.bind, "--bind ")
    handler = load_handler(arguments.handler)
    try:
        trio.run(_serve, handler, host, port)
    except* LifespanFailureError as errors:
        report_error(errors)
        *_, problem = str(innermost(errors)).strip("\n'").splitlines()  # frameworks send a traceback
    else:
        return 0
    print(f"tricorn: run {arguments.handler}: the application did not start up: {problem}", file=sys.stderr)
    return 1


async def _serve(handler: Handler | AsgiHandler, host: str, port: int) -> None:
    settings = Settings()
    server = Server(Site(handler, settings), await bind_or_explain(listen, host, port, "--bind "))
    scheme = "http" if isinstance(handler, AsgiHandler) else "ws"
    async with exit_in_time(settings.drain_timeout) as last_resort:
        await serve_until_signal(server, last_resort, task_status=_Announcement(scheme))


class _Announcement(trio.TaskStatus[Server]):
    """Prints the address when the server listens, and unlike `nursery.start` allows that it never does."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme

    def started(self, value: Server | None = None) -> None:
        if value is not None:
            print(f"Tricorn is listening on {self._scheme}://{show_address(value.addresses[0])}", flush=True)
