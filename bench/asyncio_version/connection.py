"""What the chat needs of a transport."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol


class Connection(Protocol):
    """One client's connection."""

    context: dict[str, object]  # what the chat adds to every record about the connection
    known: dict[str, Any]  # what the server knows of it

    @property
    def peer(self) -> str:
        """The peer's address."""

    @property
    def subprotocol(self) -> str | None:
        """The one agreed on."""

    @property
    def request_headers(self) -> Mapping[str, str]:
        """Those of the handshake, names in lower case."""

    @property
    def keeps_up(self) -> bool:
        """Whether it can be written to without waiting."""

    @property
    def deflates(self) -> bool:
        """Whether its messages are compressed, so that others' frames are not for it."""

    def __aiter__(self) -> AsyncIterator[str | bytes]:
        """Its messages. Ends, or raises ConnectionClosed, when the peer is gone."""

    def write_frames(self, frames: bytes) -> None:
        """Write whole frames, if the connection is open. Only for one that keeps up and does not deflate."""

    def write_texts(self, texts: list[bytes]) -> None:
        """Write messages, all at once, if the connection is open. Only for one that keeps up."""

    async def send_texts(self, texts: list[bytes]) -> None:
        """Send messages and wait for room. Raises ConnectionClosed or OSError when the peer is gone."""
