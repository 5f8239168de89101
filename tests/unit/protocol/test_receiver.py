"""RFC 6455 in `tricorn.protocol.receiver`: by section, then as properties, with frames made by `websockets`."""

from __future__ import annotations

from itertools import chain, pairwise
from sys import getsizeof
from typing import NamedTuple
from zlib import DEFLATED, Z_SYNC_FLUSH, compressobj

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Close as TheirClose
from websockets.frames import Frame as TheirFrame
from websockets.frames import Opcode as TheirOpcode
from websockets.protocol import State
from websockets.uri import parse_uri

from fixtures.frames import FIN, KEY, head, is_prefix_of_utf8, is_utf8, masked, one_by_one
from tricorn.protocol.close import (
    INTERNAL_ERROR,
    INVALID_DATA,
    NO_STATUS,
    NORMAL,
    PROTOCOL_ERROR,
    TOO_BIG,
    Close,
    may_be_sent,
)
from tricorn.protocol.deflate import Agreement, Inflater
from tricorn.protocol.frames import RSV1, Opcode, close_frame, frame
from tricorn.protocol.receiver import FRAMES_AT_ONCE, Message, Receiver

LIMIT = 1 << 20
TEXT, BINARY, CONTINUATION = FIN | Opcode.TEXT, FIN | Opcode.BINARY, FIN | Opcode.CONTINUATION
CLOSE, PING, PONG = FIN | Opcode.CLOSE, FIN | Opcode.PING, FIN | Opcode.PONG
SIZES = [0, 1, 125, 126, 127, 65535, 65536]

properties = settings(derandomize=True, max_examples=100)


class Seen(NamedTuple):
    """All that a receiver tells."""

    messages: list[Message]
    pings: list[bytes]
    closed: Close | None
    violation: Close | None

    @property
    def code(self) -> int | None:
        return None if self.violation is None else self.violation.code


def receive(*reads: bytes, limit: int = LIMIT) -> Seen:
    receiver = Receiver(limit)
    messages = [message for read in reads for message in receiver.receive_data(read)]
    return Seen(messages, receiver.pings, receiver.closed, receiver.violation)


# §5.2 and §5.7: what is sent


@pytest.mark.parametrize(
    ("opcode", "payload", "wire"),
    [
        (Opcode.TEXT, b"Hello", b"\x81\x05Hello"),
        (Opcode.PING, b"Hello", b"\x89\x05Hello"),
        (Opcode.BINARY, bytes(256), b"\x82\x7e\x01\x00" + bytes(256)),
        (Opcode.BINARY, bytes(65536), b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00" + bytes(65536)),
    ],
    ids=["text", "ping", "256 bytes", "64 KiB"],
)
def test_the_unmasked_examples_of_the_rfc(opcode: Opcode, payload: bytes, wire: bytes) -> None:
    assert frame(opcode, payload) == wire


@pytest.mark.parametrize("size", SIZES)
def test_lengths_are_sent_in_the_shortest_form(size: int) -> None:
    extra = 0 if size <= 125 else 2 if size <= 65535 else 8
    assert len(frame(Opcode.BINARY, bytes(size))) == 2 + extra + size


# §5.2: what is received


@pytest.mark.parametrize("size", SIZES)
def test_lengths_are_received_in_the_shortest_form(size: int) -> None:
    payload = bytes(i % 251 for i in range(size))
    assert receive(masked(BINARY, payload)) == ([payload], [], None, None)


@pytest.mark.parametrize(("size", "width"), [(0, 2), (125, 2), (0, 8), (125, 8), (126, 8), (65535, 8)])
def test_a_length_in_a_longer_form_is_refused_before_its_payload(size: int, width: int) -> None:
    assert receive(head(BINARY, size, width=width)).code == PROTOCOL_ERROR


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1])
def test_a_length_with_the_most_significant_bit_set_is_refused(length: int) -> None:
    assert receive(head(BINARY, length), limit=1 << 64).code == PROTOCOL_ERROR


@pytest.mark.parametrize("bit", [0x40, 0x20, 0x10])
@pytest.mark.parametrize("first", [TEXT, BINARY, PING, CLOSE])
def test_a_reserved_bit_is_refused_at_the_second_byte(bit: int, first: int) -> None:
    assert receive(masked(first | bit)[:2]).code == PROTOCOL_ERROR


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
def test_an_undefined_opcode_is_refused_at_the_second_byte(opcode: int) -> None:
    assert receive(masked(FIN | opcode)[:2]).code == PROTOCOL_ERROR


# §5.1 and §5.3: masking


def test_the_masked_example_of_the_rfc() -> None:
    assert receive(b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58").messages == ["Hello"]


@pytest.mark.parametrize("opcode", Opcode)
def test_an_unmasked_frame_is_refused(opcode: Opcode) -> None:
    assert receive(frame(opcode, b"")).code == PROTOCOL_ERROR


@pytest.mark.parametrize("cut", range(1, 24))
def test_the_mask_goes_on_where_a_frame_was_cut(cut: int) -> None:
    data = masked(TEXT, b"a mask has 4 bytes")
    assert receive(data[:cut], data[cut:]).messages == ["a mask has 4 bytes"]


# §5.4: fragmentation


FRAGMENTED = (
    masked(Opcode.TEXT, b"one ")
    + masked(PING, b"p1")
    + masked(Opcode.CONTINUATION, "tw\u00f6 ".encode()[:3])
    + masked(PONG, b"unasked")
    + masked(Opcode.CONTINUATION)
    + masked(PING, b"p2")
    + masked(CONTINUATION, "tw\u00f6 ".encode()[3:])
    + masked(Opcode.BINARY, b"\xff")
    + masked(CONTINUATION, b"\xfe")
    + masked(TEXT, b"whole")
)


@pytest.mark.parametrize("reads", [[FRAGMENTED], one_by_one(FRAGMENTED)], ids=["one read", "one byte a read"])
def test_control_frames_may_stand_between_fragments(reads: list[bytes]) -> None:
    assert receive(*reads) == (["one tw\u00f6 ", b"\xff\xfe", "whole"], [b"p1", b"p2"], None, None)


@pytest.mark.parametrize("fin", [0, FIN])
def test_a_continuation_of_nothing_is_refused(fin: int) -> None:
    assert receive(masked(fin, b"x")).code == PROTOCOL_ERROR
    done = masked(Opcode.TEXT, b"a") + masked(CONTINUATION, b"b")
    seen = receive(done + masked(fin, b"x"))
    assert (seen.messages, seen.code) == (["ab"], PROTOCOL_ERROR)


@pytest.mark.parametrize("first", [TEXT, BINARY, Opcode.TEXT, Opcode.BINARY])
@pytest.mark.parametrize("begun", [Opcode.TEXT, Opcode.BINARY])
def test_a_new_message_before_the_end_of_the_last_is_refused(begun: int, first: int) -> None:
    assert receive(masked(begun, b"a") + masked(first, b"b")).code == PROTOCOL_ERROR


def test_a_message_of_empty_fragments_is_empty() -> None:
    for opcode, empty in ((Opcode.TEXT, ""), (Opcode.BINARY, b"")):
        assert receive(masked(opcode), masked(Opcode.CONTINUATION), masked(CONTINUATION)).messages == [empty]


# §5.5: control frames


@pytest.mark.parametrize("size", [0, 1, 124, 125])
def test_pings_are_handed_out_and_pongs_are_not(size: int) -> None:
    assert receive(masked(PING, bytes(size)) + masked(PONG, bytes(size))) == ([], [bytes(size)], None, None)


def test_whoever_answers_the_pings_clears_them() -> None:
    receiver = Receiver(LIMIT)
    receiver.receive_data(masked(PING, b"1"))
    receiver.pings.clear()
    receiver.receive_data(masked(PING, b"2"))
    assert receiver.pings == [b"2"]


@pytest.mark.parametrize("first", [CLOSE, PING, PONG])
@pytest.mark.parametrize("size", [126, 65536])
def test_a_long_control_frame_is_refused_at_the_second_byte(first: int, size: int) -> None:
    assert receive(head(first, size)[:2]).code == PROTOCOL_ERROR


@pytest.mark.parametrize("opcode", [Opcode.CLOSE, Opcode.PING, Opcode.PONG])
def test_a_fragmented_control_frame_is_refused_at_the_second_byte(opcode: Opcode) -> None:
    assert receive(masked(opcode)[:2]).code == PROTOCOL_ERROR


def test_control_frames_do_not_count_as_message() -> None:
    data = masked(Opcode.BINARY, bytes(10)) + masked(PING, bytes(125)) + masked(CONTINUATION)
    assert receive(data, limit=10) == ([bytes(10)], [bytes(125)], None, None)


# §5.5.1 and §7: close


@pytest.mark.parametrize(
    ("payload", "close"),
    [
        (b"", Close(NO_STATUS)),
        (b"\x03\xe8", Close(NORMAL)),
        (b"\x03\xe8" + "adi\u00f3s".encode(), Close(NORMAL, "adi\u00f3s")),
        (b"\x13\x87" + b"x" * 123, Close(4999, "x" * 123)),
    ],
)
def test_a_close_frame_is_received(payload: bytes, close: Close) -> None:
    for reads in ([masked(CLOSE, payload)], one_by_one(masked(CLOSE, payload))):
        assert receive(*reads) == ([], [], close, None)


def test_every_close_code_is_checked() -> None:
    allowed = {code for code in range(1 << 16) if receive(masked(CLOSE, code.to_bytes(2, "big"))).violation is None}
    assert allowed == {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}
    assert receive(masked(CLOSE, b"\x03\xed")).code == PROTOCOL_ERROR


def test_a_close_payload_of_one_byte_is_refused() -> None:
    violation = Close(PROTOCOL_ERROR, "a close frame has a payload of one byte")
    assert receive(masked(CLOSE, b"\x03")) == ([], [], None, violation)


def test_a_close_reason_must_be_utf8() -> None:
    seen = receive(masked(CLOSE, b"\x03\xe8\xff"))
    assert (seen.closed, seen.code) == (None, INVALID_DATA)


@pytest.mark.parametrize("one_read", [True, False])
def test_what_comes_after_a_close_frame_is_ignored(one_read: bool) -> None:
    after = masked(TEXT, b"late") + masked(PING, b"late") + b"\xff\xff"
    reads = [masked(TEXT, b"in time"), masked(CLOSE, b"\x03\xe8"), after]
    seen = receive(b"".join(reads)) if one_read else receive(*reads)
    assert seen == (["in time"], [], Close(NORMAL), None)


def test_a_close_frame_may_cut_a_message_short() -> None:
    assert receive(masked(Opcode.TEXT, b"unfin") + masked(CLOSE, b"\x03\xe8")) == ([], [], Close(NORMAL), None)


def test_a_close_without_a_code_is_sent_empty() -> None:
    assert close_frame(Close(NO_STATUS, "dropped with the code")) == b"\x88\x00"


@pytest.mark.parametrize(
    ("reason", "sent"),
    [
        ("bye", "bye"),
        ("x" * 123, "x" * 123),
        ("x" * 124, "x" * 123),
        ("x" * 122 + "\u00e9", "x" * 122),
        ("x" * 121 + "\u00e9", "x" * 121 + "\u00e9"),
        ("x" * 120 + "\U0001f984", "x" * 120),
    ],
)
def test_a_long_reason_is_cut_at_a_character(reason: str, sent: str) -> None:
    payload = b"\x03\xf3" + sent.encode()
    assert close_frame(Close(INTERNAL_ERROR, reason)) == bytes((0x88, len(payload))) + payload


# §8.1: UTF-8


BAD = {
    "no such byte": b"ok\xff",
    "a continuation at the start": b"\x80",
    "overlong, 2 bytes": b"\xc0",
    "overlong, 3 bytes": b"\xe0\x9f",
    "overlong, 4 bytes": b"\xf0\x8f",
    "a surrogate": b"\xed\xa0",
    "above U+10FFFF": b"\xf4\x90",
    "above any": b"\xf5",
    "cut by a letter": b"\xce\xba\xe1\xbdx",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("good", ["", "\u03ba\u1f79\u03c3\u03bc\u03b5 \U0010ffff "], ids=["at once", "after text"])
def test_text_is_refused_at_its_first_bad_byte(bad: bytes, good: str) -> None:
    payload = good.encode() + bad
    for first in (TEXT, Opcode.TEXT):
        data = head(first, len(payload) + 50) + masked(first, payload)[6:]
        receiver = Receiver(LIMIT)
        for read in one_by_one(data[:-1]):
            receiver.receive_data(read)
            assert receiver.violation is None
        receiver.receive_data(data[-1:])
        assert receiver.violation is not None
        assert receiver.violation.code == INVALID_DATA
        assert receive(data).code == INVALID_DATA
        assert receive(masked(first, payload)).code == INVALID_DATA


def test_a_bad_byte_in_a_later_fragment_is_refused_there() -> None:
    begun = masked(Opcode.TEXT, b"\xed") + masked(PING)
    assert receive(begun).violation is None
    assert receive(begun, head(Opcode.CONTINUATION, 9) + bytes([0xA0 ^ KEY[0]])).code == INVALID_DATA


@pytest.mark.parametrize("cut_off", [b"\xc3", b"\xe2\x82", b"\xf0\x9f\xa6"])
def test_text_that_ends_inside_a_character_is_refused(cut_off: bytes) -> None:
    assert receive(masked(TEXT, cut_off)).code == INVALID_DATA
    assert receive(masked(Opcode.TEXT, cut_off)).violation is None
    assert receive(masked(Opcode.TEXT, cut_off), masked(CONTINUATION)).code == INVALID_DATA


def test_one_text_does_not_lean_on_the_last() -> None:
    data = masked(Opcode.TEXT, b"\xc3") + masked(CONTINUATION, b"\xa9") + masked(Opcode.TEXT, b"\xa9")
    seen = receive(data)
    assert (seen.messages, seen.code) == (["\u00e9"], INVALID_DATA)


def test_binary_need_not_be_utf8() -> None:
    data = masked(BINARY, b"\xff") + masked(Opcode.BINARY, b"\xff") + masked(CONTINUATION, b"\xc3")
    assert receive(*one_by_one(data)).messages == [b"\xff", b"\xff\xc3"]


# §10.4: limits


def test_what_comes_behind_a_close_frame_in_pieces_is_ignored() -> None:
    close = masked(CLOSE, b"\x03\xe8bye")
    for cut in range(len(close)):
        seen = receive(close[:cut], close[cut:] + b"\xff" * 10)
        assert (seen.closed, seen.violation) == (Close(1000, "bye"), None)


@pytest.mark.parametrize(
    ("came", "within"),
    [
        (b"", True),
        (masked(TEXT, b"x" * 100), True),
        (head(BINARY, 11), False),
        (head(BINARY, 10) + b"x", True),
        (head(Opcode.BINARY, 5) + b"xxxxx" + head(CONTINUATION, 6), False),
        (head(Opcode.BINARY, 5) + b"xxxxx" + head(PING, 100), True),
    ],
)
def test_a_lower_limit_holds_for_a_message_that_has_begun(came: bytes, within: bool) -> None:
    receiver = Receiver(LIMIT)
    receiver.receive_data(came)
    receiver.limit_messages(10)
    assert (receiver.violation is None) is within
    if within:
        receiver.limit_messages(LIMIT)
        assert receiver.violation is None


@pytest.mark.parametrize("limit", [0, 1, 125, 126, 65535, 65536])
def test_a_message_is_refused_at_the_head_that_passes_the_limit(limit: int) -> None:
    for first in (TEXT, BINARY, Opcode.TEXT, Opcode.BINARY):
        assert receive(head(first, limit), limit=limit).violation is None
        violation = Close(TOO_BIG, f"a message may have at most {limit} bytes")
        assert receive(head(first, limit + 1), limit=limit) == ([], [], None, violation)
    assert receive(masked(BINARY, bytes(limit)), limit=limit).messages == [bytes(limit)]


def test_fragments_count_together() -> None:
    begun = [masked(Opcode.BINARY, bytes(6)), masked(Opcode.CONTINUATION, bytes(3))]
    assert receive(*begun, masked(CONTINUATION, bytes(1)), limit=10).messages == [bytes(10)]
    assert receive(*begun, head(CONTINUATION, 2), limit=10).code == TOO_BIG
    assert receive(*begun, masked(CONTINUATION, bytes(1)), head(BINARY, 10), limit=10).violation is None


def test_bytes_are_counted_not_characters() -> None:
    assert receive(masked(TEXT, "\u20ac\u20ac".encode()), limit=6).messages == ["\u20ac\u20ac"]
    assert receive(masked(TEXT, "\u20ac\u20ac".encode()), limit=5).code == TOO_BIG


def size_of(receiver: Receiver) -> int:
    return sum(getsizeof(getattr(receiver, name)) for name in Receiver.__slots__)


@pytest.mark.parametrize("opcode", [Opcode.TEXT, Opcode.BINARY])
def test_endless_empty_fragments_take_no_memory(opcode: Opcode) -> None:
    receiver = Receiver(LIMIT)
    receiver.receive_data(masked(opcode, b"x"))
    before = size_of(receiver)
    for _ in range(100):
        assert receiver.receive_data(masked(Opcode.CONTINUATION) * 100) == []
    assert size_of(receiver) == before
    assert receiver.violation is None


def test_an_announced_length_takes_no_memory() -> None:
    receiver = Receiver(1 << 62)
    before = size_of(receiver)
    receiver.receive_data(head(BINARY, 1 << 62))
    assert size_of(receiver) < before + 100


def test_unasked_pongs_take_no_memory() -> None:
    receiver = Receiver(LIMIT)
    before = size_of(receiver)
    receiver.receive_data(masked(PONG, bytes(125)) * 1000)
    while receiver.more:
        receiver.receive_data(b"")
    assert size_of(receiver) < before + 200


def test_pongs_are_kept_that_are_awaited() -> None:
    receiver = Receiver(LIMIT)
    receiver.awaited = {b"one": 1, b"two": 2}
    receiver.receive_data(masked(PONG, b"two") + masked(PONG) + masked(PONG, b"three") + masked(PONG, b"one"))
    assert receiver.pongs == [b"two", b"one"]


@pytest.mark.parametrize("opcode", [Opcode.TEXT, Opcode.BINARY])
@pytest.mark.parametrize("size", [1, 16, 125])
def test_an_unfinished_message_costs_its_bytes(opcode: Opcode, size: int) -> None:
    """Kept piece by piece, fragments of 16 bytes took five times their size."""
    receiver = Receiver(LIMIT)
    before = size_of(receiver)
    total = LIMIT // 2
    receiver.receive_data(masked(opcode, b"x" * size))
    fragment = masked(Opcode.CONTINUATION, b"x" * size)
    for _ in range(total // size - 1):
        receiver.receive_data(fragment)
    assert receiver.violation is None
    assert size_of(receiver) - before < 1.25 * total + 500
    [message] = receiver.receive_data(masked(CONTINUATION))
    assert len(message) == total // size * size


# Turns


@pytest.mark.parametrize("frame", [masked(TEXT, b"hi"), masked(BINARY), masked(PING), masked(PONG, b"x")])
def test_a_call_works_through_so_many_frames_and_no_more(frame: bytes) -> None:
    receiver = Receiver(LIMIT)
    receiver.receive_data(frame * 1000)
    begun = [receiver.frames]
    while receiver.more:
        receiver.receive_data(b"")
        begun.append(receiver.frames)
    assert begun == [*[FRAMES_AT_ONCE] * (1000 // FRAMES_AT_ONCE), 1000 % FRAMES_AT_ONCE]


def test_nothing_is_lost_between_turns() -> None:
    receiver = Receiver(LIMIT)
    frames = [masked(TEXT, b"%d" % number) for number in range(300)]
    received = receiver.receive_data(b"".join(frames)[:-3])
    while receiver.more:
        received += receiver.receive_data(b"")
    received += receiver.receive_data(b"".join(frames)[-3:])
    assert received == [str(number) for number in range(300)]
    assert not receiver.more


def test_a_frame_that_is_not_complete_leaves_nothing_to_do() -> None:
    receiver = Receiver(LIMIT)
    receiver.receive_data(masked(PING) * FRAMES_AT_ONCE)
    assert not receiver.more
    receiver.receive_data(masked(PING) * FRAMES_AT_ONCE + masked(PING)[:1])
    assert receiver.more
    receiver.receive_data(b"")
    assert (receiver.more, receiver.frames) == (False, 0)


def test_a_call_inflates_so_much_and_the_rest_of_its_message() -> None:
    zlib = compressobj(9, DEFLATED, -12)
    deflated = (zlib.compress(bytes(60_000)) + zlib.flush(Z_SYNC_FLUSH))[:-4]
    receiver = Receiver(LIMIT, Inflater(Agreement(False, False, 12, 12)))
    messages = receiver.receive_data(masked(BINARY | RSV1, deflated) * 10)
    assert (len(messages), receiver.inflated, receiver.more) == (2, 120_000, True)
    while receiver.more:
        messages += receiver.receive_data(b"")
    assert len(messages) == 10


# Properties


class Script(NamedTuple):
    """Valid frames, and what a receiver must make of them."""

    frames: list[bytes]
    seen: Seen


pieces = st.lists(st.integers(0, 300), max_size=4)
controls = st.lists(
    st.tuples(st.sampled_from([TheirOpcode.PING, TheirOpcode.PONG]), st.binary(max_size=125)), max_size=2
)
message_payloads = st.one_of(
    st.text(max_size=200), st.binary(max_size=300), st.binary(max_size=3).map(lambda b: b * 300)
)
close_reasons = st.text(max_size=30)
close_codes = st.sampled_from([code for code in range(1000, 5000) if may_be_sent(code)])
closes = st.one_of(st.just(Close(NO_STATUS)), st.builds(Close, close_codes, close_reasons))


def split(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(bounds)]


def theirs(opcode: TheirOpcode, data: bytes, *, fin: bool = True) -> bytes:
    return TheirFrame(opcode, data, fin).serialize(mask=True)


@st.composite
def scripts(draw: st.DrawFn, *, may_close: bool = True) -> Script:
    """Messages in fragments with control frames between them, masked and framed by `websockets`."""
    frames: list[bytes] = []
    seen = Seen([], [], None, None)
    for payload in draw(st.lists(message_payloads, max_size=4)):
        opcode = TheirOpcode.TEXT if isinstance(payload, str) else TheirOpcode.BINARY
        fragments = split(payload.encode() if isinstance(payload, str) else payload, draw(pieces))
        for index, fragment in enumerate(fragments):
            for control, data in draw(controls):
                frames.append(theirs(control, data))
                if control is TheirOpcode.PING:
                    seen.pings.append(data)
            frames.append(theirs(opcode if not index else TheirOpcode.CONT, fragment, fin=index + 1 == len(fragments)))
        seen.messages.append(payload)
    if may_close and draw(st.booleans()):
        close = draw(closes)
        seen = seen._replace(closed=close)
        data = b"" if close.code == NO_STATUS else TheirClose(*close).serialize()
        frames.append(theirs(TheirOpcode.CLOSE, data))
    return Script(frames, seen)


@properties
@given(scripts(), st.data())
def test_where_the_stream_is_cut_makes_no_difference(script: Script, data: st.DataObject) -> None:
    stream = b"".join(script.frames)
    assert receive(stream) == script.seen
    assert receive(*script.frames) == script.seen
    assert receive(*one_by_one(stream)) == script.seen
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=20))
    assert receive(*split(stream, places)) == script.seen


@properties
@given(st.sampled_from([Opcode.TEXT, Opcode.BINARY]), st.one_of(st.binary(), st.sampled_from(SIZES).map(bytes)))
def test_their_client_understands_what_is_sent(opcode: Opcode, payload: bytes) -> None:
    client = ClientProtocol(parse_uri("ws://host/"), state=State.OPEN)
    client.receive_data(frame(opcode, payload) + frame(Opcode.PING, payload[:125]) + frame(Opcode.PONG, payload[:125]))
    assert client.parser_exc is None
    assert [(event.opcode, event.fin, bytes(event.data)) for event in client.events_received()] == [
        (opcode, True, payload),
        (Opcode.PING, True, payload[:125]),
        (Opcode.PONG, True, payload[:125]),
    ]


@properties
@given(closes)
def test_their_client_understands_a_close(close: Close) -> None:
    client = ClientProtocol(parse_uri("ws://host/"), state=State.OPEN)
    client.receive_data(close_frame(close))
    assert client.parser_exc is None
    assert client.close_rcvd == TheirClose(*close)


@properties
@given(close_codes, st.text(min_size=1).map(lambda text: text * 124))
def test_a_cut_reason_is_the_longest_that_fits(code: int, reason: str) -> None:
    sent = TheirClose.parse(close_frame(Close(code, reason))[2:])
    cut = next(cut for cut in range(123, 0, -1) if len(reason[:cut].encode()) <= 123)
    assert (sent.code, sent.reason) == (code, reason[:cut])


@properties
@given(st.lists(st.one_of(st.text(), st.binary()), max_size=5), st.binary(max_size=125), closes)
def test_what_their_client_sends_is_understood(messages: list[Message], ping: bytes, close: Close) -> None:
    client = ClientProtocol(parse_uri("ws://host/"), state=State.OPEN)
    for message in messages:
        if isinstance(message, str):
            client.send_text(message.encode())
        else:
            client.send_binary(message, fin=False)
            client.send_ping(ping)
            client.send_continuation(b"", fin=True)
    client.send_close(*(() if close.code == NO_STATUS else close))
    pings = [ping for message in messages if isinstance(message, bytes)]
    assert receive(b"".join(client.data_to_send())) == (messages, pings, close, None)


heads = st.builds(lambda first, second: bytes((first, second)) + KEY, st.integers(0, 255), st.integers(0, 255))


@properties
@given(st.lists(st.one_of(heads, st.binary(max_size=40), scripts().map(lambda script: b"".join(script.frames)))))
def test_nothing_raises_and_the_end_is_the_end(reads: list[bytes]) -> None:
    receiver = Receiver(1000)
    end = None
    for read in chain(reads, [masked(TEXT, b"x"), masked(PING), masked(CLOSE), b"\x00" * 200]):
        messages = receiver.receive_data(read)
        if end is None:
            end = (list(receiver.pings), receiver.closed, receiver.violation)
            if receiver.closed is None and receiver.violation is None:
                end = None
        else:
            assert messages == []
            assert (receiver.pings, receiver.closed, receiver.violation) == end
    assert end is not None
    assert (receiver.closed is None) != (receiver.violation is None)


mangled = st.lists(
    st.one_of(st.text(max_size=3).map(str.encode), st.sampled_from([*BAD.values(), b"\xf0", b"\x9f", b"\xc3"])),
    max_size=6,
).map(b"".join)


@properties
@given(mangled, pieces, st.booleans())
def test_text_is_what_decodes(payload: bytes, places: list[int], bytewise: bool) -> None:
    *fragments, last = split(payload, places)
    stream = b"".join(masked(0 if i else Opcode.TEXT, part) for i, part in enumerate(fragments))
    stream += masked(CONTINUATION if fragments else TEXT, last)
    seen = receive(*one_by_one(stream)) if bytewise else receive(stream)
    if is_utf8(payload):
        assert seen == ([payload.decode()], [], None, None)
    else:
        assert (seen.messages, seen.code) == ([], INVALID_DATA)


@properties
@given(mangled)
def test_text_is_refused_at_the_first_byte_that_no_text_can_have_there(payload: bytes) -> None:
    receiver = Receiver(LIMIT)
    receiver.receive_data(head(TEXT, len(payload) + 1))
    for end in range(1, len(payload) + 1):
        receiver.receive_data(bytes([payload[end - 1] ^ KEY[(end - 1) % 4]]))
        assert (receiver.violation is None) == is_prefix_of_utf8(payload[:end])


INVALID = {
    "unmasked": (frame(Opcode.TEXT, b"x"), PROTOCOL_ERROR),
    "reserved bit": (masked(TEXT | 0x40, b"x"), PROTOCOL_ERROR),
    "undefined opcode": (masked(FIN | 3, b"x"), PROTOCOL_ERROR),
    "long ping": (masked(PING, bytes(126)), PROTOCOL_ERROR),
    "fragmented ping": (masked(Opcode.PING), PROTOCOL_ERROR),
    "nothing to continue": (masked(CONTINUATION), PROTOCOL_ERROR),
    "close code": (masked(CLOSE, b"\x03\xee"), PROTOCOL_ERROR),
    "close of one byte": (masked(CLOSE, b"\x03"), PROTOCOL_ERROR),
    "close reason": (masked(CLOSE, b"\x03\xe8\xc3"), INVALID_DATA),
    "bad text": (masked(TEXT, b"\xff"), INVALID_DATA),
    "unfinished text": (masked(TEXT, b"\xc3"), INVALID_DATA),
    "too big": (head(BINARY, LIMIT + 1), TOO_BIG),
}


@properties
@given(scripts(may_close=False), st.sampled_from(sorted(INVALID)), scripts())
def test_what_came_before_a_violation_in_the_same_read_counts(script: Script, flaw: str, later: Script) -> None:
    invalid, code = INVALID[flaw]
    seen = receive(b"".join([*script.frames, invalid, *later.frames]))
    assert seen[:3] == script.seen[:3]
    assert seen.code == code
