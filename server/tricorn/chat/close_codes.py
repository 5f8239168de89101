"""The chat's own close codes, of those that RFC 6455 §7.4.2 leaves to applications.

4500 and above tell a client not to come back unchanged.
"""

from __future__ import annotations

TOKEN_EXPIRED = 4002
OUTBOX_OVERFLOW = 4004
UNAUTHENTICATED = 4500
FORBIDDEN = 4501
TOO_MANY_CONNECTIONS = 4503

KNOWN = frozenset({TOKEN_EXPIRED, OUTBOX_OVERFLOW, UNAUTHENTICATED, FORBIDDEN, TOO_MANY_CONNECTIONS})

DO_NOT_COME_BACK = 4500  # this and above
