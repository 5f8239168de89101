"""permessage-deflate (RFC 7692): what is agreed on, and what goes over the wire, against `websockets`' own."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory, PerMessageDeflate
from websockets.frames import Frame
from websockets.frames import Opcode as TheirOpcode
from websockets.headers import parse_extension
from websockets.protocol import State
from websockets.server import ServerProtocol

from tricorn.close import INVALID_DATA, PROTOCOL_ERROR, TOO_BIG
from tricorn.host.deflate import NAME, Agreement, Deflater, Inflater, negotiate
from tricorn.host.websocket import Message, Opcode, Receiver

LIMIT = 1 << 16
PLAIN = Agreement(server_takeover=True, client_takeover=True, server_bits=12, client_bits=15)

properties = settings(deadline=None)


def agree(header: str, *, takeover: bool = True) -> Agreement | None:
    return negotiate(parse_extension(header), takeover=takeover)


# §5 and §7.1: the negotiation


@pytest.mark.parametrize(
    ("offer", "answer"),
    [
        ("", f"{NAME}; server_max_window_bits=12"),
        ("; server_no_context_takeover", f"{NAME}; server_no_context_takeover; server_max_window_bits=12"),
        ("; client_no_context_takeover", f"{NAME}; client_no_context_takeover; server_max_window_bits=12"),
        ("; server_max_window_bits=10", f"{NAME}; server_max_window_bits=10"),
        ("; server_max_window_bits=15", f"{NAME}; server_max_window_bits=12"),
        ("; client_max_window_bits", f"{NAME}; server_max_window_bits=12; client_max_window_bits=12"),
        ("; client_max_window_bits=9", f"{NAME}; server_max_window_bits=12; client_max_window_bits=9"),
        ("; server_max_window_bits=8, permessage-deflate", f"{NAME}; server_max_window_bits=12"),
        ("; nothing_we_know", None),
        ("; server_max_window_bits", None),
        ("; server_max_window_bits=16", None),
        ("; server_max_window_bits=08", None),
        ("; server_max_window_bits=8", None),
        ("; client_max_window_bits=7", None),
        ("; server_no_context_takeover=1", None),
        ("; server_no_context_takeover; server_no_context_takeover", None),
        ("; nothing_we_know, permessage-deflate", f"{NAME}; server_max_window_bits=12"),
    ],
)
def test_what_is_agreed_on(offer: str, answer: str | None) -> None:
    agreement = agree(NAME + offer)
    assert (agreement and agreement.header()) == answer


def test_other_extensions_are_passed_over() -> None:
    assert agree("x-other; a=b") is None
    assert agree(f"x-other, {NAME}") is not None


def test_without_takeover_neither_side_remembers() -> None:
    agreement = agree(NAME, takeover=False)
    assert agreement is not None
    assert "server_no_context_takeover; client_no_context_takeover" in agreement.header()


offers = st.builds(
    ClientPerMessageDeflateFactory,
    server_no_context_takeover=st.booleans(),
    client_no_context_takeover=st.booleans(),
    server_max_window_bits=st.one_of(st.none(), st.integers(9, 15)),
    client_max_window_bits=st.one_of(st.none(), st.just(True), st.integers(9, 15)),
)


def shake_hands(offer: ClientPerMessageDeflateFactory, *, takeover: bool) -> tuple[Agreement, PerMessageDeflate]:
    """Both ends: ours as agreed, and theirs as it understands the answer."""
    agreement = negotiate([(offer.name, offer.get_request_params())], takeover=takeover)
    assert agreement is not None
    [(_, parameters)] = parse_extension(agreement.header())
    return agreement, offer.process_response_params(parameters, [])


# §6 and §7.2: the messages

texts = st.lists(st.one_of(st.text(max_size=200), st.sampled_from(["", "ab" * 300, "é" * 200])), max_size=6)


@properties
@given(offers, st.booleans(), texts)
def test_theirs_understands_what_ours_says(
    offer: ClientPerMessageDeflateFactory, takeover: bool, messages: list[str]
) -> None:
    agreement, client = shake_hands(offer, takeover=takeover)
    deflater = Deflater(agreement)
    for message in messages:
        reader = ServerProtocolReader(deflater.frame(Opcode.TEXT, message.encode()))
        assert client.decode(reader.frame).data == message.encode()


class ServerProtocolReader:
    """A frame of the server's, taken apart."""

    def __init__(self, data: bytes) -> None:
        size, at = data[1], 2
        if size == 126:
            size, at = int.from_bytes(data[2:4], "big"), 4
        assert len(data) == at + size
        self.frame = Frame(TheirOpcode(data[0] & 15), data[at:], bool(data[0] & 0x80), bool(data[0] & 0x40))


def compressed(client: PerMessageDeflate, message: str, places: Sequence[int]) -> list[bytes]:
    """The frames that their client makes of a message, in fragments cut at these places."""
    data = message.encode()
    bounds = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    fragments = [data[start:end] for start, end in pairwise(bounds)]
    frames = []
    for index, fragment in enumerate(fragments):
        opcode = TheirOpcode.CONT if index else TheirOpcode.TEXT
        frame = client.encode(Frame(opcode, fragment, index + 1 == len(fragments)))
        frames.append(marked(frame))
    return frames


@properties
@given(
    offers, st.booleans(), texts, st.lists(st.integers(0, 300), max_size=3), st.lists(st.integers(0, 2000), max_size=9)
)
def test_ours_understands_what_theirs_says_wherever_it_is_cut(
    offer: ClientPerMessageDeflateFactory, takeover: bool, messages: list[str], places: list[int], cuts: list[int]
) -> None:
    agreement, client = shake_hands(offer, takeover=takeover)
    receiver = Receiver(LIMIT, Inflater(agreement))
    stream = b"".join(frame for message in messages for frame in compressed(client, message, places))
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    seen: list[Message] = []
    for start, end in pairwise(bounds):
        seen += receiver.receive_data(stream[start:end])
    assert seen == messages
    assert receiver.violation is None


def test_a_message_may_go_uncompressed() -> None:
    receiver = Receiver(LIMIT, Inflater(PLAIN))
    assert receiver.receive_data(Frame(TheirOpcode.TEXT, b"plain").serialize(mask=True)) == ["plain"]


def marked(frame: Frame) -> bytes:
    """A client's frame. Theirs is not to say by itself that it is compressed."""
    data = bytearray(Frame(TheirOpcode.BINARY, frame.data).serialize(mask=True))
    data[0] = frame.fin << 7 | frame.rsv1 << 6 | frame.opcode
    return bytes(data)


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def wire(payload: bytes, *, opcode: TheirOpcode = TheirOpcode.BINARY, fin: bool = True, rsv1: bool = True) -> bytes:
    return marked(Frame(opcode, payload, fin, rsv1))


def code(*frames: bytes, inflater: Inflater | None = None) -> int | None:
    receiver = Receiver(LIMIT, Inflater(PLAIN) if inflater is None else inflater)
    for frame in frames:
        receiver.receive_data(frame)
    return None if receiver.violation is None else receiver.violation.code


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT])
def test_a_message_up_to_the_limit_is_taken(size: int) -> None:
    receiver = Receiver(LIMIT, Inflater(PLAIN))
    assert receiver.receive_data(wire(deflated(bytes(size)))) == [bytes(size)]


def test_a_bomb_is_refused_before_its_memory_is_spent() -> None:
    bomb = wire(deflated(bytes(200 << 20)))
    assert len(bomb) < 1 << 18
    tracemalloc.start()
    try:
        assert code(bomb) == TOO_BIG
        assert tracemalloc.get_traced_memory()[1] < 8 * LIMIT + 4 * len(bomb)
    finally:
        tracemalloc.stop()


def test_a_bomb_in_fragments_counts_together() -> None:
    data = deflated(bytes(LIMIT + 1))
    assert code(wire(data[:20], fin=False), wire(data[20:], opcode=TheirOpcode.CONT, rsv1=False)) == TOO_BIG


def test_endless_final_blocks_take_no_time_that_grows_with_their_square() -> None:
    compressor = zlib.compressobj(wbits=-15)
    block = compressor.compress(b"") + compressor.flush(zlib.Z_FINISH)
    assert code(wire(block * 20_000)) is None


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([wire(b"\xff\xff\xff\xff")], INVALID_DATA),
        ([wire(deflated(b"\xff"), opcode=TheirOpcode.TEXT)], INVALID_DATA),
        ([wire(deflated(b"x"), fin=False), wire(b"", opcode=TheirOpcode.CONT)], PROTOCOL_ERROR),
        ([wire(b"", opcode=TheirOpcode.PING)], PROTOCOL_ERROR),
    ],
)
def test_what_is_refused(frames: list[bytes], expected: int) -> None:
    assert code(*frames) == expected


def test_a_compressed_message_is_refused_where_nothing_was_agreed() -> None:
    receiver = Receiver(LIMIT)
    receiver.receive_data(wire(deflated(b"x")))
    assert receiver.violation is not None
    assert receiver.violation.code == PROTOCOL_ERROR


# The second opinion


@properties
@given(
    st.lists(
        st.tuples(st.sampled_from([*TheirOpcode]), st.binary(max_size=40), st.booleans(), st.booleans()), max_size=6
    )
)
@example([(TheirOpcode.TEXT, deflated(b"x"), True, True)])
def test_websockets_takes_and_refuses_the_same(frames: list[tuple[TheirOpcode, bytes, bool, bool]]) -> None:
    """Up to the first refusal. Text and the payloads of close frames are the matter of test_websocket_codec.py."""
    ours = Receiver(LIMIT, Inflater(PLAIN))
    theirs = ServerProtocol(state=State.OPEN, max_size=LIMIT)
    theirs.extensions = [PerMessageDeflate(False, False, 15, 12)]
    for opcode, payload, fin, rsv1 in frames:
        if opcode is TheirOpcode.CLOSE:
            return
        data = wire(payload, opcode=TheirOpcode.BINARY if opcode is TheirOpcode.TEXT else opcode, fin=fin, rsv1=rsv1)
        inside = theirs.current_size is not None
        ours.receive_data(data)
        theirs.receive_data(data)
        refused = theirs.parser_exc is not None
        if opcode in (TheirOpcode.PING, TheirOpcode.PONG) and inside and not rsv1:
            continue  # they count control frames against the message's limit
        if isinstance(theirs.parser_exc, EOFError):
            return
        assert (ours.violation is not None) == refused, (opcode, payload, fin, rsv1)
        if refused:
            return
