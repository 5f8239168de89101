"""The error that happened is the one that is reported, and nobody but its own connection notices."""

from __future__ import annotations

import json

import pytest
import trio
from trio_websocket import ConnectionClosed, wrap_client_stream

import tricorn


async def fragile(ws: tricorn.WebSocket) -> None:
    async for message in ws:
        if message == "fail":
            raise LookupError("the first error")
        await ws.send(message)


async def test_a_handler_that_raises(nursery: trio.Nursery, capfd: pytest.CaptureFixture[str]) -> None:
    server = await nursery.start(tricorn.serve, fragile, 0)
    [(host, port)] = server.addresses
    with trio.fail_after(30):
        async with await trio.open_tcp_stream(host, port) as one, await trio.open_tcp_stream(host, port) as another:
            failing = await wrap_client_stream(nursery, one, host, "/")
            other = await wrap_client_stream(nursery, another, host, "/")
            await failing.send_message("fail")
            with pytest.raises(ConnectionClosed) as closed:
                await failing.get_message()
            await other.send_message("still here")
            assert await other.get_message() == "still here"
            await other.aclose()
    reason = closed.value.reason
    assert reason is not None
    assert reason.code == 1011
    records = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    [record] = [record for record in records if "stack_trace" in record]
    assert record["error_id"] == reason.reason
    assert "LookupError: the first error" in record["stack_trace"]
    nursery.cancel_scope.cancel()
