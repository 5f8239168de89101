"""`python -m bench.asyncio_version --bind 127.0.0.1:0 --loop uvloop`: serve the chat until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import sys
from argparse import ArgumentParser
from dataclasses import replace

import uvloop

from bench.asyncio_version.chat import make_chat
from bench.asyncio_version.server import Server
from tricorn.errors.report import send_records
from tricorn.listening.binds import parse_bind
from tricorn.service.settings import ServiceSettings
from tricorn.service.start_up import settle
from tricorn.settings import SettingError

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def main() -> int:
    """Exit status 2 is for what was asked wrongly, with one line on stderr."""
    parser = ArgumentParser(prog="python -m bench.asyncio_version", description="Serve the chat on asyncio.")
    parser.add_argument("--bind", metavar="HOST:PORT", help="where to listen; port 0 picks one (127.0.0.1:8080)")
    parser.add_argument("--loop", choices=LOOPS, default="asyncio", help="the event loop (%(default)s)")
    parser.add_argument("--agent", metavar="MODULE:FUNCTION", help="the agent that answers (the demo agent)")
    parser.add_argument("--auth", choices=["none"], help="none: let everybody in, without a token")
    arguments = parser.parse_args()
    send_records("stderr", "INFO")
    sys.path.insert(0, os.getcwd())  # where agents are looked for
    try:
        settings = ServiceSettings.from_environ()
        if arguments.bind is not None:
            host, port = parse_bind(arguments.bind, "--bind ")
            settings = replace(settings, host=host, port=port)
        if arguments.agent is not None:
            settings = replace(settings, agent=arguments.agent)
        if arguments.auth is not None:
            settings = replace(settings, auth=arguments.auth)
        with asyncio.Runner(loop_factory=LOOPS[arguments.loop]) as runner:
            runner.run(serve(settings))
    except (SettingError, OSError) as error:
        print(f"tricorn: {error}", file=sys.stderr)
        return 2
    return 0


async def serve(settings: ServiceSettings) -> None:
    """Serve the chat until a signal ends it."""
    async with make_chat(settings) as chat:
        settle()  # the garbage collector, as `tricorn serve` does
        await Server(chat).run()


if __name__ == "__main__":
    sys.exit(main())
