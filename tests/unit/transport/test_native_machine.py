"""The codec on a connection, driven by Hypothesis: whatever a peer sends, cut wherever, is what the handler gets."""

from __future__ import annotations

from collections import deque
from socket import AF_UNIX, SOCK_STREAM, socketpair

import trio
import trio.testing
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode

from tricorn import Accept, Disconnected, Message, Request, Settings, WebSocket
from tricorn.listening.site import Site
from tricorn.protocol.close import NO_STATUS, Close
from tricorn.protocol.deflate import Agreement
from tricorn.transport.native import NativeTransport
from tricorn.transport.poller import PerSocket

AGREEMENT = Agreement(server_takeover=True, client_takeover=True, server_bits=12, client_bits=15)


class Peer(RuleBasedStateMachine):
    """The rules are what a peer does, the model is what the handler must have seen by then."""

    @initialize(deflate=st.booleans())
    def connect(self, deflate: bool) -> None:
        self.deflate = PerMessageDeflate(False, False, 12, 15) if deflate else None
        self.expected: list[Message] = []
        self.pings: list[bytes] = []
        self.unsent = b""  # of the frames that were made
        self.actions: deque[bytes | None] = deque()
        self.inside: Opcode | None = None  # a message that is not finished
        self.begun = b""
        self.over = False

    def _frame(self, opcode: Opcode, data: bytes, *, fin: bool = True) -> None:
        frame = Frame(opcode, data, fin)
        if self.deflate is not None:
            frame = self.deflate.encode(frame)
        wire = bytearray(Frame(Opcode.BINARY, frame.data).serialize(mask=True))
        wire[0] = frame.fin << 7 | frame.rsv1 << 6 | frame.opcode
        self.unsent += wire

    @precondition(lambda self: not self.over and self.inside is None)
    @rule(message=st.one_of(st.text(max_size=200), st.binary(max_size=200)), fin=st.booleans())
    def say(self, message: Message, fin: bool) -> None:
        opcode, data = (Opcode.TEXT, message.encode()) if isinstance(message, str) else (Opcode.BINARY, message)
        self._frame(opcode, data, fin=fin)
        if fin:
            self.expected.append(message)
        else:
            self.inside, self.begun = opcode, data

    @precondition(lambda self: not self.over and self.inside is not None)
    @rule(more=st.text(max_size=50), fin=st.booleans())
    def go_on(self, more: str, fin: bool) -> None:
        self._frame(Opcode.CONT, more.encode(), fin=fin)
        self.begun += more.encode()
        if fin:
            self.expected.append(self.begun.decode() if self.inside is Opcode.TEXT else self.begun)
            self.inside = None

    @precondition(lambda self: not self.over)
    @rule(data=st.binary(max_size=125))
    def ping(self, data: bytes) -> None:
        self._frame(Opcode.PING, data)
        self.pings.append(data)

    @rule(part=st.integers(1, 400))
    def send_a_part(self, part: int) -> None:
        self.actions.append(self.unsent[:part])
        self.unsent = self.unsent[part:]

    @precondition(lambda self: not self.over)
    @rule()
    def close(self) -> None:
        self._frame(Opcode.CLOSE, b"")
        self.over = True

    @invariant()
    def nothing_to_see_yet(self) -> None:
        """All is played at the end, in one run of Trio."""

    def teardown(self) -> None:
        if not hasattr(self, "actions"):
            return
        if not self.over:
            self.close()
        self.actions.append(self.unsent)
        received, end, said = trio.run(self._play)
        assert received == self.expected
        assert end == Close(NO_STATUS, "")
        pongs = [bytes(frame) for frame in pongs_in(said)]
        assert pongs == self.pings

    async def _play(self) -> tuple[list[Message], Close, bytes]:
        received: list[Message] = []
        end: list[Close] = []
        said = b""

        async def handler(ws: WebSocket) -> None:
            try:
                while True:
                    received.append(await ws.receive())
            except Disconnected as gone:
                end.append(Close(gone.code, gone.reason))

        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
        ours.setblocking(False)
        theirs.setblocking(False)
        agreement = AGREEMENT if self.deflate is not None else None
        with ours, theirs:
            peer = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
            readiness = PerSocket()
            async with trio.open_nursery() as nursery:
                await nursery.start(readiness.run)
                site = Site(handler, SETTINGS)
                transport = NativeTransport(ours, b"", readiness, SETTINGS, site.metrics, agreement)
                connection, ws = site.connect(transport, Request("GET", "/", "", "1.1", {}), Accept())
                nursery.start_soon(connection.run, handler, ws)
                for data in self.actions:
                    if data:
                        await peer.send_all(data)
                        await trio.testing.wait_all_tasks_blocked()
                with trio.fail_after(5):
                    async for data in peer:
                        said += data
                nursery.cancel_scope.cancel()
        return received, end[0], said


SETTINGS = Settings()


def pongs_in(stream: bytes) -> list[bytes]:
    """The payloads of pongs; all frames of the server are short here."""
    pongs = []
    while stream:
        opcode, size = stream[0] & 15, stream[1]
        payload, stream = stream[2 : 2 + size], stream[2 + size :]
        if opcode == Opcode.PONG:
            pongs.append(payload)
    return pongs


TestPeer = Peer.TestCase
TestPeer.settings = settings(max_examples=60, stateful_step_count=30)
