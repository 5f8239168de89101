"""The PROXY protocol, versions 1 and 2: whose connection it is that a proxy passes on. Sans-I/O.

Source: https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt
"""

from __future__ import annotations

import re
from http import HTTPStatus

from tricorn.protocol.forwarded import parse_address
from tricorn.request import Refuse

MAX_V1 = 107  # bytes, with CRLF (§2.1)
MAX_V2 = 16 + 4096  # bytes; addresses take 12 or 36, the rest may say more (§2.2)

_V1 = b"PROXY "
_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_LINE = re.compile(
    rb"PROXY (?:UNKNOWN(?: .*)?|TCP([46]) ([0-9a-fA-F:.]+) ([0-9a-fA-F:.]+) ([0-9]{1,5}) ([0-9]{1,5}))\r\n"
)
_LOCAL, _PROXY = 0x20, 0x21  # version 2 and a command
_SIZES = {0x11: 4, 0x21: 16}  # bytes of an address of TCP over IPv4, over IPv6


class ProxyHeader:
    """The header that comes before everything else on a connection.

    Attributes:
        complete: it is there.
        client: the address of the client; None if the proxy does not say, or speaks for itself (`LOCAL`, `UNKNOWN`).
    """

    def __init__(self) -> None:
        self.complete = False
        self.client: tuple[str, int] | None = None
        self._data = b""

    def receive_data(self, data: bytes) -> int:
        """Take what came, and return how many bytes of it belong to the header.

        Raises:
            Refuse: it is malformed (400).
        """
        before = len(self._data)
        self._data += data
        if self._data.startswith(_V1):
            end = self._receive_v1()
        elif self._data.startswith(_V2):
            end = self._receive_v2()
        elif _V1.startswith(self._data) or _V2.startswith(self._data):
            end = None
        else:
            raise _malformed()
        self.complete = end is not None
        return len(data) if end is None else end - before

    def _receive_v1(self) -> int | None:
        end = self._data.find(b"\r\n", 0, MAX_V1) + 2
        if end < 2:
            if len(self._data) >= MAX_V1:
                raise _malformed()
            return None
        line = _LINE.fullmatch(self._data, 0, end)
        if line is None:
            raise _malformed()
        if line[1] is not None:
            source, target = line[2].decode("ascii"), line[3].decode("ascii")
            address, port = parse_address(source), int(line[4])
            if address is None or parse_address(target) is None or max(port, int(line[5])) > 65535:
                raise _malformed()
            if {":" in source, ":" in target} != {line[1] == b"6"}:
                raise _malformed()
            self.client = str(address), port
        return end

    def _receive_v2(self) -> int | None:
        data = self._data
        if len(data) < 16:
            return None
        end = 16 + int.from_bytes(data[14:16], "big")
        if data[12] not in (_LOCAL, _PROXY) or end > MAX_V2:
            raise _malformed()
        if len(data) < end:
            return None
        size = _SIZES.get(data[13])
        if data[12] == _PROXY and size is not None:
            if end < 16 + 2 * size + 4:
                raise _malformed()
            address = parse_address(data[16 : 16 + size])
            self.client = str(address), int.from_bytes(data[16 + 2 * size : 18 + 2 * size], "big")
        return end


def _malformed() -> Refuse:
    return Refuse(HTTPStatus.BAD_REQUEST, "a connection from this proxy must begin with a header of the PROXY protocol")
