"""Messages that go to many connections: framed once for all of them, compressed once for all that can share that."""

from __future__ import annotations

from collections.abc import Iterable

from tricorn.protocol.deflate import Deflater
from tricorn.protocol.frames import Opcode, frame


class Prepared(tuple[bytes, ...]):
    """The payloads of messages in a row, all of them text or all of them binary."""

    text: bool
    _frames: dict[int, bytes]  # by the window of a connection that compresses, 0 for one that does not

    def __new__(cls, payloads: Iterable[bytes], *, text: bool) -> Prepared:
        prepared = super().__new__(cls, payloads)
        prepared.text = text
        prepared._frames = {}
        return prepared

    def frames(self, deflater: Deflater | None) -> bytes:
        """Return the messages as a connection sends them, each as one frame."""
        opcode = int(Opcode.TEXT if self.text else Opcode.BINARY)
        if deflater is not None and deflater.shareable is None:
            return b"".join([deflater.frame(opcode, payload) for payload in self])
        window = 0 if deflater is None else deflater.shareable or 0
        made = self._frames.get(window)
        if made is None:
            make = frame if deflater is None else deflater.frame
            made = self._frames[window] = b"".join([make(opcode, payload) for payload in self])
        return made
