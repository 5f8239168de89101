"""Close codes: RFC 6455 §7.4, the IANA registry, and the server's own from 4000. Sans-I/O."""

from __future__ import annotations

from typing import NamedTuple


class Close(NamedTuple):
    """Why a connection ends: a close code with its reason."""

    code: int
    reason: str = ""


NORMAL = 1000
PROTOCOL_ERROR = 1002
NO_STATUS = 1005  # never sent: a close frame came without a code
ABNORMAL = 1006  # never sent: the peer went without a close frame
INVALID_DATA = 1007
TOO_BIG = 1009
INTERNAL_ERROR = 1011
SERVICE_RESTART = 1012
FULL = 1013  # not sent here: a handshake is refused with HTTP 503
NO_PONG = 4000
STALLED = 4001
TOO_FAST = 4003

# Those that mean something here; an application or a peer may use others.
KNOWN = frozenset(value for name, value in list(globals().items()) if name.isupper() and isinstance(value, int))

# Ends that somebody is to blame for: a peer that broke the protocol, or a bug here. A loss is nobody's fault.
FAULTS = frozenset({PROTOCOL_ERROR, INVALID_DATA, TOO_BIG, INTERNAL_ERROR})


def may_be_sent(code: int) -> bool:
    """Whether a close code may stand in a close frame."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999
