"""Who is let in: handlers by path, and the hook before the upgrade, on every host."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

import pytest
import trio
from h11 import CLIENT, NEED_DATA, Connection, Data, EndOfMessage, Request
from trio.testing import MockClock, wait_all_tasks_blocked

import tricorn
from fixtures.clock import seconds
from fixtures.handlers import echo, greet_and_sleep
from tricorn import Accept, Refuse, Settings, WebSocket

Served = Callable[..., AbstractAsyncContextManager[Any]]


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: str


async def answer(server: Any, path: str = "/", **options: Any) -> Answer:
    """What a request for a WebSocket is answered that is refused. The options are those of websockets' client."""
    client = Connection(CLIENT)
    client.send(Request(method="GET", target="/", headers=[("Host", "h")]))
    client.send(EndOfMessage())
    async with server.open() as stream:
        await stream.send_all(server.client(stream, path, **options).request())
        status, headers, body = 0, [], b""
        while True:
            event = client.next_event()
            if event is NEED_DATA:
                client.receive_data(await stream.receive_some())
            elif isinstance(event, Data):
                body += event.data
            elif isinstance(event, EndOfMessage):
                return Answer(status, headers, body.decode())
            else:
                status = event.status_code
                headers = [(name.decode(), value.decode("latin-1")) for name, value in event.headers]


async def let_in(request: tricorn.Request) -> Accept:
    return Accept()


async def test_cookies_are_joined_by_semicolons(hosted: Served) -> None:
    """Other headers that came several times by commas."""
    seen: list[tuple[str, str]] = []

    async def hook(request: tricorn.Request) -> Accept:
        seen.append((request.headers["cookie"], request.headers["x"]))
        return Accept()

    async with hosted(echo, before_upgrade=hook) as server, server.open() as stream:
        client = server.client(stream)
        lines = b"Cookie: a=1, 2; b=3\r\nX: 1\r\ncookie: c=4\r\nX: 2\r\n\r\n"
        await stream.send_all(client.request().removesuffix(b"\r\n") + lines)
        await client.handshake()
    assert seen == [("a=1, 2; b=3; c=4", "1, 2")]


# Handlers by path


async def test_each_path_has_its_handler(hosted: Served) -> None:
    async def shout(ws: WebSocket) -> None:
        async for message in ws:
            await ws.send(message.upper())

    async with hosted({"/echo": echo, "/é /shout": shout}) as server:
        for path, said in (("/echo?a=b", "hello"), ("/%C3%A9%20/shout", "HELLO")):
            async with server.connect(path) as client:
                await client.send("hello")
                assert await client.receive() == said


@pytest.mark.parametrize("path", ["/", "/echo/", "/ECHO", "/echo%20", "/other"])
async def test_every_other_path_gets_404(hosted: Served, path: str) -> None:
    async with hosted({"/echo": echo}) as server:
        status, _, body = await answer(server, path)
        assert (status, body) == (404, f"there is no WebSocket at {path.replace('%20', ' ')}\n")


async def test_the_hook_is_not_asked_about_a_path_that_is_not_there(hosted: Served) -> None:
    async def hook(request: tricorn.Request) -> Accept:
        raise AssertionError

    async with hosted({"/echo": echo}, before_upgrade=hook) as server:
        assert (await answer(server)).status == 404


# The hook accepts


async def test_it_chooses_subprotocol_headers_and_state(hosted: Served) -> None:
    seen: list[tuple[object, str | None]] = []

    async def hook(request: tricorn.Request) -> Accept:
        await trio.lowlevel.checkpoint()
        return Accept("b", {"X-User": "é", "Set-Cookie": "a=1"}, state={"user": "ann"})

    async def handler(ws: WebSocket) -> None:
        seen.append((ws.state, ws.subprotocol))

    async with hosted(handler, before_upgrade=hook) as server, server.connect(subprotocols=["a", "b"]) as client:
        assert client.protocol.subprotocol == "b"
        headers = client.response.headers
        assert (headers["X-User"], headers["Set-Cookie"]) == ("é", "a=1")
        assert await client.closed() == (1000, "")
    assert seen == [({"user": "ann"}, "b")]


async def test_without_its_word_there_is_no_subprotocol_and_no_state(hosted: Served) -> None:
    seen: list[tuple[object, str | None]] = []

    async def handler(ws: WebSocket) -> None:
        seen.append((ws.state, ws.subprotocol))

    options = {"before_upgrade": let_in, "subprotocols": ["a"]}
    async with hosted(handler, **options) as server, server.connect(subprotocols=["a"]) as client:
        assert client.protocol.subprotocol is None
        assert await client.closed() == (1000, "")
    assert seen == [(None, None)]


async def test_it_sees_the_request(hosted: Served) -> None:
    seen: list[tricorn.Request] = []

    async def hook(request: tricorn.Request) -> Accept:
        seen.append(request)
        return Accept()

    async def handler(ws: WebSocket) -> None:
        seen.append(ws.request)

    async with hosted(handler, before_upgrade=hook) as server:
        host = "127.0.0.1" if isinstance(server.port, str) else f"127.0.0.1:{server.port}"
        async with server.connect("/%C3%A9?token=%20x", origin=f"http://{host}") as client:
            address = client.address
            assert await client.closed() == (1000, "")
        [asked, upgraded] = seen
        assert asked is upgraded
        assert (asked.method, asked.path, asked.query, asked.http_version) == ("GET", "/é", "token=%20x", "1.1")
        assert asked.headers["host"] == host
        assert asked.headers["origin"] == f"http://{host}"
        assert asked.peer == address


# It refuses


@pytest.mark.parametrize("how", ["returned", "raised"])
async def test_it_refuses(hosted: Served, how: str) -> None:
    async def hook(request: tricorn.Request) -> Refuse:
        refused = Refuse(401, "who are you? é", {"WWW-Authenticate": "Bearer", "X-Raw": "\xff"})
        if how == "raised":
            raise refused
        return refused

    async with hosted(echo, before_upgrade=hook) as server:
        status, headers, body = await answer(server)
        assert (status, body) == (401, "who are you? é\n")
        assert {("www-authenticate", "Bearer"), ("x-raw", "\xff")} <= set(headers)
        assert [value for name, value in headers if name == "content-type"] == ["text/plain; charset=utf-8"]


async def test_the_text_of_a_refusal_is_the_phrase_of_its_status(hosted: Served) -> None:
    async def hook(request: tricorn.Request) -> Refuse:
        return Refuse(403)

    async with hosted(echo, before_upgrade=hook) as server:
        assert (await answer(server)).body == "Forbidden\n"


@pytest.mark.parametrize("name", ["Content-Type", "content-type"])
async def test_a_refusal_may_say_what_its_body_is(hosted: Served, name: str) -> None:
    async def hook(request: tricorn.Request) -> Refuse:
        return Refuse(422, '{"detail": "no"}', {name: "application/json"})

    async with hosted(echo, before_upgrade=hook) as server:
        status, headers, body = await answer(server)
        assert (status, body) == (422, '{"detail": "no"}\n')
        assert [value for header, value in headers if header == "content-type"] == ["application/json"]
        assert [value for header, value in headers if header == "content-length"] == [str(len(body))]


@pytest.mark.parametrize("status", [101, 200, 302, 399, 600, 0])
def test_a_refusal_is_an_error(status: int) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        Refuse(status)


# It makes a mistake


def mistakes() -> dict[str, Callable[[], object]]:
    def raised() -> object:
        raise Refuse(400, headers={"X": "a\r\nb: c"})

    def failed() -> object:
        raise LookupError("no such user")

    def too_slow_itself() -> object:
        raise trio.TooSlowError

    return {
        "raises": failed,
        "raises what a time-out of its own does": too_slow_itself,
        "returns nothing": lambda: None,
        "returns nonsense": lambda: True,
        "accepts a subprotocol that was not offered": lambda: Accept("c"),
        "accepts no subprotocol as a subprotocol": lambda: Accept(""),
        "accepts with a line break in a value": lambda: Accept(headers={"X": "a\r\nb: c"}),
        "accepts with a line break in a name": lambda: Accept(headers={"X: y\r\nZ": "a"}),
        "accepts with a header without a name": lambda: Accept(headers={"": "a"}),
        "accepts with what is no text": lambda: Accept(headers={"X": 1}),  # type: ignore[dict-item]
        "accepts with what latin-1 lacks": lambda: Accept(headers={"X": "€"}),
        "accepts with a header of the handshake": lambda: Accept(headers={"Sec-WebSocket-Accept": "x"}),
        "accepts with another connection": lambda: Accept(headers={"connection": "close"}),
        "refuses with a line break in a value": lambda: Refuse(400, headers={"X": "a\nb"}),
        "refuses with a length": lambda: Refuse(400, headers={"Content-Length": "5"}),
        "refuses with what UTF-8 lacks": lambda: Refuse(400, "\ud800"),
        "refuses by raising, with a line break": raised,
    }


@pytest.mark.parametrize("mistake", mistakes().values(), ids=mistakes())
async def test_its_mistake_is_500_with_the_id_of_the_record(
    hosted: Served, records: Any, mistake: Callable[[], Any]
) -> None:
    good = True

    async def hook(request: tricorn.Request) -> Any:
        return Accept() if good else mistake()

    async with hosted(echo, before_upgrade=hook) as server, server.connect() as other:
        good = False
        status, headers, body = await answer(server, "/x", subprotocols=["a", "b"])
        [record] = records.read("ERROR")
        assert (status, body) == (500, f"internal server error {record['error_id']}\n")
        assert (record["path"], record.get("peer", ["127.0.0.1"])[0]) == ("/x", "127.0.0.1")
        assert "b" not in dict(headers)
        await other.send("undisturbed")
        assert await other.receive() == "undisturbed"


async def test_who_is_late_with_its_decision_is_not_waited_for(
    hosted: Served, patient_clock: MockClock, records: Any
) -> None:
    async def hook(request: tricorn.Request) -> Accept:
        await trio.sleep_forever()
        raise AssertionError

    async with hosted(echo, before_upgrade=hook, settings=Settings(handshake_timeout=7)) as server, seconds(7):
        status, _, body = await answer(server, "/x")
        assert (status, body) == (503, "the server could not decide in time\n")
        [record] = records.read("WARNING")
        assert (record["message"], record["path"]) == ("before_upgrade did not decide in time", "/x")


# While it decides


async def deciding(hosted: Served, meanwhile: Callable[[Any, Any], Awaitable[None]], **options: Any) -> None:
    """Do something while the hook is deciding about one client; it accepts when that has returned."""
    begun, decided = trio.Event(), trio.Event()

    async def hook(request: tricorn.Request) -> Accept:
        if request.path == "/slow":
            begun.set()
            await decided.wait()
        return Accept()

    async with hosted(greet_and_sleep, before_upgrade=hook, **options) as server, server.open() as stream:
        client = server.client(stream, "/slow")
        await stream.send_all(client.request())
        await begun.wait()
        await meanwhile(server, client)
        decided.set()


async def test_a_peer_that_goes_meanwhile_disturbs_nobody(hosted: Served) -> None:
    async def go(server: Any, client: Any) -> None:
        client.reset()
        async with server.connect() as other:
            assert await other.receive() == "hello"

    await deciding(hosted, go)


async def test_meanwhile_others_may_take_the_last_place(hosted: Served) -> None:
    answered: list[bytes] = []

    async def fill(server: Any, client: Any) -> None:
        async def listen() -> None:
            answered.append(await client.stream.receive_some())
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery, server.connect() as other:
            assert await other.receive() == "hello"
            nursery.start_soon(listen)
            release.set()
            await trio.sleep_forever()

    release = trio.Event()

    async def hook(request: tricorn.Request) -> Accept:
        if request.path == "/slow":
            await release.wait()
        return Accept()

    settings = Settings(max_connections=1)
    async with hosted(greet_and_sleep, before_upgrade=hook, settings=settings) as server, server.open() as stream:
        client = server.client(stream, "/slow")
        await stream.send_all(client.request())
        await wait_all_tasks_blocked()
        await fill(server, client)
    assert answered[0].startswith(b"HTTP/1.1 503 ")


async def test_the_end_of_the_server_does_not_wait_for_it(
    served: Served, patient_clock: MockClock, records: Any
) -> None:
    async def hook(request: tricorn.Request) -> Accept:
        await trio.sleep_forever()
        raise AssertionError

    async with served(echo, before_upgrade=hook) as server, server.open() as stream:
        await stream.send_all(server.client(stream).request())
        await wait_all_tasks_blocked()
        async with seconds(0):
            server.scope.cancel()
            await server.over.wait()
    assert records.read("WARNING") == []
