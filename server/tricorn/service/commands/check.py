"""`tricorn check`: check a server that is deployed."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from json import dumps

import trio

from tricorn.chat.client.terminal import websocket_url
from tricorn.service.checks import Result, check
from tricorn.service.settings import ServiceSettings
from tricorn.settings import SettingError, decimal


def command(arguments: Namespace) -> int:
    """Print a row for each check, as soon as it is done. Return 0 if all are ok, else 1."""
    url = websocket_url(arguments.url)
    timeout = _seconds(arguments.timeout)
    token = ServiceSettings.from_environ().shown_token()
    tell: Callable[[Result], None] = _print_json if arguments.json else _print_row
    if not arguments.json:
        print(f"{'check':16}  {'result':7}  {'seconds':>7}  detail", flush=True)
    return 0 if trio.run(partial(check, url, token, timeout, tell)) else 1


def _seconds(text: str) -> float:
    try:
        seconds = decimal(text)
    except ValueError:
        seconds = 0.0
    if not seconds:
        raise SettingError(f"--timeout {text}: must be a number of seconds above 0")
    return seconds


def _print_row(result: Result) -> None:
    print(f"{result.check:16}  {result.outcome:7}  {result.seconds:7.2f}  {result.detail}", flush=True)


def _print_json(result: Result) -> None:
    rounded = replace(result, seconds=round(result.seconds, 3))
    print(dumps(asdict(rounded), ensure_ascii=False, separators=(",", ":")), flush=True)
