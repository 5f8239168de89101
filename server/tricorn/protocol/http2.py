"""As much of HTTP/2's framing (RFC 9113 §4) as it takes to count and to refuse it, Sans-I/O."""

from __future__ import annotations

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # §3.4

_HEADER = 9  # bytes, §4.1
_SETTINGS = b"\0\0\0\x04\0\0\0\0\0"  # none, §6.5
_GOAWAY_HTTP_1_1_REQUIRED = b"\0\0\x08\x07\0\0\0\0\0" + bytes(4) + b"\0\0\0\x0d"  # no stream was handled, §6.8, §7

REFUSAL = _SETTINGS + _GOAWAY_HTTP_1_1_REQUIRED


class FrameCounter:
    """Counts the frames of one direction of a connection, after the preface."""

    def __init__(self) -> None:
        self._left = len(PREFACE)  # bytes of the preface, or of the current frame's payload
        self._header = b""  # what came of an incomplete frame header

    def cut(self, data: bytes, frames: int) -> tuple[int, int]:
        """Return where to cut `data`, so that before that at most so many frames begin, and how many do.

        What comes after the cut has to come again.
        """
        position = begun = 0
        while position < len(data):
            if self._left:
                step = min(self._left, len(data) - position)
                self._left -= step
                position += step
            elif begun == frames:
                break
            else:
                begun += not self._header
                step = min(_HEADER - len(self._header), len(data) - position)
                self._header += data[position : position + step]
                position += step
                if len(self._header) == _HEADER:
                    self._left = int.from_bytes(self._header[:3], "big")
                    self._header = b""
        return position, begun
