"""What an application is told and may do, event by event (ASGI 3.0, WebSocket), and how it ends."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

import tricorn
from tricorn import Accept, Refuse, Settings, asgi_handler

App = Callable[[Any, Any, Any], Awaitable[None]]

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)

SETTINGS = Settings(handshake_timeout=5, close_timeout=3, drain_timeout=10, ping_interval=math.inf)


def app_of(websocket: App) -> App:
    """An application without a lifespan, whose WebSockets are all alike."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await websocket(scope, receive, send)

    return app


def handler_of(websocket: App) -> tricorn.AsgiHandler:
    return asgi_handler(app_of(websocket))


async def accept(receive: Any, send: Any, **event: Any) -> None:
    assert await receive() == {"type": "websocket.connect"}
    await send({"type": "websocket.accept", **event})


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await accept(receive, send)
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": event["text"], "bytes": event["bytes"]})


# The scope


async def scope_of(served: Any, path: str, *, hook: Any = None, **options: Any) -> Any:
    scopes = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await accept(receive, send)

    async with (
        served(handler_of(app), settings=SETTINGS, before_upgrade=hook) as server,
        server.connect(path, **options) as client,
    ):
        assert await client.closed() == (1000, "")
        return scopes[0], client, server


async def test_the_scope(served: Any) -> None:
    scope, _, server = await scope_of(served, "/a%2Fb/%C3%A4?x=%20y", subprotocols=["one", "two"])
    headers = scope.pop("headers")
    assert (b"sec-websocket-protocol", b"one, two") in headers
    assert [name for name, _ in headers] == [
        b"host",
        b"upgrade",
        b"connection",
        b"sec-websocket-key",
        b"sec-websocket-version",
        b"sec-websocket-protocol",
    ]
    client_address = scope.pop("client")
    assert client_address[0] == "127.0.0.1"
    assert isinstance(client_address[1], int)
    assert scope == {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": "/a/b/ä",
        "raw_path": b"/a%2Fb/%C3%A4",
        "query_string": b"x=%20y",
        "root_path": "",
        "server": ("127.0.0.1", server.port),
        "subprotocols": ["one", "two"],
        "state": {},
        "extensions": {"websocket.http.response": {}},
    }


async def test_without_subprotocols_the_list_is_empty(served: Any) -> None:
    scope, _, _ = await scope_of(served, "/")
    assert scope["subprotocols"] == []


async def test_a_hook_adds_headers_and_a_state(served: Any) -> None:
    async def hook(request: tricorn.Request) -> Accept:
        return Accept(None, {"X-Hook": "yes"}, "Ann")

    scope, client, _ = await scope_of(served, "/", hook=hook)
    assert scope["extensions"]["tricorn"] == {"state": "Ann"}
    assert client.response.headers["x-hook"] == "yes"


async def test_a_hook_refuses_before_the_app_is_asked(served: Any) -> None:
    async def hook(request: tricorn.Request) -> Refuse:
        return Refuse(401, "who are you?")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("not to be asked")

    async with served(handler_of(app), settings=SETTINGS, before_upgrade=hook) as server:
        assert (await server.refused()).status_code == 401


async def test_the_server_on_a_unix_socket(tmp_path: Any) -> None:
    scopes = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await send({"type": "websocket.close"})

    path = str(tmp_path / "socket")
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(tricorn.serve, handler_of(app), bind=[f"unix:{path}"]))
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(UPGRADE)
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 403")
        nursery.cancel_scope.cancel()
    assert (scopes[0]["client"], scopes[0]["server"]) == (None, (path, None))


# The decision


async def test_an_app_that_does_not_decide_in_time_is_503(served: Any, patient_clock: MockClock, records: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep_forever()

    async with served(handler_of(app), settings=SETTINGS) as server:
        began = trio.current_time()
        assert (await server.refused("/slow")).status_code == 503
        assert trio.current_time() - began == pytest.approx(5, abs=0.5)
    [record] = records.read("WARNING")
    assert (record["message"], record["path"]) == ("the ASGI application did not decide in time", "/slow")


async def test_an_app_that_returns_without_a_decision_is_500(served: Any, records: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async with served(handler_of(app), settings=SETTINGS) as server:
        response = await server.refused()
    [record] = records.read("ERROR")
    assert response.status_code == 500
    assert record["error_id"] in response.body.decode()
    assert record["message"] == "RuntimeError: the ASGI application returned without a decision"


async def test_a_subprotocol_that_was_not_offered_is_an_error_of_the_app(served: Any, records: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send, subprotocol="other")

    async with served(handler_of(app), settings=SETTINGS) as server:
        assert (await server.refused(subprotocols=["one"])).status_code == 500
    [record] = records.read("ERROR")
    assert record["message"] == "ValueError: the client does not offer the subprotocol 'other'"


@pytest.mark.parametrize("header", [(b"sec-websocket-protocol", b"a"), (b"a", b"b\r\nc: d"), (b"a b", b"c")])
async def test_a_header_that_may_not_be_sent_is_an_error_of_the_app(served: Any, records: Any, header: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send, headers=[header])

    async with served(handler_of(app), settings=SETTINGS) as server:
        assert (await server.refused()).status_code == 500
    [record] = records.read("ERROR")
    assert record["message"].startswith("ValueError: the header")


async def test_after_a_refusal_the_app_is_told_1006_and_may_close_again(served: Any) -> None:
    told = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.close"})
        told.extend([await receive(), await receive(), await receive()])
        await send({"type": "websocket.close"})
        with pytest.raises(OSError, match="1006"):
            await send({"type": "websocket.send", "text": "a"})

    async with served(handler_of(app), settings=SETTINGS) as server:
        assert (await server.refused()).status_code == 403
    disconnect = {"type": "websocket.disconnect", "code": 1006, "reason": ""}
    assert told == [{"type": "websocket.connect"}, disconnect, disconnect]


async def test_a_refusal_goes_out_though_the_app_does_not_return(served: Any, patient_clock: MockClock) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.close"})
        await trio.sleep_forever()

    async with served(handler_of(app), settings=SETTINGS) as server:
        began = trio.current_time()
        assert (await server.refused()).status_code == 403
        assert trio.current_time() - began == pytest.approx(SETTINGS.close_timeout, abs=0.5)


async def test_a_large_denial_response_in_parts(served: Any) -> None:
    part = b"x" * 2**20

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.http.response.start", "status": 451, "headers": [(b"content-length", b"1")]})
        for _ in range(8):
            await send({"type": "websocket.http.response.body", "body": part, "more_body": True})
        await send({"type": "websocket.http.response.body"})

    async with served(handler_of(app), settings=SETTINGS) as server, server.open() as stream:
        await stream.send_all(UPGRADE)
        response = b""
        while data := await stream.receive_some():
            response += data
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.splitlines()[0] == b"HTTP/1.1 451 Unavailable For Legal Reasons"
    assert head.lower().count(b"content-length") == 1
    assert b"Content-Length: %d" % (8 * 2**20) in head
    assert body == 8 * part


@pytest.mark.parametrize("status", [101, 200, 299, 600])
async def test_a_denial_response_with_another_status_is_an_error_of_the_app(
    served: Any, records: Any, status: int
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.http.response.start", "status": status})
        await send({"type": "websocket.http.response.body"})

    async with served(handler_of(app), settings=SETTINGS) as server:
        assert (await server.refused()).status_code == 500
    [record] = records.read("ERROR")
    assert record["message"].startswith("ValueError")


async def test_nobody_comes_in_beyond_max_connections_while_an_app_decides(served: Any) -> None:
    decide = trio.Event()
    refused = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            await decide.wait()
        await echo(scope, receive, send)

    async with served(handler_of(app), settings=Settings(max_connections=1)) as server, trio.open_nursery() as nursery:

        async def ask() -> None:
            refused.append(await server.refused("/slow"))

        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        async with server.connect("/quick"):
            decide.set()
            while not refused:
                await wait_all_tasks_blocked(0.001)
    assert refused[0].status_code == 503


async def test_an_app_that_decides_takes_one_of_max_handshakes(served: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            await trio.sleep_forever()
        await echo(scope, receive, send)

    async with (
        served(handler_of(app), settings=Settings(max_handshakes=1)) as server,
        server.connect("/quick") as client,  # which takes none any more
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(server.refused, "/slow")
        await wait_all_tasks_blocked(0.05)
        assert (await server.refused("/quick")).status_code == 503
        await client.send("still here")
        assert await client.receive() == "still here"
        nursery.cancel_scope.cancel()


async def test_an_app_that_waits_for_a_message_before_it_accepts(served: Any) -> None:
    received = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                received.append(await receive())
                nursery.cancel_scope.cancel()

            nursery.start_soon(listen)
            await wait_all_tasks_blocked()
            await send({"type": "websocket.accept"})
            await trio.sleep_forever()

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        await client.send("a")
        assert await client.closed() == (1000, "")
    assert received == [{"type": "websocket.receive", "text": "a", "bytes": None}]


# Messages


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"text": "ä"}, "ä"),
        ({"text": "", "bytes": None}, ""),
        ({"bytes": b"\xff"}, b"\xff"),
        ({"bytes": bytearray(b"ab")}, b"ab"),
        ({"bytes": memoryview(b"abc")[::2], "text": None}, b"ac"),
    ],
)
async def test_kinds_of_messages(served: Any, event: Any, message: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await send({"type": "websocket.send", **event})

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        assert await client.receive() == message


@pytest.mark.parametrize("event", [{}, {"text": None, "bytes": None}, {"text": 1}, {"text": ["a", "b"]}])
async def test_a_message_that_is_none_raises_type_error(served: Any, event: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        with pytest.raises(TypeError, match=r"websocket\.send"):
            await send({"type": "websocket.send", **event})

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        assert await client.closed() == (1000, "")


async def test_a_receive_that_is_cancelled_loses_no_message(served: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        for _ in range(10):
            with trio.move_on_after(0):
                event = await receive()
                await send({"type": "websocket.send", "text": event["text"]})
        await send({"type": "websocket.send", "text": "cancelled"})
        while (event := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": event["text"]})

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        assert await client.receive() == "cancelled"
        texts = [str(i) for i in range(20)]
        await client.send(*texts)
        assert [await client.receive() for _ in texts] == texts


async def test_two_tasks_may_not_receive(served: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await receive()
            nursery.cancel_scope.cancel()

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        assert await client.closed() == (1000, "")


async def test_send_waits_for_a_client_that_does_not_read(served: Any) -> None:
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await accept(receive, send)
        while True:
            await send({"type": "websocket.send", "bytes": bytes(2**16)})
            sent += 1

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        before = -1
        while sent != before:
            before = sent
            await wait_all_tasks_blocked(0.05)
        for _ in range(before + 1):
            assert len(await client.receive()) == 2**16
        await wait_all_tasks_blocked(0.05)
        assert sent > before


# How it ends


async def test_everything_is_received_before_the_disconnect(served: Any) -> None:
    events = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        events.extend([await receive() for _ in range(5)])

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        await client.send("a", b"b", "c")
        await client.close(4000, "bye")
    disconnect = {"type": "websocket.disconnect", "code": 4000, "reason": "bye"}
    assert events == [
        {"type": "websocket.receive", "text": "a", "bytes": None},
        {"type": "websocket.receive", "text": None, "bytes": b"b"},
        {"type": "websocket.receive", "text": "c", "bytes": None},
        disconnect,
        disconnect,
    ]


async def disconnect_of(served: Any, end: Any) -> tuple[int, str]:
    """How an app learns of an end."""
    event = {}
    told = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        event.update(await receive())
        told.set()

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        await end(client)
        await told.wait()
    assert event["type"] == "websocket.disconnect"
    return event["code"], event["reason"]


async def test_a_close_without_a_code_is_1005(served: Any) -> None:
    async def end(client: Any) -> None:
        client.protocol.send_close()
        await client.flush()

    assert await disconnect_of(served, end) == (1005, "")


async def test_a_client_that_vanishes_is_1006(served: Any) -> None:
    async def end(client: Any) -> None:
        await client.stream.aclose()

    assert (await disconnect_of(served, end))[0] == 1006


async def test_a_client_that_breaks_the_protocol_is_1002(served: Any) -> None:
    async def end(client: Any) -> None:
        await client.stream.send_all(b"\xff\xff")

    assert (await disconnect_of(served, end))[0] == 1002


async def test_send_after_the_end_raises_oserror_and_close_does_nothing(served: Any) -> None:
    over = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        assert (await receive())["type"] == "websocket.disconnect"
        for _ in range(2):
            with pytest.raises(OSError, match="the connection is over: 4000 bye"):
                await send({"type": "websocket.send", "text": "a"})
        await send({"type": "websocket.close"})
        over.set()

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        await client.close(4000, "bye")
        await over.wait()


async def test_an_unhandled_oserror_of_send_is_no_error_of_the_app(served: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await receive()
        await send({"type": "websocket.send", "text": "a"})

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        await client.close()


async def test_an_app_that_is_busy_is_cancelled_with_the_connection(served: Any) -> None:
    cancelled = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        await client.close()
        await cancelled.wait()


async def test_an_app_that_was_told_has_close_timeout_to_finish(served: Any, patient_clock: MockClock) -> None:
    times = []
    cancelled = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await receive()
        times.append(trio.current_time())
        try:
            await trio.sleep_forever()
        finally:
            times.append(trio.current_time())
            cancelled.set()

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        await client.close()
        await cancelled.wait()
    assert times[1] - times[0] == pytest.approx(SETTINGS.close_timeout, abs=0.5)


@pytest.mark.parametrize("listens", [True, False])
async def test_a_drain_tells_an_app_or_cancels_it_and_waits_for_its_end(
    served: Any, patient_clock: MockClock, listens: bool
) -> None:
    happened: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        try:
            if listens:
                happened.append(await receive())
            await trio.sleep_forever()
        finally:
            happened.append(round(trio.current_time() - began))

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        await wait_all_tasks_blocked()
        began = trio.current_time()
        server.scope.cancel()
        assert (await client.closed())[0] == 1012
        await client.stream.aclose()
        await server.over.wait()
    if listens:
        assert happened == [{"type": "websocket.disconnect", "code": 1012, "reason": ""}, SETTINGS.close_timeout]
    else:
        assert happened == [0]


async def test_a_drain_tells_an_app_at_once_though_the_client_does_not_answer(
    served: Any, patient_clock: MockClock
) -> None:
    told = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        assert (await receive())["code"] == 1012
        told.set()

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect():
        await wait_all_tasks_blocked()
        began = trio.current_time()
        server.scope.cancel()
        await told.wait()
        assert trio.current_time() - began < SETTINGS.close_timeout / 2


async def test_an_app_that_decides_while_the_server_closes_is_cancelled(served: Any, patient_clock: MockClock) -> None:
    cancelled = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with served(handler_of(app), settings=SETTINGS) as server, trio.open_nursery() as nursery:

        async def ask() -> None:
            async with server.open() as stream:
                await stream.send_all(UPGRADE)
                assert await stream.receive_some() == b""

        nursery.start_soon(ask)
        await wait_all_tasks_blocked(0.05)
        server.scope.cancel()
        await cancelled.wait()


async def test_a_bug_after_the_end_is_reported(served: Any, records: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await receive()
        raise ZeroDivisionError("while cleaning up")

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect("/late") as client:
        await client.close()
    [record] = records.read("ERROR")
    assert (record["message"], record["path"]) == ("ZeroDivisionError: while cleaning up", "/late")


async def test_the_app_closes_and_its_close_is_what_it_is_told(served: Any) -> None:
    events = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await send({"type": "websocket.close", "code": 3000, "reason": "enough"})
        events.append(await receive())

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        assert await client.closed() == (3000, "enough")
    assert events == [{"type": "websocket.disconnect", "code": 3000, "reason": "enough"}]


async def test_an_app_that_closes_does_not_wait_for_the_client(served: Any, patient_clock: MockClock) -> None:
    seconds = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        began = trio.current_time()
        await send({"type": "websocket.close"})
        assert (await receive())["type"] == "websocket.disconnect"
        seconds.append(trio.current_time() - began)

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect():
        await trio.sleep(SETTINGS.close_timeout + 1)
    assert seconds[0] < SETTINGS.close_timeout / 2


async def test_an_app_that_closed_receives_nothing_more(served: Any) -> None:
    events = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        events.append((await receive())["type"])
        await send({"type": "websocket.close"})
        events.append((await receive())["type"])

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        await client.send("a", "b")
        assert await client.closed() == (1000, "")
    assert events == ["websocket.receive", "websocket.disconnect"]


async def test_receive_and_send_are_checkpoints_after_the_end(served: Any) -> None:
    over = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with assert_checkpoints():
            await accept(receive, send)
        await receive()
        with assert_checkpoints():
            await receive()
        with assert_checkpoints(), suppress(OSError):
            await send({"type": "websocket.send", "text": "a"})
        with assert_checkpoints():
            await send({"type": "websocket.close"})
        over.set()

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        await client.close()
        await over.wait()


@pytest.mark.parametrize("event", [{"code": 1006}, {"reason": "x" * 124}])
async def test_a_close_that_cannot_be_sent_raises_value_error(served: Any, event: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        with pytest.raises(ValueError, match="close"):
            await send({"type": "websocket.close", **event})

    async with served(handler_of(app), settings=SETTINGS) as server, server.connect() as client:
        assert await client.closed() == (1000, "")


ACCEPT, SEND, CLOSE = {"type": "websocket.accept"}, {"type": "websocket.send", "text": "a"}, {"type": "websocket.close"}
START = {"type": "websocket.http.response.start", "status": 400}
BODY = {"type": "websocket.http.response.body"}


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([SEND], "'websocket.send' is not possible before a decision"),
        ([BODY], "'websocket.http.response.body' is not possible before a decision"),
        ([START, ACCEPT], "'websocket.accept' is not possible within a response"),
        ([START, CLOSE], "'websocket.close' is not possible within a response"),
        ([ACCEPT, ACCEPT], "'websocket.accept' is not possible after the connection was accepted"),
        ([ACCEPT, START], "'websocket.http.response.start' is not possible after the connection was accepted"),
        ([CLOSE, ACCEPT], "'websocket.accept' is not possible after the refusal"),
        ([{"type": "http.response.start"}], "'http.response.start' is not possible before a decision"),
    ],
)
async def test_an_event_out_of_order_raises_runtime_error(
    served: Any, records: Any, events: list[Any], message: str
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for event in events:
            await send(event)

    async with served(handler_of(app), settings=SETTINGS) as server, server.ask("/") as (client, response):
        if response.status_code == 101:
            assert (await client.closed())[0] == 1011
    [record] = records.read("ERROR")
    assert record["message"] == f"RuntimeError: the ASGI event {message}"


async def test_system_exit_of_an_app_before_the_decision_is_500(served: Any, records: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise SystemExit(1)

    async with served(handler_of(app), settings=SETTINGS) as server:
        assert (await server.refused()).status_code == 500
    assert len(records.read("ERROR")) == 1


# Several applications


class Living:
    """An application with a lifespan, and how often it ran."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lives = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            self.lives += 1
            scope["state"]["name"] = self.name
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["type"] == "websocket":
            await accept(receive, send)
            scope["state"]["mine"] = True  # a copy
            await send({"type": "websocket.send", "text": " ".join(map(str, scope["state"].values()))})
        else:
            body = " ".join(map(str, scope["state"].values())).encode()
            headers = [(b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})


async def test_two_apps_and_a_handler_by_path(everywhere: Any) -> None:
    async def handler(ws: tricorn.WebSocket) -> None:
        await ws.send("handler")

    one, other = Living("one"), Living("other")
    handlers = {"/": handler, "/1": asgi_handler(one), "/too": asgi_handler(one), "/2": asgi_handler(other)}
    async with everywhere(handlers, app=one) as server:
        for _ in range(2):
            for path, text in ("/", "handler"), ("/1", "one True"), ("/too", "one True"), ("/2", "other True"):
                async with server.connect(path) as client:
                    assert await client.receive() == text
            assert await server.get() == "one"
        assert (await server.refused("/3")).status_code == 404
    assert (one.lives, other.lives) == (1, 1)


async def test_apps_in_a_mapping_serve_no_pages(served: Any) -> None:
    async with served({"/": asgi_handler(Living("one"))}) as server, server.open() as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 426")


async def test_another_app_may_serve_the_pages(everywhere: Any) -> None:
    async with everywhere(asgi_handler(Living("one")), app=Living("pages")) as server:
        assert await server.get() == "pages"
        async with server.connect() as client:
            assert await client.receive() == "one True"


async def test_an_app_that_does_not_start_up_keeps_the_server_from_starting() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    with pytest.raises(ExceptionGroup) as caught:
        await tricorn.serve({"/": asgi_handler(app)}, 0)
    error: BaseException = caught.value
    while isinstance(error, ExceptionGroup):
        [error] = error.exceptions
    assert "no database" in str(error)
