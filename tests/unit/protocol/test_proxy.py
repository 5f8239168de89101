"""The PROXY protocol, versions 1 and 2."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.protocol.proxy import MAX_V1, MAX_V2, ProxyHeader
from tricorn.request import Refuse

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
PORTS = (4711).to_bytes(2, "big") + (443).to_bytes(2, "big")
V4 = bytes([203, 0, 113, 7, 192, 0, 2, 1]) + PORTS
V6 = ip_address("2001:db8::7").packed + ip_address("2001:db8::1").packed + PORTS
MAPPED = ip_address("::ffff:203.0.113.7").packed + ip_address("2001:db8::1").packed + PORTS


def v2(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + bytes([command, family]) + len(body).to_bytes(2, "big") + body


GOOD = [
    (b"PROXY TCP4 203.0.113.7 192.0.2.1 4711 443\r\n", ("203.0.113.7", 4711)),
    (b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 443\r\n", ("2001:db8::7", 4711)),
    (b"PROXY TCP6 ::ffff:203.0.113.7 2001:db8::1 4711 443\r\n", ("203.0.113.7", 4711)),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", None),
    (v2(0x21, 0x11, V4), ("203.0.113.7", 4711)),
    (v2(0x21, 0x21, V6), ("2001:db8::7", 4711)),
    (v2(0x21, 0x21, MAPPED), ("203.0.113.7", 4711)),
    (v2(0x21, 0x11, V4 + b"\x04\0\x03abc"), ("203.0.113.7", 4711)),
    (v2(0x21, 0x11, V4 + bytes(MAX_V2 - 16 - len(V4))), ("203.0.113.7", 4711)),
    (v2(0x20, 0x00, b""), None),
    (v2(0x20, 0x11, V4), None),
    (v2(0x21, 0x00, b""), None),
    (v2(0x21, 0x31, bytes(216)), None),
]
BAD = [
    b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01",
    b"\r\n\r\nGET",
    b"PROXY \r\n",
    b"PROXY UDP4 203.0.113.7 192.0.2.1 4711 443\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 4711\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 4711 443 \r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 65536 443\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 1 65536\r\n",
    b"PROXY TCP4 203.0.113.700 192.0.2.1 1 2\r\n",
    b"PROXY TCP4 2001:db8::7 2001:db8::1 1 2\r\n",
    b"PROXY TCP6 203.0.113.7 192.0.2.1 1 2\r\n",
    b"PROXY TCP6 fe80::1%eth0 2001:db8::1 1 2\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 \xb2 2\r\n",
    b"PROXY UNKNOWN " + b"x" * MAX_V1,
    v2(0x22, 0x11, V4),
    v2(0x11, 0x11, V4),
    v2(0x21, 0x11, V4[:-1]),
    v2(0x21, 0x21, V4),
    v2(0x21, 0x11, V4 + bytes(MAX_V2)),
]


@pytest.mark.parametrize(("data", "client"), GOOD)
def test_a_header_in_one_piece(data: bytes, client: tuple[str, int] | None) -> None:
    header = ProxyHeader()
    assert header.receive_data(data + b"\x16behind\r\n") == len(data)
    assert header.complete
    assert header.client == client


@pytest.mark.parametrize(("data", "client"), GOOD)
def test_a_header_byte_by_byte(data: bytes, client: tuple[str, int] | None) -> None:
    header = ProxyHeader()
    for index in range(len(data)):
        assert not header.complete
        assert header.client is None
        assert header.receive_data(data[index : index + 1]) == 1
    assert header.complete
    assert header.client == client


@pytest.mark.parametrize("data", BAD)
def test_what_is_no_header_is_refused(data: bytes) -> None:
    with pytest.raises(Refuse) as refused:
        ProxyHeader().receive_data(data)
    assert refused.value.status == 400


@given(
    st.lists(st.sampled_from([SIGNATURE, b"PROXY ", b"TCP4 ", b"\r\n", b"1.2.3.4 ", b"\x21\x11\0\x0c"]) | st.binary()),
    st.integers(1, 9),
)
def test_anything_in_pieces_ends_as_in_one_piece(parts: list[bytes], size: int) -> None:
    data = b"".join(parts)

    def outcome(step: int) -> tuple[object, ...]:
        header, taken = ProxyHeader(), 0
        try:
            while taken < len(data) and not header.complete:
                piece = data[taken : taken + step]
                count = header.receive_data(piece)
                assert count == len(piece) or header.complete
                taken += count
        except Refuse:
            return ("refused",)
        return header.complete, header.client, taken

    assert outcome(size) == outcome(len(data) + 1)


@given(st.ip_addresses(), st.integers(0, 65535), st.binary(max_size=50))
def test_every_address_in_both_versions(address: object, port: int, behind: bytes) -> None:
    source = ip_address(str(address))
    if getattr(source, "ipv4_mapped", None):
        return
    line = f"PROXY TCP{source.version} {source} {source} {port} {port}\r\n".encode()
    body = source.packed * 2 + port.to_bytes(2, "big") * 2
    for data in (line, v2(0x21, 0x11 if source.version == 4 else 0x21, body)):
        header = ProxyHeader()
        assert header.receive_data(data + behind) == len(data)
        assert header.client == (str(source), port)
