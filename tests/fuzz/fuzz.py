"""Coverage-guided fuzzing of what reads bytes of strangers, by atheris (libFuzzer).

    python tests/fuzz/fuzz.py codec -max_total_time=600 tests/fuzz/corpus/codec
    python tests/fuzz/fuzz.py handshake -max_total_time=600 tests/fuzz/corpus/handshake

Whatever comes, nothing may raise but what says so, and cutting the bytes elsewhere may change nothing. Of frames,
`websockets` must have the same opinion, or a known reason for another.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tricorn.protocol"]):
    from tricorn.protocol.deflate import Agreement, Inflater, negotiate
    from tricorn.protocol.handshake import (
        Head,
        accept,
        check_origin,
        check_upgrade,
        choose_subprotocol,
        offered_extensions,
        refuse,
        wants_websocket,
    )
    from tricorn.protocol.receiver import Receiver

from tricorn.protocol.close import INVALID_DATA, TOO_BIG
from tricorn.request import Accept, Refuse

sys.path.append(str(Path(__file__).parents[1]))
from fixtures.frames import parse
from fixtures.second_opinion import difference

LIMIT = 4096
AGREEMENT = Agreement(server_takeover=True, client_takeover=True, server_bits=12, client_bits=15)


def codec(data: bytes) -> None:
    """The first byte says whether messages may be compressed, and the second where the rest is cut."""
    deflate, cut, stream = data[:1] > b"\x7f", data[1:2], data[2:]
    at = len(stream) * (cut[0] if cut else 0) // 256
    *whole, flaw = _receive(deflate, stream)
    *pieces, other = _receive(deflate, stream[:at], stream[at:])
    if {flaw, other} != {TOO_BIG, INVALID_DATA} or not deflate:  # inflated whole, what is bad may first be too long
        assert (whole, flaw) == (pieces, other)
    difference(parse(stream), LIMIT, AGREEMENT if deflate else None)


def _receive(deflate: bool, *reads: bytes) -> tuple[object, ...]:
    receiver = Receiver(LIMIT, Inflater(AGREEMENT) if deflate else None)
    messages = [message for read in reads for message in receiver.receive_data(read)]
    assert all(len(message) <= LIMIT for message in messages)
    assert receiver.closed is None or receiver.violation is None
    code = None if receiver.violation is None else receiver.violation.code
    return messages, receiver.pings, receiver.closed, code


def handshake(data: bytes) -> None:
    at = len(data) * data[0] // 256 if data else 0
    assert _answer(data) == _answer(*filter(None, (data[:at], data[at:])))  # what is empty is the end of a stream


def _answer(*reads: bytes) -> bytes | None:
    head = Head(LIMIT)
    try:
        request = None
        for read in reads:
            if request is None and not head.is_http2:
                request = head.receive_data(read)
        if request is None or not wants_websocket(request):
            return None
        check_upgrade(request)
        check_origin(request, ())
        agreement = negotiate(offered_extensions(request), takeover=True)
        accepted = Accept(choose_subprotocol(request, ("tricorn.v1",)))
        return accept(request, accepted, agreement.header() if agreement else None)
    except Refuse as refused:
        return refuse(refused, head)[:12]  # the status: which of several faults is told may depend on what came first


if __name__ == "__main__":
    target = {"codec": codec, "handshake": handshake}[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
