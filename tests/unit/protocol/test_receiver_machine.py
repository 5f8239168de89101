"""A client that does whatever RFC 6455 and RFC 7692 let it, cut anywhere: a state machine, and what must come of it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode

from tricorn.protocol.close import Close
from tricorn.protocol.deflate import Agreement, Inflater
from tricorn.protocol.receiver import Message, Receiver

LIMIT = 1 << 16

agreements = st.one_of(st.none(), st.builds(Agreement, st.just(True), st.booleans(), st.just(15), st.integers(9, 15)))
payloads = st.one_of(st.binary(max_size=200), st.binary(max_size=9).map(lambda data: data * 500))


class Client(RuleBasedStateMachine):
    """Everything that is sent is noted with where on the stream it is complete: nothing may be seen before or later."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = bytearray()
        self.delivered = 0
        self.due: list[tuple[int, str, object]] = []  # where it is complete, what it is
        self.message: bytes | None = None  # the one in fragments
        self.is_text = self.compresses = self.is_over = False

    @initialize(agreement=agreements)
    def agree(self, agreement: Agreement | None) -> None:
        self.receiver = Receiver(LIMIT, None if agreement is None else Inflater(agreement))
        self.received: list[Message] = []
        self.deflate = agreement and PerMessageDeflate(True, not agreement.client_takeover, 15, agreement.client_bits)

    def send(self, opcode: Opcode, data: bytes, *, fin: bool = True) -> None:
        extensions = [self.deflate] if self.compresses and self.deflate else []
        self.stream += Frame(opcode, data, fin).serialize(mask=True, extensions=extensions)

    def note(self, kind: str, value: object) -> None:
        self.due.append((len(self.stream), kind, value))

    def finish(self, data: bytes) -> None:
        self.note("message", data.decode() if self.is_text else data)

    @precondition(lambda self: self.message is None and not self.is_over)
    @rule(text=st.text(max_size=200), compresses=st.booleans())
    def send_text(self, text: str, compresses: bool) -> None:
        self.is_text, self.compresses = True, compresses
        self.send(Opcode.TEXT, text.encode())
        self.finish(text.encode())

    @precondition(lambda self: self.message is None and not self.is_over)
    @rule(data=payloads, compresses=st.booleans())
    def send_binary(self, data: bytes, compresses: bool) -> None:
        self.is_text, self.compresses = False, compresses
        self.send(Opcode.BINARY, data)
        self.finish(data)

    @precondition(lambda self: self.message is None and not self.is_over)
    @rule(data=payloads, compresses=st.booleans())
    def begin_binary(self, data: bytes, compresses: bool) -> None:
        self.is_text, self.compresses, self.message = False, compresses, data
        self.send(Opcode.BINARY, data, fin=False)

    @precondition(lambda self: self.message is None and not self.is_over)
    @rule(text=st.text(max_size=50), cut=st.integers(0, 200), compresses=st.booleans())
    def send_text_cut_anywhere(self, text: str, cut: int, compresses: bool) -> None:
        self.is_text, self.compresses = True, compresses
        data = text.encode()
        self.send(Opcode.TEXT, data[:cut], fin=False)
        self.send(Opcode.CONT, data[cut:])
        self.finish(data)

    @precondition(lambda self: self.message is not None and not self.is_over)
    @rule(data=payloads, fin=st.booleans())
    def go_on(self, data: bytes, fin: bool) -> None:
        assert self.message is not None
        if len(self.message) + len(data) > LIMIT:
            return
        self.message += data
        self.send(Opcode.CONT, data, fin=fin)
        if fin:
            self.finish(self.message)
            self.message = None

    @precondition(lambda self: not self.is_over)
    @rule(data=st.binary(max_size=125), opcode=st.sampled_from([Opcode.PING, Opcode.PONG]))
    def send_ping_or_pong(self, data: bytes, opcode: Opcode) -> None:
        self.send(opcode, data)
        if opcode is Opcode.PING:
            self.note("ping", data)

    @precondition(lambda self: not self.is_over and self.due)
    @rule()
    def send_close(self) -> None:
        self.send(Opcode.CLOSE, b"\x03\xe8bye")
        self.note("close", Close(1000, "bye"))
        self.is_over = True

    @rule(size=st.one_of(st.integers(1, 10), st.integers(1, 1000)))
    def deliver(self, size: int) -> None:
        data = bytes(self.stream[self.delivered : self.delivered + size])
        self.delivered += len(data)
        self.received += self.receiver.receive_data(data)

    @rule()
    def deliver_everything(self) -> None:
        self.deliver(len(self.stream))

    @rule()
    def deliver_one_by_one(self) -> None:
        for _ in range(min(300, len(self.stream) - self.delivered)):
            self.deliver(1)

    @invariant()
    def what_is_complete_was_received(self) -> None:
        seen = [(kind, value) for end, kind, value in self.due if end <= self.delivered]
        assert self.received == [value for kind, value in seen if kind == "message"]
        assert self.receiver.pings == [value for kind, value in seen if kind == "ping"]
        assert self.receiver.closed == next((value for kind, value in seen if kind == "close"), None)
        assert self.receiver.violation is None


TestClient = Client.TestCase
TestClient.settings = settings(derandomize=True, max_examples=150, stateful_step_count=30)
