"""permessage-deflate, RFC 7692, for the server's side of a connection, Sans-I/O: what is agreed on, and both ways.

An `Inflater` is given to a `Receiver`; a `Deflater` makes frames as `frame` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from zlib import DEFLATED, Z_SYNC_FLUSH, compressobj, decompressobj

from tricorn.protocol.frames import RSV1, Opcode, fragment, frame

if TYPE_CHECKING:
    from collections.abc import Sequence
    from zlib import _Compress, _Decompress

    from tricorn.protocol.handshake import Offer

NAME = "permessage-deflate"

# What `websockets` found best for small messages: nearly the ratio of zlib's own choice, for an eighth of its memory.
WINDOW_BITS = 12
MEMORY_LEVEL = 5
LEVEL = 1  # events of a chat get 1 % smaller on level 6, and large messages hold up the others for twice as long

_MAX_BITS = 15
_BITS = {str(bits): bits for bits in range(8, _MAX_BITS + 1)}
_EMPTY_BLOCK = b"\x00\x00\xff\xff"  # its end, which is not sent (RFC 7692 §7.2.1)
_STEP = 256  # bytes


class Agreement(NamedTuple):
    """What both sides agreed on: whether each remembers its earlier messages, and its window in bits."""

    server_takeover: bool
    client_takeover: bool
    server_bits: int
    client_bits: int

    def header(self) -> str:
        """The value of Sec-WebSocket-Extensions in the response. A window of 15 bits needs no word."""
        parameters = (
            ("server_no_context_takeover", not self.server_takeover),
            ("client_no_context_takeover", not self.client_takeover),
            (f"server_max_window_bits={self.server_bits}", self.server_bits < _MAX_BITS),
            (f"client_max_window_bits={self.client_bits}", self.client_bits < _MAX_BITS),
        )
        return "; ".join([NAME, *(parameter for parameter, said in parameters if said)])


def negotiate(offers: Sequence[Offer], *, takeover: bool) -> Agreement | None:
    """Agree on the first offer of permessage-deflate that can be accepted; None where there is none (RFC 7692 §5).

    Without `takeover` neither side remembers earlier messages, whatever the client would do.
    """
    agreements = (_accept(parameters, takeover) for name, parameters in offers if name == NAME)
    return next((agreement for agreement in agreements if agreement is not None), None)


def _accept(parameters: Sequence[tuple[str, str | None]], takeover: bool) -> Agreement | None:
    """RFC 7692 §7.1: an offer with what is not defined, or twice, or with a wrong value, is declined."""
    offered = dict(parameters)
    server_takeover = client_takeover = takeover
    server_bits, client_bits = WINDOW_BITS, _MAX_BITS
    if len(offered) < len(parameters):
        return None
    for name, value in parameters:
        if name == "server_no_context_takeover" and value is None:
            server_takeover = False
        elif name == "client_no_context_takeover" and value is None:
            client_takeover = False
        elif name == "server_max_window_bits" and value in _BITS:
            server_bits = min(WINDOW_BITS, _BITS[value])
        elif name == "client_max_window_bits" and (value is None or value in _BITS):
            client_bits = WINDOW_BITS if value is None else min(WINDOW_BITS, _BITS[value])
        else:
            return None
    if server_bits == 8:  # zlib cannot: https://github.com/madler/zlib/issues/171
        return None
    return Agreement(server_takeover, client_takeover, server_bits, client_bits)


class Deflater:
    """The sending half. The state that it keeps between messages is made for the first that it compresses.

    Attributes:
        shareable: what another deflater must have here too for their frames to be the same; None if this one keeps
            state between messages.
    """

    def __init__(self, agreement: Agreement) -> None:
        self.shareable = None if agreement.server_takeover else agreement.server_bits
        self._bits = agreement.server_bits
        self._takeover = agreement.server_takeover
        self._zlib: _Compress | None = None

    def frame(self, opcode: int, payload: bytes) -> bytes:
        """Return a whole data frame, compressed unless it is empty: zlib makes no block of nothing."""
        if not payload:
            return frame(opcode, payload)
        return frame(RSV1 | opcode, self._deflate(payload)[: -len(_EMPTY_BLOCK)])

    def fragment(self, opcode: int, payload: bytes, *, last: bool) -> bytes:
        """Return one frame of a fragmented message, all of which is compressed (RFC 7692 §6.1)."""
        deflated = self._deflate(payload, last=last)
        if last:
            deflated = deflated[: -len(_EMPTY_BLOCK)]
        return fragment(opcode if opcode == Opcode.CONTINUATION else RSV1 | opcode, deflated, last=last)

    def _deflate(self, payload: bytes, *, last: bool = True) -> bytes:
        zlib, self._zlib = self._zlib, None  # half used, if this should fail, it would corrupt all that follows
        if zlib is None:
            zlib = compressobj(LEVEL, DEFLATED, -self._bits, MEMORY_LEVEL)
        deflated = zlib.compress(payload) + zlib.flush(Z_SYNC_FLUSH)
        if self._takeover or not last:
            self._zlib = zlib
        return deflated


class Inflater:
    """The receiving half. Never makes more than it is asked for, however little that was made from.

    What it remembers is made with the first message that comes compressed.
    """

    def __init__(self, agreement: Agreement) -> None:
        self._bits = agreement.client_bits
        self._takeover = agreement.client_takeover
        self._zlib: _Decompress | None = None

    def inflate(self, data: bytes, limit: int, *, last: bool) -> bytes:
        """What comes of the next piece of a message, cut off at `limit` bytes, which must be above 0.

        Behind one that was cut off nothing can be inflated. `last` ends the message.

        Raises:
            zlib.error: it is not what a compressor makes.
        """
        inflated = self._feed(data, limit)
        if last:
            ended = self._zlib is not None and self._zlib.eof  # by a final block: the empty one would begin anew
            if not ended and len(inflated) < limit:
                inflated += self._feed(_EMPTY_BLOCK, limit - len(inflated))
            if not self._takeover:
                self._zlib = None
        return inflated

    def _feed(self, data: bytes, limit: int) -> bytes:
        """Inflate, also behind final blocks, which a message may have (RFC 7692 §7.2.1), and as many as it likes.

        A compressor that has made a final block has forgotten what was before. What is behind one comes back as a copy,
        so it is fed in small steps then: tiny final blocks would cost the square of their number.
        """
        inflated = b""
        rest = memoryview(data)
        step = len(data)
        zlib = self._zlib
        while rest and len(inflated) < limit:
            if zlib is None or zlib.eof:
                zlib = self._zlib = decompressobj(-self._bits)
            piece = rest[:step]
            inflated += zlib.decompress(piece, limit - len(inflated))
            rest = rest[len(piece) - len(zlib.unused_data) :]
            if zlib.eof:
                step = _STEP
        return inflated
