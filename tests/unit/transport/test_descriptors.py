"""How an ASGI application comes by the sockets of its connections."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from errno import EMFILE
from os import listdir

import pytest

from tricorn.transport import descriptors
from tricorn.transport.descriptors import Descriptors, Ends, Way


@contextmanager
def connections(number: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Pairs of peer and accepted socket."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        pairs = []
        for _ in range(number):
            peer = stack.enter_context(socket.create_connection(listener.getsockname()))
            pairs.append((peer, stack.enter_context(listener.accept()[0])))
        yield pairs


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was listed."""
    listed: list[str] = []

    def list_and_tell(path: str) -> list[str]:
        listed.append(path)
        return listdir(path)

    monkeypatch.setattr(descriptors, "listdir", list_and_tell)
    return listed


def way_to(found: Descriptors, accepted: socket.socket) -> Way:
    return found.way(Ends(accepted.getpeername(), accepted.getsockname()))


def test_each_way_leads_to_its_own_socket(searches: list[str]) -> None:
    found = Descriptors()
    with connections(20) as pairs:
        seen: list[int] = []
        for way in [way_to(found, accepted) for _, accepted in pairs]:
            assert way(lambda sock: seen.append(sock.fileno()))
        assert seen == [accepted.fileno() for _, accepted in pairs]
    assert len(searches) == 1


def test_many_peers_that_reset_cost_no_searches(searches: list[str]) -> None:
    """Those that were looked for before, and those that were not."""
    found = Descriptors()
    with connections(20) as pairs:
        ways = [way_to(found, accepted) for _, accepted in pairs]
        for way in ways[:10]:
            assert way(lambda sock: None)
        later = [way_to(found, accepted) for _, accepted in pairs[10:]]
        for peer, _ in pairs:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
        for _ in range(3):
            for way in [*ways[:10], *later]:
                assert not way(lambda sock: None)
    assert len(searches) == 2


def test_a_number_that_is_used_again_is_another_connection(searches: list[str]) -> None:
    found = Descriptors()
    with connections(2) as [(_, one), (_, other)]:
        way = way_to(found, one)
        assert way(lambda sock: None)
        number = one.fileno()
        one.close()
        with socket.socket(fileno=socket.dup(other.fileno())) as again:
            assert again.fileno() == number
            assert not way(lambda sock: None)


def test_without_a_descriptor_to_spare_sockets_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise OSError(EMFILE, "too many open files")

    monkeypatch.setattr(descriptors, "listdir", refuse)
    with connections(2) as [(_, one), _]:
        seen: list[int] = []
        assert way_to(Descriptors(), one)(lambda sock: seen.append(sock.fileno()))
        assert seen == [one.fileno()]


def test_what_fails_as_sockets_do_is_false() -> None:
    def fail(sock: socket.socket) -> None:
        raise OSError

    with connections(1) as [(_, accepted)]:
        assert not way_to(Descriptors(), accepted)(fail)
