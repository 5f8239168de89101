"""How much is read, kept and written at a time, whatever carries the connection."""

from __future__ import annotations

READ_SIZE = 65536  # bytes; one read takes no more
READ_DEFLATED = 4096  # bytes; the same if they may inflate, to a thousand times as much
READ_AHEAD = 65536  # bytes that are read while the connection has something to receive, before reading pauses
PUT_OFF = 65536  # bytes that are put off to go out in one write
BROADCAST_MAX = 1048576  # bytes; if more wait for a peer, broadcasts leave it out
