"""What a server listens on: addresses, Unix sockets, sockets that it is given, TLS."""

from __future__ import annotations

import os
import socket
import ssl
import stat
from functools import partial
from math import inf
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
import trio
import trustme
from hypercorn.config import Config
from trio.testing import wait_all_tasks_blocked
from websockets.client import ClientProtocol
from websockets.uri import parse_uri

import tricorn
from fixtures.client import Client, connect, is_served, left_over, serving
from fixtures.handlers import echo
from tricorn import Settings, WebSocket
from tricorn.listening.binds import bind

SILENT = Settings(ping_interval=inf)


async def test_several_addresses(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    given = socket.create_server(("127.0.0.1", 0))
    given_address = given.getsockname()
    bind = ["127.0.0.1:0", f"unix:{path}", "127.0.0.1:0"]
    async with serving(echo, 0, bind=bind, listeners=[given]) as server:
        assert len(server.addresses) == len(set(server.addresses)) == 5
        assert given_address in server.addresses
        assert str(path) in server.addresses
        for address in server.addresses:
            await is_served(address)
    assert given.fileno() == -1


async def test_ipv6_has_brackets() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("there is no IPv6")
    async with serving(echo, bind=["[::1]:0"]) as server:
        [address] = server.addresses
        assert address[0] == "::1"
        assert len(address) == 2
        await is_served(address)


@pytest.mark.parametrize("host", ["localhost", ""])
async def test_both_families_on_one_port(host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("there is no IPv6")
    hosts = {"127.0.0.1", "::1"} if host else {"0.0.0.0", "::"}
    for arguments in ({"port": 0, "host": host}, {"bind": [f"{host}:0"]}):
        async with serving(echo, **arguments) as server:
            assert {address[0] for address in server.addresses} == hosts
            [port] = {address[1] for address in server.addresses}
            await is_served(("127.0.0.1", port))
            await is_served(("::1", port))


async def test_a_port_that_is_taken_in_one_family_is_not_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names have both families here, whatever this machine has: two addresses of IPv4 stand for them."""
    taken = socket.create_server(("127.0.0.2", 0))
    port = taken.getsockname()[1]

    async def resolve(*_: Any, **__: Any) -> list[Any]:
        first = 0 if picked else port  # the first time, one whose twin is taken
        picked.append(first)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, first if host == "127.0.0.1" else 0))
            for host in ("127.0.0.1", "127.0.0.2")
        ]

    picked: list[int] = []
    monkeypatch.setattr(trio.socket, "getaddrinfo", resolve)
    with taken:
        bound = await bind(0, "name")
        assert len({sock.getsockname()[1] for sock in bound}) == 1
        assert bound[0].getsockname()[1] != port
        assert len(picked) == 2
    for sock in bound:
        sock.close()


@pytest.mark.parametrize("host", ["localhost", ""])
async def test_a_family_that_the_machine_does_not_have(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """An address of somebody else's stands for it."""

    async def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (each, 0)) for each in hosts]

    monkeypatch.setattr(trio.socket, "getaddrinfo", resolve)
    hosts = ["192.0.2.1", "127.0.0.1"]
    bound = await bind(0, host)
    assert {each.getsockname()[0] for each in bound} == {"127.0.0.1"}
    for each in bound:
        each.close()
    before = left_over()
    with pytest.raises(OSError, match="assign"):
        await bind(0, "example.org")
    hosts = ["192.0.2.1"]
    with pytest.raises(OSError, match="assign"):
        await bind(0, host)
    assert left_over() == before


async def test_a_descriptor() -> None:
    given = socket.create_server(("127.0.0.1", 0))
    address = given.getsockname()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(tricorn.serve, echo, bind=[f"fd:{(number := given.detach())}"]))
        assert server.addresses == [address]
        await is_served(address)
        nursery.cancel_scope.cancel()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(number)


async def test_a_descriptor_that_is_no_stream_socket() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams, TemporaryFile() as file:
        for descriptor in (datagrams.fileno(), file.fileno(), 99999):
            with pytest.raises(OSError, match=r"socket|descriptor"):
                await tricorn.serve(echo, bind=[f"fd:{descriptor}"])
        os.fstat(datagrams.fileno())
        os.fstat(file.fileno())


@pytest.mark.parametrize("text", ["", "8080", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "a:1:", "/socket", "fd:x"])
async def test_what_is_no_address(text: str) -> None:
    before = left_over()
    given = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(ValueError, match=r"must be |has brackets"):
        await tricorn.serve(echo, 0, bind=["127.0.0.1:0", text], listeners=[given])
    assert left_over() == before


async def test_nothing_to_listen_on() -> None:
    with pytest.raises(ValueError, match="there is nothing to listen on"):
        await tricorn.serve(echo)


def test_run_with_nothing_to_listen_on() -> None:
    with pytest.raises(ValueError, match="there is nothing to listen on"):
        tricorn.run(echo)


async def test_a_socket_that_does_not_listen_is_refused() -> None:
    before = left_over()
    given = socket.socket()
    given.bind(("127.0.0.1", 0))
    with pytest.raises(ValueError, match="does not listen"):
        await tricorn.serve(echo, 0, listeners=[given])
    assert left_over() == before


async def test_a_certificate_that_cannot_be_read_leaves_nothing_open(tmp_path: Path) -> None:
    before = left_over()
    config = Config()
    config.certfile = config.keyfile = str(tmp_path / "missing.pem")
    with pytest.raises(OSError, match="No such file"):
        await tricorn.serve(echo, 0, config=config)
    assert left_over() == before


# Unix sockets


async def test_over_a_unix_socket(tmp_path: Path, records: Any) -> None:
    path = tmp_path / "socket"
    seen: list[tricorn.Request] = []

    async def hook(request: tricorn.Request) -> tricorn.Accept:
        seen.append(request)
        return tricorn.Accept()

    async with serving(echo, bind=[f"unix:{path}"], before_upgrade=hook) as server:
        assert server.addresses == [str(path)]
        assert stat.S_ISSOCK(path.stat().st_mode)
        await is_served(str(path))
        await wait_all_tasks_blocked()
        assert [request.peer for request in seen] == [None]
        async with connect(str(path)):
            await wait_all_tasks_blocked()
            [ws] = server.connections
            assert "of a Unix socket" in repr(ws)
    assert not path.exists()
    assert "peer" not in records.read("INFO")[0]


async def test_a_client_with_a_path_of_its_own_is_nobody_in_particular(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    seen: list[object] = []

    async def handler(ws: WebSocket) -> None:
        seen.append(ws.request.peer)

    async with serving(handler, bind=[f"unix:{path}"]):
        with trio.socket.socket(trio.socket.AF_UNIX) as sock:
            await sock.bind(str(tmp_path / "client"))
            await sock.connect(str(path))
            client = Client(trio.SocketStream(sock), ClientProtocol(parse_uri("ws://h/")))
            await client.stream.send_all(client.request())
            await client.handshake()
            assert await client.closed() == (1000, "")
    assert seen == [None]


async def test_a_file_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
        crashed.listen()
    assert path.exists()
    async with serving(echo, bind=[f"unix:{path}"]):
        await is_served(str(path))
    assert not path.exists()


@pytest.mark.parametrize("backlog", [0, 5])
async def test_the_file_of_a_living_server_is_left_alone(tmp_path: Path, backlog: int) -> None:
    """Also if its backlog is full."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen(backlog)
        waiting: list[socket.socket] = []
        try:
            while backlog == 0:
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect(str(path))
        except BlockingIOError:
            pass
        before = left_over()
        inode = path.stat().st_ino
        with pytest.raises(OSError, match="in use"):
            await tricorn.serve(echo, bind=[f"unix:{path}"])
        assert path.stat().st_ino == inode
        assert left_over() == before
        for each in waiting:
            each.close()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        await tricorn.serve(echo, bind=[f"unix:{path}"])
    assert path.read_text() == "precious"


async def test_the_file_of_a_server_that_came_later_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with serving(echo, bind=[f"unix:{path}"]):
        path.unlink()
        (tmp_path / "keeps-the-number-of-the-first").touch()  # or its inode may be used again
        with socket.socket(socket.AF_UNIX) as later:
            later.bind(str(path))
    assert path.exists()


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="Linux has abstract addresses")
async def test_an_abstract_address_in_listeners() -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")
    listener.listen()
    async with serving(echo, listeners=[listener]) as server:
        [address] = server.addresses
        assert isinstance(address, str)
        assert address.startswith("\0")
        await is_served(address)


# TLS


async def test_with_an_ssl_context() -> None:
    authority = trustme.CA()
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(ours)
    authority.configure_trust(theirs)
    seen: list[WebSocket] = []

    async def handler(ws: WebSocket) -> None:
        seen.append(ws)
        await echo(ws)

    async with serving({"/": handler}, 0, bind=["127.0.0.1:0"], ssl_context=ours, settings=SILENT) as server:
        for address in server.addresses:
            await is_served(address, theirs)
        assert [ws.request.path for ws in seen] == ["/", "/"]
        assert seen[0].request.peer is not None
        assert seen[0].request.peer[0] == "127.0.0.1"
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            await is_served(server.addresses[0])  # without TLS
