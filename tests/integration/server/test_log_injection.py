"""Whatever a peer or a handler says, a record is one line of JSON, and nothing in it moves a terminal's cursor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import quote

import pytest

from tricorn import WebSocket

Serving = Callable[..., AbstractAsyncContextManager[Any]]

FORGED = '\n{"severity":"INFO","message":"all is well"}\n'
CONTROLS = "".join(map(chr, (*range(32), *range(127, 160)))) + "\u2028\u2029"
EVIL = FORGED + CONTROLS + "\x1b[2J\x9b31m"


def records(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    written = capfd.readouterr().err
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", written) is None
    return [json.loads(line) for line in written.removesuffix("\n").split("\n")]


async def test_a_path_and_headers(served: Serving, capfd: pytest.CaptureFixture[str]) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.receive()

    evil_headers = {"traceparent": "00-\x9b31m", "X-Cloud-Trace-Context": "a" * 5000, "User-Agent": "\x9b2J"}
    async with served(handler) as server, server.open() as stream:
        client = server.client(stream, "/" + quote(EVIL))
        head = client.request().removesuffix(b"\r\n")
        more = "".join(f"{name}: {value}\r\n" for name, value in evil_headers.items())
        await stream.send_all(head + more.encode("latin-1") + b"\r\n")
        await client.handshake()
        await client.close()
        await client.closed()
    assert [record["message"] for record in records(capfd)] == ["connection closed"]


class Unshowable:
    def __repr__(self) -> str:
        raise SystemExit


HOSTILE = {
    "names of ours": {
        "code": 1,
        "phase": 2,
        "error": 3,
        "message": EVIL,
        "error_id": EVIL,
        "severity": "INFO",
        "context": 4,
    },
    "no names": {5: EVIL, None: 1, (1, EVIL): 2},
    "unshowable": {"value": Unshowable(), Unshowable(): "key"},
    "huge": {EVIL * 1000: EVIL * 1000},
    "no mapping": Unshowable(),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
async def test_a_context(hosted: Serving, hostile: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Rule E10: the error is the one that happened, its id reaches the peer, and the end is told of."""

    async def handler(ws: WebSocket) -> None:
        if isinstance(hostile, dict):
            ws.context.update(hostile)
        else:
            ws._connection.context = hostile  # which a handler cannot do by mistake
        raise LookupError("the first error")

    async with hosted(handler) as server, server.connect() as client:
        code, reason = await client.closed()
    error, end = records(capfd)
    assert (code, reason) == (1011, error["error_id"])
    assert (error["severity"], error["message"], error["phase"]) == ("ERROR", "LookupError: the first error", "open")
    assert (end["severity"], end["message"], end["code"]) == ("WARNING", "connection closed", 1011)
    assert end["error_id"] == reason
    assert error["connection"] == end["connection"]
    assert error["context"] == end["context"]


async def test_a_head_that_is_none(served: Serving, capfd: pytest.CaptureFixture[str]) -> None:
    async with served(lambda ws: None) as server:
        for head in (b"\x1b[2J\r\n\r\n", b"GET /\x9b HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nA: \x1b[2J\r\n\r\n"):
            async with server.open() as stream:
                await stream.send_all(head)
                answer = b"".join([part async for part in stream])
                assert answer.startswith(b"HTTP/1.1 400 ")
                assert b"\x1b" not in answer
                assert b"\x9b" not in answer
    assert capfd.readouterr().err == ""


async def test_a_close_reason(served: Serving, capfd: pytest.CaptureFixture[str]) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.receive()

    async with served(handler) as server, server.connect() as client:
        await client.close(4000, FORGED + "\x1b[2J\x9b31m")
        await client.closed()
    assert [record["message"] for record in records(capfd)] == ["connection closed"]


async def test_an_error_of_which_the_peer_gets_nothing_but_the_id(
    served: Serving, capfd: pytest.CaptureFixture[str]
) -> None:
    async def handler(ws: WebSocket) -> None:
        raise RuntimeError(EVIL + await ws.receive())

    async with served(handler) as server, server.connect() as client:
        await client.send(EVIL + "of the peer's")
        code, reason = await client.closed()
    error, *_ = records(capfd)
    assert (code, reason) == (1011, error["error_id"])
    assert re.fullmatch("[0-9a-f]{8}", reason)
    assert "of the peer's" in error["message"]
