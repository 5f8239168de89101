"""The same frames shown to our `Receiver` and to `websockets`: they agree, or the reason why not is known."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fixtures.frames import FIN, Raw, fewest, parse
from fixtures.second_opinion import difference
from tricorn.protocol.close import may_be_sent
from tricorn.protocol.deflate import Agreement
from tricorn.protocol.frames import RSV1, Opcode

LIMIT = 200
AGREEMENTS = [None, Agreement(True, True, 15, 15), Agreement(True, True, 15, 9), Agreement(True, False, 15, 15)]

texts = st.text(max_size=60).map(str.encode)
mangled = st.lists(
    st.one_of(texts, st.sampled_from([b"\xff", b"\x80", b"\xc0", b"\xed\xa0", b"\xf4\x90", b"\xf0", b"\x9f", b"\xc3"])),
    max_size=6,
).map(b"".join)
payloads = st.one_of(texts, mangled, st.sampled_from([125, 126, 200, 201, 5000]).map(bytes))
close_payloads = st.builds(
    lambda code, reason: code.to_bytes(2, "big") + reason,
    st.one_of(st.sampled_from([code for code in range(5000) if may_be_sent(code)]), st.integers(0, 65535)),
    mangled,
)


@st.composite
def frames(draw: st.DrawFn, agreement: Agreement | None) -> list[Raw]:
    """Mostly valid in each way, so that the flaws are seldom two in one frame and several frames are reached."""
    raws = []
    deflater = None
    compressed = inside = False
    for _ in range(draw(st.integers(1, 8))):
        opcode = draw(
            st.sampled_from([0] * 8 if inside else [1, 1, 2, 2])
            if draw(st.integers(0, 3))
            else st.sampled_from([*Opcode, 3, 11, 15])
        )
        fin = draw(st.sampled_from([FIN, FIN, FIN, 0]))
        reserved = draw(st.sampled_from([0] * 30 + [0x10, 0x20, 0x40]))
        payload = draw(close_payloads if opcode == Opcode.CLOSE and draw(st.booleans()) else payloads)
        if opcode in (1, 2):
            compressed = agreement is not None and draw(st.booleans())
        if opcode <= 2:
            inside = not fin
            if compressed and agreement is not None:
                reserved |= RSV1 if opcode else 0
                if deflater is None or (opcode and not agreement.client_takeover):
                    deflater = zlib.compressobj(9, zlib.DEFLATED, -agreement.client_bits)
                payload = deflater.compress(payload)
                if draw(st.integers(0, 9)):
                    payload += deflater.flush(zlib.Z_SYNC_FLUSH)
                    payload = payload[:-4] if fin else payload
                else:
                    payload += deflater.flush()
                    deflater = None
                if not draw(st.integers(0, 9)):
                    payload = draw(st.binary(max_size=20)) + payload
        width = draw(st.sampled_from([fewest(len(payload))] * 10 + [max(fewest(len(payload)), 2), 8]))
        raws.append(Raw(fin | reserved | opcode, payload, draw(st.integers(0, 19)) > 0, width))
    return raws


@settings(derandomize=True, max_examples=600)
@given(st.data(), st.sampled_from(AGREEMENTS))
def test_websockets_is_of_the_same_opinion(data: st.DataObject, agreement: Agreement | None) -> None:
    difference(data.draw(frames(agreement)), LIMIT, agreement)


@settings(derandomize=True)
@given(st.binary(max_size=400), st.sampled_from(AGREEMENTS))
@example(b"\x88\x83\0\0\0\0\x03\xff\xff", None)
@example(b"\x01\x80\0\0\0\0\x88\x80\0\0\0\0", None)
def test_of_any_bytes_too(data: bytes, agreement: Agreement | None) -> None:
    difference(parse(data), LIMIT, agreement)


def raw(first: int, payload: bytes = b"", width: int | None = None) -> Raw:
    return Raw(first, payload, True, fewest(len(payload)) if width is None else width)


def deflated(data: bytes, flush: int = zlib.Z_SYNC_FLUSH) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (compressor.compress(data) + compressor.flush(flush)).removesuffix(b"\0\0\xff\xff")


COMPRESSED = FIN | RSV1 | Opcode.BINARY


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([raw(FIN | Opcode.TEXT, b"x", 2)], "§5.2, the minimal number"),
        ([raw(Opcode.TEXT), raw(FIN | Opcode.CLOSE)], "§5.4, control frames"),
        ([raw(Opcode.TEXT, bytes(200)), raw(FIN | Opcode.PING, b"1")], "§5.4, control frames"),
        ([raw(FIN | Opcode.PING, bytes(201))], "two flaws"),
        ([raw(FIN | Opcode.CLOSE, b"\x03\xff\xff")], "two flaws"),
        ([raw(COMPRESSED, b"\xff\xff")], "what cannot be inflated is 1007"),
        ([raw(COMPRESSED, deflated(b"x", zlib.Z_FINISH) + deflated(b"y"))], "§7.2.1, a block may be final"),
        ([raw(COMPRESSED, b"\0\0\0\xff\xff" * 50 + b"\0")], "they also hold the deflated frame to it"),
        ([raw(RSV1 | Opcode.BINARY, deflated(bytes(201))[:5])], "they find that out with the next one"),
    ],
)
def test_each_difference_that_is_known(frames: list[Raw], reason: str) -> None:
    found = difference(frames, LIMIT, Agreement(True, True, 15, 15))
    assert found is not None
    assert reason in found
