"""`ws.send` of an iterable: one message in fragments (RFC 6455 §5.4), whole or the end of the connection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from math import inf
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode

import tricorn
from fixtures.handlers import MORE_THAN_SOCKETS_HOLD
from fixtures.wire import parse
from tricorn import Settings, WebSocket

Served = Callable[..., AbstractAsyncContextManager[Any]]

QUIET = Settings(ping_interval=inf, stall_timeout=inf, close_timeout=3)
BIG = bytes(MORE_THAN_SOCKETS_HOLD)


@pytest.fixture
def knows_no_fragments(hides_codes: bool) -> bool:
    """Whether messages go out whole, as ASGI has them."""
    return hides_codes


async def fragments(client: Any) -> list[bytes]:
    """The fragments of the next message, which must be continued as it should."""
    parts: list[bytes] = []
    while True:
        frame = await client.frame()
        assert frame is not None
        assert frame.opcode is (Opcode.CONT if parts else frame.opcode)
        assert frame.opcode in ((Opcode.CONT,) if parts else (Opcode.TEXT, Opcode.BINARY)), frame
        parts.append(bytes(frame.data))
        if frame.fin:
            return parts


def generator() -> Iterator[str]:
    yield "é"
    yield ""
    yield "b"


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        (["one", "two", "three"], [b"one", b"two", b"three"]),
        ([b"\xff", bytearray(b"\xfe"), memoryview(b"\xfd")], [b"\xff", b"\xfe", b"\xfd"]),
        (["one"], [b"one"]),
        (["", ""], [b"", b""]),
        ([b"", b"x" * 70_000, b""], [b"", b"x" * 70_000, b""]),
        (generator, ["é".encode(), b"", b"b"]),
        ({"a": 1, "b": 2}, [b"a", b"b"]),
    ],
)
async def test_each_item_is_a_fragment(
    hosted: Served, knows_no_fragments: bool, records: Any, message: Any, parts: list[bytes]
) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send(message() if callable(message) else message)
        await ws.send("whole")

    async with hosted(handler) as server, server.connect() as client:
        assert await fragments(client) == ([b"".join(parts)] if knows_no_fragments else parts)
        assert await client.receive() == "whole"
        assert await client.closed() == (1000, "")
    [record] = records.read("INFO")
    assert record["messages_sent"] == 2


async def test_text_stays_text_and_bytes_binary(hosted: Served) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send(["é", "a"])
        await ws.send([b"a", b"b"])

    async with hosted(handler) as server, server.connect() as client:
        opcodes: list[Opcode] = []
        while (frame := await client.frame()).opcode is not Opcode.CLOSE:
            opcodes += [] if frame.opcode is Opcode.CONT else [frame.opcode]
        assert opcodes == [Opcode.TEXT, Opcode.BINARY]


@pytest.mark.parametrize("empty", [[], (), {}, iter(())])
async def test_an_empty_iterable_sends_nothing(hosted: Served, empty: Iterable[str]) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send(empty)
        await ws.send("next")

    async with hosted(handler) as server, server.connect() as client:
        assert await client.receive() == "next"
        assert await client.closed() == (1000, "")


@pytest.mark.parametrize("wrong", [[1], [None], [["a"]], [3, b"a"]])
async def test_items_that_are_no_fragments(hosted: Served, wrong: Any) -> None:
    """Nothing was sent, so the connection goes on."""

    async def handler(ws: WebSocket) -> None:
        with pytest.raises(TypeError, match="must all be str or all be bytes"):
            await ws.send(wrong)
        await ws.send("next")

    async with hosted(handler) as server, server.connect() as client:
        assert await client.receive() == "next"
        assert await client.closed() == (1000, "")


# A message that stays incomplete


def broken() -> Iterator[str]:
    yield "one"
    yield "two"
    raise LookupError("no more")


def mixed() -> Iterator[Any]:
    yield "one"
    yield "two"
    yield b"three"
    yield "four"


def surrogate() -> Iterator[str]:
    yield "one"
    yield "two"
    yield "\ud800"
    yield "four"


MISTAKES = [(broken, "LookupError: no more"), (mixed, "TypeError"), (surrogate, "UnicodeEncodeError")]


async def to_the_end(server: Any) -> tuple[list[Frame], bytes]:
    """All frames of a client that answers nothing, but for the close frame at the end, and what is in that.

    `websockets` takes a close frame between fragments for a mistake; RFC 6455 §5.4 allows it.
    """
    async with server.open() as stream:
        await stream.send_all(server.client(stream).request())
        data = b"".join([part async for part in stream])
        *frames, close = [frame for _, frame in parse(data)]
        assert close.opcode is Opcode.CLOSE
        return frames, bytes(close.data)


@pytest.mark.parametrize(("message", "error"), MISTAKES)
async def test_an_iterable_that_fails_in_the_middle_is_the_end(
    hosted: Served, patient_clock: MockClock, knows_no_fragments: bool, records: Any, message: Any, error: str
) -> None:
    """With 1011 and the id of its error, which is told of once."""

    async def handler(ws: WebSocket) -> None:
        await ws.send(message())

    async with hosted(handler) as server:
        frames, close = await to_the_end(server)
        [record] = records.read("ERROR")
        assert error in record["message"]
        assert close == (1011).to_bytes(2, "big") + record["error_id"].encode()
    sent = [(frame.opcode, frame.fin, bytes(frame.data)) for frame in frames]
    assert sent[:1] == ([] if knows_no_fragments else [(Opcode.TEXT, False, b"one")])
    assert not any(fin for _, fin, _ in sent)


async def test_a_handler_that_catches_it_is_cancelled_all_the_same(
    hosted: Served, patient_clock: MockClock, records: Any
) -> None:
    seen: list[object] = []

    async def handler(ws: WebSocket) -> None:
        try:
            await ws.send(broken())
        except LookupError as error:
            seen.append(error)
        seen.append(ws.closed)
        try:
            await trio.sleep_forever()
        finally:
            seen.append("cancelled")

    async with hosted(handler) as server:
        _, close = await to_the_end(server)
        [record] = records.read("ERROR")
    assert close[2:].decode() == record["error_id"]
    assert isinstance(seen[0], LookupError)
    assert seen[1:] == [(1011, record["error_id"]), "cancelled"]


async def test_an_iterable_that_fails_before_anything_was_sent_is_no_end(hosted: Served) -> None:
    def at_once() -> Iterator[str]:
        yield "never sent"
        raise LookupError

    async def handler(ws: WebSocket) -> None:
        with pytest.raises(LookupError):
            await ws.send(at_once())
        await ws.send("next")

    async with hosted(handler) as server, server.connect() as client:
        assert await client.receive() == "next"
        assert await client.closed() == (1000, "")


async def test_cancelled_in_the_middle_it_is_the_end(
    hosted: Served, patient_clock: MockClock, knows_no_fragments: bool
) -> None:
    async def handler(ws: WebSocket) -> None:
        def message() -> Iterator[bytes]:
            yield b"one"
            yield b"two"
            scope.cancel()
            yield b"three"
            yield b"four"

        with trio.CancelScope() as scope:
            await ws.send(message())
        assert scope.cancelled_caught

    async with hosted(handler) as server:
        frames, close = await to_the_end(server)
    assert close == (1011).to_bytes(2, "big") + b"a fragmented message was not finished"
    sent = [(frame.fin, bytes(frame.data)) for frame in frames]
    # On a stream each has to wait until the one before it was taken.
    assert sent in ([[]] if knows_no_fragments else [[(False, b"one")], [(False, b"one"), (False, b"two")]])


@pytest.mark.not_asgi("fragments wait for nobody")
async def test_cancelled_while_it_waits_for_the_peer_it_is_the_end(hosted: Served, patient_clock: MockClock) -> None:
    async def handler(ws: WebSocket) -> None:
        with trio.move_on_after(1) as scope:
            await ws.send([BIG, b"two", b"three"])
        assert scope.cancelled_caught

    async with hosted(handler, settings=QUIET) as server, server.open(4096) as stream:
        await stream.send_all(server.client(stream).request())
        await trio.sleep(2)
        frames = [frame for _, frame in parse(b"".join([part async for part in stream]))]
    assert [(frame.opcode, frame.fin, len(frame.data)) for frame in frames[:-1]] == [(Opcode.BINARY, False, len(BIG))]
    assert bytes(frames[-1].data[:2]) == (1011).to_bytes(2, "big")


async def test_cancelled_before_its_first_fragment_it_is_no_end(hosted: Served, patient_clock: MockClock) -> None:
    async def handler(ws: WebSocket) -> None:
        await ws.send(BIG)
        with trio.move_on_after(1) as scope:
            await ws.send(["never", "sent"])
        assert scope.cancelled_caught
        await ws.send("next")

    async with hosted(handler, settings=QUIET) as server, server.connect() as client:
        await trio.sleep(2)
        assert await client.receive() == BIG
        assert await client.receive() == "next"
        assert await client.closed() == (1000, "")


# Others meanwhile


async def test_others_wait_until_it_is_complete(hosted: Served) -> None:
    """Whole messages, several in one write and other fragments; broadcasts are left out."""
    left_out: list[object] = []

    async def handler(ws: WebSocket) -> None:
        def message() -> Iterator[str]:
            yield "1"
            ws.nursery.start_soon(ws.send, "whole")
            ws.nursery.start_soon(ws.send_texts, [b"several"])
            ws.nursery.start_soon(ws.send, ["a", "b", "c"])
            for number in range(2, 10):
                left_out.extend(tricorn.broadcast([ws], "broadcast"))
                yield str(number)

        await ws.send(message())
        assert left_out == [ws] * 8
        assert tricorn.broadcast([ws], "broadcast at last") == []
        await ws.receive()

    async with hosted(handler) as server, server.connect() as client:
        messages = [b"".join(await fragments(client)) for _ in range(5)]
        assert messages[0] == b"123456789"
        assert sorted(messages[1:]) == [b"abc", b"broadcast at last", b"several", b"whole"]
        await client.send("return")
        assert await client.closed() == (1000, "")


async def test_many_tasks_send_fragments_to_a_slow_reader(hosted: Served, patient_clock: MockClock) -> None:
    sizes = [1000, 70_000, 0, 300_000]

    async def handler(ws: WebSocket) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(ws.send, [bytes([number]) * size for size in sizes])

    async with hosted(handler, settings=QUIET) as server, server.connect(receive_buffer=4096) as client:
        seen = [b"".join(await fragments(client)) for _ in range(5)]
        assert sorted(seen) == [bytes([number]) * sum(sizes) for number in range(5)]
        assert await client.closed() == (1000, "")


async def test_who_waits_behind_it_learns_of_its_end(hosted: Served, patient_clock: MockClock, records: Any) -> None:
    sockets: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        sockets.append(ws)
        await ws.receive()

    def message() -> Iterator[str]:
        yield "one"
        nursery.start_soon(wait_behind)
        yield "two"
        yield "three"
        raise LookupError

    async def wait_behind() -> None:
        with pytest.raises(tricorn.Disconnected) as caught:
            await sockets[0].send("behind")
        codes.append(caught.value.code)

    codes: list[int] = []
    closes: list[bytes] = []

    async def listen(server: Any) -> None:
        closes.append((await to_the_end(server))[1])

    async with hosted(handler) as server, trio.open_nursery() as nursery:
        nursery.start_soon(listen, server)
        await wait_all_tasks_blocked()
        with pytest.raises(LookupError):  # in a task elsewhere
            await sockets[0].send(message())
    [record] = records.read("ERROR")
    assert closes == [(1011).to_bytes(2, "big") + record["error_id"].encode()]
    assert codes == [1011]


# Compressed


@pytest.mark.parametrize("deflate", ["takeover", "no-takeover"])
async def test_compressed_fragments(served: Served, deflate: Any) -> None:
    text = "the same words again, "
    messages: list[Any] = [
        ["", text, text],
        [text, "", text],
        [text, text, ""],
        ["", "", ""],
        text,
        [text],
        [""],
        [b"", bytes(100_000), b"x"],
        text * 100,
    ]

    async def handler(ws: WebSocket) -> None:
        for message in messages:
            await ws.send(message)

    factory = ClientPerMessageDeflateFactory()
    async with (
        served(handler, settings=Settings(deflate=deflate)) as server,
        server.connect(extensions=[factory]) as client,
    ):
        for message in messages:
            parts = await fragments(client)
            expected = [message] if isinstance(message, str) else message
            assert parts == [each.encode() if isinstance(each, str) else each for each in expected]
        assert await client.closed() == (1000, "")
