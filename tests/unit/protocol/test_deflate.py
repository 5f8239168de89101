"""RFC 7692 in `tricorn.protocol.deflate`, with `websockets` at the other end."""

from __future__ import annotations

import tracemalloc
import zlib
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory, PerMessageDeflate
from websockets.frames import Frame as TheirFrame
from websockets.frames import Opcode as TheirOpcode
from websockets.headers import parse_extension

from fixtures.frames import FIN, head, masked, one_by_one
from tricorn.protocol import deflate
from tricorn.protocol.close import INVALID_DATA, PROTOCOL_ERROR, TOO_BIG, Close
from tricorn.protocol.deflate import WINDOW_BITS, Agreement, Deflater, Inflater, negotiate
from tricorn.protocol.frames import RSV1, Opcode
from tricorn.protocol.receiver import Message, Receiver

LIMIT = 1 << 20
DEFAULT = Agreement(True, True, 15, 15)
AGREEMENTS = [Agreement(*each) for each in product((True, False), (True, False), (9, 12, 15), (8, 9, 12, 15))]
BAD_BITS = ["7", "16", "012", "", "x", "-9", "9.0", "\u0669"]
FINAL_BLOCK = b"\x03\x00"  # with nothing in it


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def receive(*reads: bytes, agreement: Agreement = DEFAULT, limit: int = LIMIT) -> tuple[list[Message], int | None]:
    receiver = Receiver(limit, Inflater(agreement))
    messages = [message for read in reads for message in receiver.receive_data(read)]
    return messages, None if receiver.violation is None else receiver.violation.code


# §5 and §7.1: what is agreed on


@pytest.mark.parametrize(
    ("parameters", "header"),
    [
        ({}, "server_max_window_bits=12"),
        ({"client_max_window_bits": None}, "server_max_window_bits=12; client_max_window_bits=12"),
        ({"client_max_window_bits": "15"}, "server_max_window_bits=12; client_max_window_bits=12"),
        ({"client_max_window_bits": "8"}, "server_max_window_bits=12; client_max_window_bits=8"),
        ({"server_max_window_bits": "15"}, "server_max_window_bits=12"),
        ({"server_max_window_bits": "9"}, "server_max_window_bits=9"),
        ({"server_no_context_takeover": None}, "server_no_context_takeover; server_max_window_bits=12"),
        ({"client_no_context_takeover": None}, "client_no_context_takeover; server_max_window_bits=12"),
        (
            {
                "client_max_window_bits": "10",
                "server_max_window_bits": "11",
                "client_no_context_takeover": None,
                "server_no_context_takeover": None,
            },
            "server_no_context_takeover; client_no_context_takeover; "
            "server_max_window_bits=11; client_max_window_bits=10",
        ),
    ],
)
def test_what_is_agreed_on(parameters: dict[str, str | None], header: str) -> None:
    agreement = negotiate([("permessage-deflate", list(parameters.items()))], takeover=True)
    assert agreement is not None
    assert agreement.header() == f"permessage-deflate; {header}"


def test_what_needs_no_word() -> None:
    assert DEFAULT.header() == "permessage-deflate"


@pytest.mark.parametrize(
    "parameters",
    [
        [("server_max_window_bits", None)],
        *([(name, bits)] for name in ("server_max_window_bits", "client_max_window_bits") for bits in BAD_BITS),
        [("server_max_window_bits", "8")],  # allowed, but zlib cannot
        [("server_no_context_takeover", "1")],
        [("client_no_context_takeover", "")],
        [("server_no_context_takeover", None), ("server_no_context_takeover", None)],
        [("client_max_window_bits", "12"), ("client_max_window_bits", None)],
        [("level", "9")],
    ],
)
def test_an_offer_that_is_declined(parameters: list[tuple[str, str | None]]) -> None:
    assert negotiate([("permessage-deflate", parameters)], takeover=True) is None


def test_the_first_offer_that_can_be_accepted_is() -> None:
    name = "permessage-deflate"
    offers = [
        ("x-other", []),
        (name, [("server_max_window_bits", "8")]),
        (name, [("server_max_window_bits", "10")]),
        (name, []),
    ]
    assert negotiate(offers, takeover=True) == (True, True, 10, 15)
    assert negotiate(offers[:2], takeover=True) is None
    assert negotiate([], takeover=True) is None


def test_without_takeover_neither_side_remembers() -> None:
    assert negotiate([("permessage-deflate", [])], takeover=False) == (False, False, WINDOW_BITS, 15)


@settings(derandomize=True)
@given(
    st.builds(
        ClientPerMessageDeflateFactory,
        server_no_context_takeover=st.booleans(),
        client_no_context_takeover=st.booleans(),
        server_max_window_bits=st.one_of(st.none(), st.integers(9, 15)),
        client_max_window_bits=st.one_of(st.none(), st.just(True), st.integers(9, 15)),
    ),
    st.booleans(),
)
def test_their_client_reads_every_answer_as_we_mean_it(offer: ClientPerMessageDeflateFactory, takeover: bool) -> None:
    agreement = negotiate([(offer.name, offer.get_request_params())], takeover=takeover)
    assert agreement is not None
    [(_, parameters)] = parse_extension(agreement.header())
    theirs = offer.process_response_params(parameters, [])
    assert (theirs.remote_no_context_takeover, theirs.remote_max_window_bits) == (
        not agreement.server_takeover,
        agreement.server_bits,
    )
    assert theirs.local_no_context_takeover or agreement.client_takeover
    assert theirs.local_max_window_bits <= agreement.client_bits


# §7.2.3: the examples

HELLO = bytes.fromhex("f248cdc9c90700")


@pytest.mark.parametrize(
    "frames",
    [
        [masked(FIN | RSV1 | Opcode.TEXT, HELLO)],
        [masked(RSV1 | Opcode.TEXT, HELLO[:3]), masked(FIN | Opcode.CONTINUATION, HELLO[3:])],
        [masked(FIN | RSV1 | Opcode.TEXT, bytes.fromhex("000500faff48656c6c6f00"))],
        [masked(FIN | RSV1 | Opcode.TEXT, bytes.fromhex("f348cdc9c9070000"))],
        [masked(FIN | RSV1 | Opcode.TEXT, bytes.fromhex("f248050000 00ffffcac9c90700"))],
    ],
    ids=["one frame", "fragments", "no compression", "a final block", "two blocks"],
)
def test_the_examples_of_the_rfc(frames: list[bytes]) -> None:
    for reads in (frames, one_by_one(b"".join(frames))):
        assert receive(*reads) == (["Hello"], None)


def test_the_example_of_a_window_that_is_remembered() -> None:
    frames = [masked(FIN | RSV1 | Opcode.TEXT, HELLO), masked(FIN | RSV1 | Opcode.TEXT, bytes.fromhex("f200110000"))]
    assert receive(*frames) == (["Hello", "Hello"], None)
    assert receive(*frames, agreement=Agreement(True, False, 15, 15)) == (["Hello"], INVALID_DATA)


def test_an_empty_message() -> None:
    """§7.2.3.6: a compressor may make one byte of it."""
    assert receive(masked(FIN | RSV1 | Opcode.TEXT, b"\0") * 2 + masked(FIN | RSV1 | Opcode.TEXT, HELLO)) == (
        ["", "", "Hello"],
        None,
    )
    assert receive(masked(FIN | Opcode.TEXT, b"")) == ([""], None)


def test_behind_a_final_block_nothing_is_remembered_and_more_may_come() -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    final = compressor.compress(b"one ") + compressor.flush()
    first = masked(FIN | RSV1 | Opcode.BINARY, final + final + deflated(b"two"))
    exact = masked(FIN | RSV1 | Opcode.BINARY, final)
    for reads in ([first, exact, first], one_by_one(first + exact + first)):
        assert receive(*reads) == ([b"one one two", b"one ", b"one one two"], None)


# §6 and RFC 6455 §5.2: the reserved bits


@pytest.mark.parametrize("bits", [0x20, 0x10, 0x60, 0x50, 0x70])
def test_the_other_reserved_bits_are_refused(bits: int) -> None:
    assert receive(masked(FIN | bits | Opcode.TEXT, HELLO)) == ([], PROTOCOL_ERROR)


@pytest.mark.parametrize("opcode", [Opcode.CLOSE, Opcode.PING, Opcode.PONG])
def test_control_frames_are_never_compressed(opcode: Opcode) -> None:
    assert receive(masked(FIN | RSV1 | opcode, b"")) == ([], PROTOCOL_ERROR)


@pytest.mark.parametrize("first", [RSV1, 0])
def test_the_bit_is_only_on_the_first_frame_of_a_message(first: int) -> None:
    begun = masked(first | Opcode.TEXT, HELLO if first else b"Hello")
    assert receive(begun, masked(FIN | RSV1 | Opcode.CONTINUATION, b"")) == ([], PROTOCOL_ERROR)


def test_what_was_not_agreed_on_is_refused() -> None:
    receiver = Receiver(LIMIT)
    receiver.receive_data(masked(FIN | RSV1 | Opcode.TEXT, HELLO))
    assert receiver.violation == Close(PROTOCOL_ERROR, "a reserved bit is set that no extension gives a meaning here")


def test_not_every_message_need_be_compressed() -> None:
    plain, compressed = masked(FIN | Opcode.TEXT, b"plain"), masked(FIN | RSV1 | Opcode.BINARY, deflated(b"\xff" * 99))
    ping = masked(FIN | Opcode.PING, b"p")
    fragments = masked(RSV1 | Opcode.TEXT, HELLO[:4]) + ping + masked(FIN | Opcode.CONTINUATION, HELLO[4:])
    no_takeover = Agreement(False, False, 15, 15)
    for reads in ([plain, compressed, fragments, plain], one_by_one(plain + compressed + fragments + plain)):
        assert receive(*reads, agreement=no_takeover) == (["plain", b"\xff" * 99, "Hello", "plain"], None)


# What is wrong


def test_what_cannot_be_inflated_is_refused() -> None:
    receiver = Receiver(LIMIT, Inflater(DEFAULT))
    receiver.receive_data(masked(FIN | RSV1 | Opcode.TEXT, b"\xff\xff"))
    assert receiver.violation == Close(INVALID_DATA, "what came cannot be inflated")


def test_a_window_larger_than_agreed_on_is_refused() -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    frames = []
    for message in (b"beginning" + bytes(range(256)) * 4, b"beginning"):
        data = compressor.compress(message) + compressor.flush(zlib.Z_SYNC_FLUSH)
        frames.append(masked(FIN | RSV1 | Opcode.BINARY, data[:-4]))
    assert receive(*frames, agreement=Agreement(True, True, 15, 9))[1] == INVALID_DATA
    assert receive(*frames, agreement=Agreement(True, True, 15, 15))[1] is None


@pytest.mark.parametrize("cut", [1, 4, 100])
def test_text_is_refused_where_it_stops_to_be_utf8(cut: int) -> None:
    bad = deflated(b"good \xff and much more" + bytes(range(256)))
    assert receive(masked(FIN | RSV1 | Opcode.TEXT, bad)) == ([], INVALID_DATA)
    unfinished = head(FIN | RSV1 | Opcode.TEXT, len(bad) + 1) + masked(0, bad)[-len(bad) :]
    assert receive(*[unfinished[i : i + cut] for i in range(0, len(unfinished), cut)]) == ([], INVALID_DATA)
    assert receive(masked(FIN | RSV1 | Opcode.TEXT, deflated(b"\xc3"))) == ([], INVALID_DATA)


# Bombs


@pytest.mark.parametrize("limit", [1, 5, 70_000])
def test_what_counts_is_what_a_message_inflates_to(limit: int) -> None:
    for size, code in ((limit, None), (limit + 1, TOO_BIG)):
        data = deflated(bytes(size))
        whole = masked(FIN | RSV1 | Opcode.BINARY, data)
        fragments = [masked(RSV1 | Opcode.BINARY, data[:2]), masked(FIN, data[2:])]
        for reads in ([whole], one_by_one(whole), fragments):
            assert receive(*reads, limit=limit) == ([] if code else [bytes(size)], code)


def test_a_message_may_be_longer_deflated_than_inflated() -> None:
    stored = b"".join(b"\x00\x01\x00\xfe\xff" + bytes([byte]) for byte in b"stored") + b"\x00"
    assert receive(masked(FIN | RSV1 | Opcode.TEXT, stored), limit=6) == (["stored"], None)


def test_of_a_bomb_no_more_is_inflated_than_a_message_may_have() -> None:
    bomb = masked(FIN | RSV1 | Opcode.BINARY, deflated(bytes(1 << 26)))
    assert len(bomb) < 1 << 17
    tracemalloc.start()
    try:
        assert receive(bomb) == ([], TOO_BIG)
        assert tracemalloc.get_traced_memory()[1] < 4 * LIMIT
    finally:
        tracemalloc.stop()


def test_tiny_final_blocks_are_only_slow_in_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back from zlib behind each of them is a copy: it must not be of all that follows."""
    copied = 0

    class Counting:
        def __init__(self, bits: int) -> None:
            self._zlib = zlib.decompressobj(bits)

        def __getattr__(self, name: str) -> object:
            return getattr(self._zlib, name)

        def decompress(self, data: bytes, limit: int) -> bytes:
            nonlocal copied
            inflated = self._zlib.decompress(data, limit)
            copied += len(self._zlib.unused_data)
            return inflated

    monkeypatch.setattr("tricorn.protocol.deflate.decompressobj", Counting)
    blocks = 10_000
    assert receive(masked(FIN | RSV1 | Opcode.BINARY, FINAL_BLOCK * blocks)) == ([b""], None)
    assert copied < blocks * 300


# What is sent

payloads = st.lists(st.one_of(st.binary(max_size=300), st.binary(max_size=9).map(lambda b: b * 999)), max_size=6)


def their_view(agreement: Agreement) -> PerMessageDeflate:
    return PerMessageDeflate(
        not agreement.server_takeover,
        not agreement.client_takeover,
        agreement.server_bits,
        max(9, agreement.client_bits),
    )


def unframed(data: bytes) -> TheirFrame:
    """The one unmasked frame that this is."""
    size, start = data[1], 2
    if size == 126:
        size, start = int.from_bytes(data[2:4], "big"), 4
    assert len(data) == start + size
    return TheirFrame(TheirOpcode(data[0] & 0x0F), data[start:], bool(data[0] & FIN), bool(data[0] & RSV1))


@settings(derandomize=True)
@given(payloads, st.sampled_from(AGREEMENTS))
def test_they_inflate_what_we_deflate(messages: list[bytes], agreement: Agreement) -> None:
    deflater, theirs = Deflater(agreement), their_view(agreement)
    for message in messages:
        frame = unframed(deflater.frame(Opcode.BINARY, message))
        assert (frame.opcode, frame.fin, frame.rsv1) == (TheirOpcode.BINARY, True, bool(message))
        assert bytes(theirs.decode(frame).data) == message


@settings(derandomize=True)
@given(payloads, st.sampled_from([each for each in AGREEMENTS if each.client_bits > 8]))
def test_we_inflate_what_they_deflate(messages: list[bytes], agreement: Agreement) -> None:
    receiver, theirs = Receiver(LIMIT, Inflater(agreement)), their_view(agreement)
    for message in messages:
        data = TheirFrame(TheirOpcode.BINARY, message).serialize(mask=True, extensions=[theirs])
        assert receiver.receive_data(data) == [message]


@pytest.mark.parametrize(("takeover", "least", "most"), [(True, 15, 25), (False, 75, 90)])
def test_how_much_smaller_the_events_of_a_chat_get(takeover: bool, least: int, most: int) -> None:
    """In %, as docs/operations.md has it."""
    words = Random(1).choices(["the", "agent", "looks", "up", "a", "forecast", "for", "Oslo", "and", "rain"], k=1000)
    events = [
        f'{{"type":"agent_message","conversation":"c-12ab","seq":{seq},"at":{1700000000 + seq}.12,'
        f'"run":"r-9f3a","text":"{" ".join(words[seq : seq + seq % 8 + 1])}"}}'.encode()
        for seq in range(900)
    ]
    deflater = Deflater(Agreement(takeover, takeover, WINDOW_BITS, WINDOW_BITS))
    deflated = sum(len(deflater.frame(Opcode.TEXT, event)) for event in events)
    assert least <= deflated / sum(map(len, events)) * 100 <= most


def test_a_failure_to_deflate_spoils_nothing_that_follows() -> None:
    deflater, theirs = Deflater(DEFAULT), their_view(DEFAULT)
    for message in (b"before", None, b"after", b"before"):
        if message is None:
            with pytest.raises(TypeError):
                deflater.frame(Opcode.TEXT, "not bytes")  # type: ignore[arg-type]
        else:
            assert bytes(theirs.decode(unframed(deflater.frame(Opcode.TEXT, message))).data) == message


@pytest.mark.parametrize(
    ("agreement", "most"),
    [
        (Agreement(True, True, WINDOW_BITS, WINDOW_BITS), 52),
        (Agreement(True, True, WINDOW_BITS, 15), 80),
        (Agreement(False, False, WINDOW_BITS, 15), 1),
    ],
)
def test_what_a_connection_costs_between_messages(agreement: Agreement, most: int) -> None:
    """In kB, as docs/operations.md has it."""
    message = bytes(range(256)) * 300
    sent = masked(FIN | RSV1 | Opcode.BINARY, deflated(message))
    tracemalloc.start()
    try:
        deflater, inflater = Deflater(agreement), Inflater(agreement)
        unused = tracemalloc.take_snapshot()
        assert Receiver(LIMIT, inflater).receive_data(sent) == [message]
        assert deflater.frame(Opcode.BINARY, message)
        used = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    assert allocated(unused) < 1000
    assert allocated(used) <= most * 1000


def allocated(snapshot: tracemalloc.Snapshot) -> int:
    """Bytes that the module under test holds; other threads of this process allocate too."""
    ours = snapshot.filter_traces([tracemalloc.Filter(True, deflate.__file__)])
    return sum(trace.size for trace in ours.traces)


# §6.1: messages that are sent in fragments


MESSAGES = st.lists(
    st.one_of(
        st.tuples(st.just(True), st.binary(max_size=300)),
        st.tuples(st.just(False), st.lists(st.binary(max_size=100) | st.just(b""), min_size=1, max_size=6)),
    ),
    max_size=8,
)


@pytest.mark.parametrize("takeover", [True, False])
@given(messages=MESSAGES, bits=st.integers(9, 15))
def test_whole_and_fragmented_messages_are_inflated_by_websockets(
    takeover: bool, messages: list[tuple[bool, bytes | list[bytes]]], bits: int
) -> None:
    deflater = Deflater(Agreement(takeover, True, bits, 15))
    theirs = PerMessageDeflate(not takeover, False, bits, 15)
    for whole, content in messages:
        if whole:
            assert isinstance(content, bytes)
            frames = [deflater.frame(Opcode.BINARY, content)]
            expected = content
        else:
            opcodes = [Opcode.BINARY, *[Opcode.CONTINUATION] * (len(content) - 1)]
            last = len(content) - 1
            frames = [deflater.fragment(opcodes[i], bytes(part), last=i == last) for i, part in enumerate(content)]
            expected = b"".join(content)
        assert b"".join(theirs.decode(their_frame(each)).data for each in frames) == expected


@pytest.mark.parametrize("takeover", [True, False])
@pytest.mark.parametrize("content", [*product((b"", b"one", b"two" * 100), repeat=3)])
def test_empty_fragments_at_each_position(takeover: bool, content: tuple[bytes, ...]) -> None:
    """Behind a message and before one, since the compressor may remember it."""
    deflater = Deflater(Agreement(takeover, True, 12, 15))
    theirs = PerMessageDeflate(not takeover, False, 12, 15)
    for before in (b"before", b""):
        assert theirs.decode(their_frame(deflater.frame(Opcode.TEXT, before))).data == before
        first, *middle, last = content
        frames = [
            deflater.fragment(Opcode.TEXT, first, last=False),
            *[deflater.fragment(Opcode.CONTINUATION, each, last=False) for each in middle],
            deflater.fragment(Opcode.CONTINUATION, last, last=True),
        ]
        assert b"".join(theirs.decode(their_frame(each)).data for each in frames) == b"".join(content)


@pytest.mark.parametrize("takeover", [True, False])
def test_frames_can_be_shared_if_nothing_is_remembered(takeover: bool) -> None:
    deflater = Deflater(Agreement(takeover, True, 12, 15))
    assert deflater.shareable == (None if takeover else 12)
    first, second = (deflater.frame(Opcode.TEXT, b"again and again") for _ in range(2))
    assert (first == second) is not takeover


def their_frame(frame: bytes) -> TheirFrame:
    """A frame of the server, as `websockets` has it."""
    size, payload = frame[1], frame[2:]
    if size == 126:
        size, payload = int.from_bytes(frame[2:4], "big"), frame[4:]
    assert len(payload) == size
    return TheirFrame(TheirOpcode(frame[0] & 15), payload, fin=frame[0] >= FIN, rsv1=bool(frame[0] & RSV1))
