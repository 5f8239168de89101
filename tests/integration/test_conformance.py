"""RFC 6455 and RFC 7692 as judged by a suite that nobody here wrote: kosoku, with the cases of Autobahn's test suite.

Each case is run on a plain connection, inside TLS, and on a connection that has asked for a page before. The suite can
do only the first: for the others a proxy does what comes before the upgrade.

The 216 cases of compression send a thousand messages each, which takes minutes; here they send 20. In full:

    pytest tests/integration/test_conformance.py --all-messages
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from fixtures.handlers import echo
from fixtures.hosts import Host, enter, native, native_kept_alive, native_tls
from tricorn import Settings

SETTINGS = Settings(max_message_bytes=2**24, deflate="takeover")  # the limit is what the largest case sends
SUITE = """
import asyncio
import sys

from kosoku import _caseindex, _cli

build_index = _caseindex.build_index

def build_smaller_index(*arguments):
    cases, groups = build_index(*arguments)
    for name, case in cases.items():
        if name.startswith(("12.", "13.")):
            assert case.COUNT == 1000
            case.COUNT = int(messages)
    return cases, groups

messages = sys.argv.pop(1)
_caseindex.build_index = build_smaller_index
asyncio.run(_cli.amain())
"""
CASES = 517  # all of the pinned version


async def forward(host: Host, port: int, client: trio.SocketStream) -> None:
    """Pass on what a client and a host say to each other, after what comes before the upgrade."""

    async def copy(source: trio.SocketStream, target: trio.SocketStream) -> None:
        try:
            async for data in source:
                await target.send_all(data)
            await target.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            nursery.cancel_scope.cancel()

    async with client, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        server = await enter(host, stream)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy, client, server)
            nursery.start_soon(copy, server, client)


@pytest.mark.parametrize("host", [native, native_tls, native_kept_alive])
async def test_every_case_is_ok(
    host: Host, tmp_path: Path, pytestconfig: pytest.Config, record_property: Callable[[str, object], None]
) -> None:
    messages = "1000" if pytestconfig.getoption("--all-messages") else "20"
    async with trio.open_nursery() as nursery:
        port = await nursery.start(partial(host, echo, settings=SETTINGS))
        if host is not native:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, partial(forward, host, port), [listener])
            port = listener.socket.getsockname()[1]
        suite = sys.executable, "-c", SUITE, messages, "-m", "fuzzingclient", "-o", tmp_path
        await trio.run_process([*suite, f"127.0.0.1:{port}"], check=False)
        nursery.cancel_scope.cancel()
    (cases,) = json.loads((tmp_path / "index.json").read_text()).values()
    verdicts = {case: (verdict["behavior"], verdict["behaviorClose"]) for case, verdict in cases.items()}
    assert {case: both for case, both in verdicts.items() if not {*both} <= {"OK", "INFORMATIONAL"}} == {}
    assert len(verdicts) == CASES
    counts = Counter(behavior for behavior, _ in verdicts.values())
    told = ", ".join(f"{count} {behavior}" for behavior, count in counts.items())
    record_property("conformance", f"{host.__name__}: {CASES} cases: {told}")
