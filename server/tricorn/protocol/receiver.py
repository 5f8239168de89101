"""The receiving half of RFC 6455 for the server's side of a connection, Sans-I/O: bytes in, messages out."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING
from zlib import error as DeflateError

from websockets.frames import apply_mask  # type: ignore[attr-defined]

from tricorn.protocol.close import INVALID_DATA, NO_STATUS, PROTOCOL_ERROR, TOO_BIG, Close, may_be_sent
from tricorn.protocol.frames import FIN, MAX_CONTROL_PAYLOAD, RSV1, Opcode

if TYPE_CHECKING:
    from codecs import IncrementalDecoder
    from collections.abc import Collection

    from tricorn.protocol.deflate import Inflater

Message = str | bytes  # text or binary, RFC 6455 §5.6

_RSV = 0x70
_MASKED = 0x80
_WHOLE_TEXT = FIN | Opcode.TEXT
_WHOLE_BINARY = FIN | Opcode.BINARY
_WHOLE = (_WHOLE_TEXT, _WHOLE_BINARY)
_OPCODES = frozenset(Opcode)

# What one call works through, however little each frame says. The rest waits until others had their turn.
FRAMES_AT_ONCE = 128
INFLATED_AT_ONCE = 65536  # bytes, and what is left of the message that passes it

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class _Violation(Exception):
    """The peer broke the protocol."""

    def __init__(self, code: int, reason: str) -> None:
        self.close = Close(code, reason)


class Receiver:
    """The receiving half of a connection.

    A message is refused as soon as a frame's header says that it would pass `max_message_bytes`, before any of it is
    kept, and text at its first byte that is not UTF-8. Of a frame that comes in pieces, each is used at once: what is
    kept is the bytes of the message so far, however small its fragments are, and at most one incomplete frame header.

    With an `Inflater` messages may be compressed. Then what counts is what they inflate to, and one that passes the
    limit is refused at the byte that does.

    Attributes:
        pings, pongs: payloads; whoever answers or reads them clears the list.
        awaited: payloads of pings of ours; other pongs are ignored.
        closed: the peer's close frame.
        violation: what the peer did wrong, as the close to answer with.
        frames: how many frames the last call began.
        inflated: how many bytes it inflated.
        more: the last call left frames for the next one: call it again with no data before you read on.
        left: how many bytes of the current frame's payload have not come.
    """

    __slots__ = (
        "_buffer",
        "_control",
        "_fin",
        "_inflater",
        "_inflating",
        "_mask",
        "_max",
        "_message",
        "_opcode",
        "_payload",
        "_received",
        "_utf8",
        "awaited",
        "closed",
        "frames",
        "inflated",
        "left",
        "more",
        "pings",
        "pongs",
        "violation",
    )

    def __init__(self, max_message_bytes: int, inflater: Inflater | None = None) -> None:
        self.pings: list[bytes] = []
        self.awaited: Collection[bytes] = ()
        self.pongs: list[bytes] = []
        self.closed: Close | None = None
        self.violation: Close | None = None
        self.frames = 0
        self.inflated = 0
        self.more = False
        self.left = 0
        self._max = max_message_bytes
        self._inflater = inflater
        self._buffer = b""  # an incomplete frame header, or all that is left for the next call
        self._opcode = Opcode.CONTINUATION  # of the frame on its way
        self._fin = False
        self._mask = b""  # turned to where that payload goes on
        self._control = b""
        self._message = Opcode.CONTINUATION  # of the message on its way: TEXT, BINARY, or CONTINUATION for none
        self._inflating: Inflater | None = None  # if that message is compressed
        self._received = 0  # bytes of that message, inflated
        self._payload = bytearray()  # of that message, inflated
        self._utf8: IncrementalDecoder | None = None  # checks text that comes in pieces; made with the first of it

    def receive_data(self, data: bytes) -> list[Message]:
        """Take what one read brought and return the messages that it completed, `FRAMES_AT_ONCE` at most. Never raises.

        Once `closed` or `violation` is set, whatever comes is ignored (RFC 6455 §1.4, §7.1.7).
        """
        messages: list[Message] = []
        self.frames = 0
        self.more = False
        if self.closed is None and self.violation is None:
            try:
                self._receive(self._buffer + data if self._buffer else data, messages)
            except _Violation as violation:
                self.violation = violation.close
            except UnicodeDecodeError as error:
                self.violation = Close(INVALID_DATA, f"not UTF-8: {error.reason}")
            except DeflateError:
                self.violation = Close(INVALID_DATA, "what came cannot be inflated")
        return messages

    def limit_messages(self, max_bytes: int) -> None:
        """Refuse longer messages from now on, also one that has begun: its frame's header says how long it will be."""
        self._max = max_bytes
        coming = self.left if self._opcode < 8 and not self._inflating else 0
        if self._received + coming > max_bytes and self.closed is None and self.violation is None:
            self.violation = self._too_big().close

    def _receive(self, data: bytes, messages: list[Message]) -> None:
        self._buffer = b""
        self.inflated = position = frames = 0
        size = len(data)
        if self.left:
            position = self._go_on(data, 0, messages)
            if self.closed is not None:
                return
        while frames < FRAMES_AT_ONCE and size - position >= 2:
            first = data[position]
            length = data[position + 1] ^ _MASKED
            if length < 126:
                start = position + 6
            elif length == 126:
                start = position + 8
            elif length == 127:
                start = position + 14
            else:
                raise _Violation(PROTOCOL_ERROR, "a frame from a client must be masked")
            plain = first in _WHOLE and not self._message
            if not plain:
                self._check(first, length)
            if start > size:
                break
            if length > 125:
                length = _extended_length(data[position + 2 : start - 4])
            if length + self._received > self._max and not (first & 8 or first & RSV1 or self._inflating):
                raise self._too_big()
            frames += 1
            mask = data[start - 4 : start]
            end = start + length
            if plain and end <= size:
                payload = apply_mask(data[start:end], mask)
                messages.append(payload.decode() if first == _WHOLE_TEXT else payload)
                position = end
                continue
            self._opcode = Opcode(first & 0x0F)
            self._fin = first >= FIN
            self.left = length
            self._mask = mask
            if self._opcode < 8 and self._opcode:
                self._message = self._opcode
                self._inflating = self._inflater if first & RSV1 else None
            position = self._go_on(data, start, messages)
            if self.closed is not None:
                return
            if self.inflated > INFLATED_AT_ONCE:
                break
        self.frames = frames
        self._buffer = data[position:]
        self.more = position < size and (frames == FRAMES_AT_ONCE or self.inflated > INFLATED_AT_ONCE)

    def _check(self, first: int, length: int) -> None:
        """Refuse what §5.2, §5.4 and §5.5 forbid in the first two bytes of a frame."""
        opcode = first & 0x0F
        reserved = first & _RSV
        if reserved and (reserved != RSV1 or self._inflater is None or opcode not in (Opcode.TEXT, Opcode.BINARY)):
            raise _Violation(PROTOCOL_ERROR, "a reserved bit is set that no extension gives a meaning here")
        if opcode not in _OPCODES:
            raise _Violation(PROTOCOL_ERROR, f"opcode {opcode} is not defined")
        if opcode >= 8:
            if length > MAX_CONTROL_PAYLOAD:
                raise _Violation(PROTOCOL_ERROR, f"a control frame may have at most {MAX_CONTROL_PAYLOAD} bytes")
            if first < FIN:
                raise _Violation(PROTOCOL_ERROR, "a control frame must not be fragmented")
        elif opcode and self._message:
            raise _Violation(PROTOCOL_ERROR, "a new message began before the last one was finished")
        elif not opcode and not self._message:
            raise _Violation(PROTOCOL_ERROR, "a continuation frame without a message to continue")

    def _go_on(self, data: bytes, start: int, messages: list[Message]) -> int:
        """Use as much of the current frame's payload as `data` holds from `start`; return where it ends."""
        end = min(start + self.left, len(data))
        count = end - start
        payload = apply_mask(data[start:end], self._mask)
        self.left -= count
        if self.left:
            turn = count % 4
            self._mask = self._mask[turn:] + self._mask[:turn]
        if self._opcode >= 8:
            self._control += payload
            if not self.left:
                payload, self._control = self._control, b""
                self._control_frame(payload)
            return end
        finished = self._fin and not self.left
        if self._inflating:
            room = self._max - self._received
            payload = self._inflating.inflate(payload, room + 1, last=finished)
            if len(payload) > room:
                raise self._too_big()
            self.inflated += len(payload)
        self._received += len(payload)
        if self._message == Opcode.TEXT:
            if self._utf8 is None:
                self._utf8 = _utf8_decoder()
            self._utf8.decode(payload, finished)
            if b"\xed\xa0" <= self._utf8.getstate()[0] < b"\xee":  # which the decoder lets pass until its third byte
                raise _Violation(INVALID_DATA, "not UTF-8: a surrogate")
        self._payload += payload
        if finished:
            messages.append(self._payload.decode() if self._message == Opcode.TEXT else bytes(self._payload))
            self._message = Opcode.CONTINUATION
            self._inflating = None
            self._received = 0
            self._payload.clear()
        return end

    def _too_big(self) -> _Violation:
        return _Violation(TOO_BIG, f"a message may have at most {self._max} bytes")

    def _control_frame(self, payload: bytes) -> None:
        if self._opcode == Opcode.PING:
            self.pings.append(payload)
        elif self._opcode == Opcode.CLOSE:
            self.closed = _parse_close(payload)
        elif payload in self.awaited:
            self.pongs.append(payload)


def _extended_length(field: bytes) -> int:
    length = int.from_bytes(field, "big")
    if length < (126 if len(field) == 2 else 1 << 16):
        raise _Violation(PROTOCOL_ERROR, "a frame's length must be in its shortest form")
    if length >> 63:
        raise _Violation(PROTOCOL_ERROR, "a frame's length must be below 2**63")
    return length


def _parse_close(payload: bytes) -> Close:
    """RFC 6455 §5.5.1 and §7.4."""
    if not payload:
        return Close(NO_STATUS)
    if len(payload) == 1:
        raise _Violation(PROTOCOL_ERROR, "a close frame has a payload of one byte")
    code = int.from_bytes(payload[:2], "big")
    if not may_be_sent(code):
        raise _Violation(PROTOCOL_ERROR, f"close code {code} must not be sent")
    return Close(code, payload[2:].decode())
