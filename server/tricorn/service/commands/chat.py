"""`tricorn chat`: chat in this terminal."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import msgspec
import trio

from tricorn.chat.client.terminal import chat, websocket_url
from tricorn.chat.protocol import Id
from tricorn.service.settings import ServiceSettings
from tricorn.settings import SettingError


def command(arguments: Namespace) -> int:
    """Chat until the person leaves, or the message was answered."""
    url = websocket_url(arguments.url)
    try:
        conversation = msgspec.convert(arguments.conversation, Id)
    except msgspec.ValidationError:
        raise SettingError("--conversation: must be 1 to 128 letters, digits, or any of . _ : ~ -") from None
    token = ServiceSettings.from_environ().shown_token()
    return trio.run(
        partial(chat, url, conversation=conversation, message=arguments.message, raw=arguments.json, token=token)
    )
