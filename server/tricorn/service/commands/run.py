"""`tricorn run`: serve a handler, without the chat."""

from __future__ import annotations

import os
import sys
from argparse import Namespace

from tricorn.server import run
from tricorn.service.bind import not_bound, parse_bind
from tricorn.service.loader import load_handler


def command(arguments: Namespace) -> int:
    """Serve the handler until SIGTERM or SIGINT. It is looked for in the current directory too."""
    sys.path.insert(0, os.getcwd())
    host, port = parse_bind(arguments.bind, "--bind ")
    handler = load_handler(arguments.handler)
    try:
        run(handler, port, host)
    except OSError as error:
        raise not_bound(error, host, port, "--bind ") from None
    return 0
