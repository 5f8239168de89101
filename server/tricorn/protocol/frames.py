"""Frames as a server sends them (RFC 6455 §5), Sans-I/O: stateless, one call for each."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

from tricorn.protocol.close import NO_STATUS, Close


class Opcode(IntEnum):
    """RFC 6455 §5.2."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


MAX_CONTROL_PAYLOAD = 125  # RFC 6455 §5.5
RSV1 = 0x40  # a compressed message begins, RFC 7692 §6

FIN = 0x80

_header16 = Struct("!BBH").pack
_header64 = Struct("!BBQ").pack
_SHORT_HEADERS = {
    first: [bytes((FIN | first, size)) for size in range(126)]
    for first in (*Opcode, RSV1 | Opcode.TEXT, RSV1 | Opcode.BINARY)
}


def frame(opcode: int, payload: bytes) -> bytes:
    """Return one whole unmasked frame, its length in the shortest form (RFC 6455 §5.2). `opcode` may include `RSV1`."""
    size = len(payload)
    if size < 126:
        return _SHORT_HEADERS[opcode][size] + payload
    if size < 1 << 16:
        return _header16(FIN | opcode, 126, size) + payload
    return _header64(FIN | opcode, 127, size) + payload


def fragment(opcode: int, payload: bytes, *, last: bool) -> bytes:
    """Return one frame of a fragmented message (RFC 6455 §5.4)."""
    whole = frame(opcode, payload)
    return whole if last else bytes((whole[0] & ~FIN,)) + whole[1:]


def close_frame(close: Close) -> bytes:
    """Return a close frame. A reason that is too long is cut at a character (RFC 6455 §5.5.1)."""
    if close.code == NO_STATUS:
        return frame(Opcode.CLOSE, b"")
    reason = close.reason.encode()[: MAX_CONTROL_PAYLOAD - 2].decode(errors="ignore").encode()
    return frame(Opcode.CLOSE, close.code.to_bytes(2, "big") + reason)
