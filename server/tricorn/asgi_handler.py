"""An ASGI application under this server: its own WebSocket routes, on our codec and within our limits.

Source: ASGI 3.0, "HTTP & WebSocket ASGI Message Format" 2.5, with the extension "WebSocket Denial Response".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from http import HTTPStatus
from inspect import isclass, signature
from typing import TYPE_CHECKING, Any, NoReturn, cast
from wsgiref.headers import Headers

import trio
from trio import BusyResourceError, CancelScope, Event, current_time, move_on_after
from trio.lowlevel import checkpoint

from tricorn.connection import Disconnected
from tricorn.errors.report import report, report_error
from tricorn.protocol.close import ABNORMAL, NORMAL, SERVICE_RESTART, Close
from tricorn.protocol.handshake import check_answer, offered_subprotocols
from tricorn.request import Accept, Refuse
from tricorn.websocket import Handler

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import AbstractContextManager

    from tricorn.request import Request
    from tricorn.settings import Settings
    from tricorn.websocket import WebSocket

    ASGIEvent = dict[str, Any]
    Upgrade = Callable[[Accept, Handler], Awaitable[None]]

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]  # ASGI 3.0; frameworks differ in how they type it

NOT_ASGI = "an ASGI 3.0 application is called with three arguments, scope, receive and send; this is {!r}"
FRAMING = ("connection", "content-length", "transfer-encoding")  # headers that say how a response is sent
DISCONNECT_ERRORS = ("WebSocketDisconnect", "WebSocketDisconnected")  # of Starlette and FastAPI, Litestar, Falcon


def asgi_handler(app: ASGIApp) -> AsgiHandler:
    """Make a handler of an ASGI 3.0 application, for `tricorn.serve`, `run` and `asgi_app`, alone or in a mapping.

    The application decides about each upgrade, within `settings.handshake_timeout` seconds: `websocket.accept`, with a
    subprotocol and headers; `websocket.close`, which answers with 403; or a response of its own
    (`websocket.http.response`, status 300 to 599). `before_upgrade` is asked first. Headers of its `Accept` are sent
    too, and its state is `scope["extensions"]["tricorn"]["state"]`. It is the application that chooses a subprotocol.

    A connection is what it is with any handler. The application gets every message of the peer, then
    `websocket.disconnect`, and has `settings.close_timeout` seconds to finish from there, also if the server closes
    (1012). If the connection ends while the application neither receives nor was told, it is cancelled. If it returns,
    the connection closes with 1000; if it raises, with 1011 and an error id; before it has decided, either is answered
    with 500.

    `send` waits while the peer does not keep up. Once the connection is over it raises an `OSError`, but for
    `websocket.close`, which does nothing then. `receive` may be cancelled and loses no message; one task at a time may
    receive. An event that the state of the connection does not allow raises a RuntimeError.

    In the scope, headers that came several times are joined by commas, cookies by semicolons.

    Raises:
        TypeError: this is not an ASGI 3.0 application.
    """
    return AsgiHandler(app)


def is_asgi_app(what: object) -> bool:
    """Whether something looks like an ASGI 3.0 application: it has to be called with three arguments, and not one."""
    return not isclass(what) and _takes(what, 3) and not _takes(what, 1)


def _takes(what: object, count: int) -> bool:
    try:
        signature(cast("Callable[..., object]", what)).bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    return True


class AsgiHandler:
    """A handler that is an ASGI application. `asgi_handler` makes one.

    Attributes:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        if isclass(app) or not _takes(app, 3):
            raise TypeError(NOT_ASGI.format(app))
        self.app = app

    async def serve(
        self,
        scope: Mapping[str, Any],
        accepted: Accept,
        upgrade: Upgrade,
        *,
        state: Mapping[str, Any],
        settings: Settings,
        deciding: AbstractContextManager[None] = nullcontext(),  # noqa: B008 (it can be used again)
    ) -> None:
        """Have the application decide about an upgrade, and serve the connection until it and the application ended.

        `scope` is that of the request, `state` that of the lifespan. `accepted` is the answer of the hook. If the
        application accepts too, `upgrade` is awaited with the answer and a handler: it upgrades, and runs the
        connection to its end. `deciding` is entered for as long as the application has not decided.

        Raises:
            Refuse: the request is not to be upgraded, or it is `upgrade` that raised this.
        """
        session = _Session(self.app, _complete(scope, accepted, state), settings)
        failure = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.run)
                try:
                    with deciding:
                        answer = await session.decision()
                    headers = _headers([*accepted.headers.items(), *answer.headers.items()])
                    await upgrade(Accept(answer.subprotocol, headers, accepted.state), session.bridge)
                except Exception as error:
                    failure = error
                finally:
                    session.end()
            session.report_rest()
            if failure is not None:
                raise failure
        finally:
            del failure  # or it would refer to itself, by its traceback


def websocket_scope(request: Request, server: tuple[str, int] | str, root_path: str = "") -> dict[str, Any]:
    """Return the scope of a request to a server at an address: host and port, or the path of a Unix socket."""
    return {
        "http_version": request.http_version,
        "scheme": "wss" if request.secure else "ws",
        "path": request.path,
        "raw_path": request.raw_path.encode("latin-1"),
        "query_string": request.query.encode("latin-1"),
        "root_path": root_path,
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in request.headers.items()],
        "client": request.peer,
        "server": (server, None) if isinstance(server, str) else server[:2],
        "subprotocols": [name for name in offered_subprotocols(request) if name],
    }


def _complete(scope: Mapping[str, Any], accepted: Accept, state: Mapping[str, Any]) -> dict[str, Any]:
    extensions: dict[str, Any] = {"websocket.http.response": {}}
    if accepted.state is not None:
        extensions["tricorn"] = {"state": accepted.state}
    asgi = {"version": "3.0", "spec_version": "2.5"}
    return {**scope, "type": "websocket", "asgi": asgi, "extensions": extensions, "state": dict(state)}


class _Denial(Refuse):
    """A response of the application's own, which may be a redirection (RFC 6455 §4.1)."""

    _lowest = 300


class ClientDisconnected(OSError):
    """What `send` raises when the connection is over (ASGI 3.0)."""


class _Session:
    """One run of an application, from before the upgrade to the end of the connection, and its `receive` and `send`."""

    def __init__(self, app: ASGIApp, scope: dict[str, Any], settings: Settings) -> None:
        self._app = app
        self._scope = scope
        self._settings = settings
        self._running = CancelScope(shield=True)  # the application, until `end`
        self._errors: BaseExceptionGroup[BaseException] | None = None  # that it raised, until they are reported
        self._returned = Event()
        self._connecting = True  # it has not received `websocket.connect`
        self._answer: Accept | Refuse | None = None
        self._decided = Event()  # there is an answer, or there will be none
        self._denial: ASGIEvent | None = None  # `websocket.http.response.start`
        self._denial_body = bytearray()
        self._ws: WebSocket[Any] | None = None
        self._settled = Event()  # there is a WebSocket, or there will be none
        self._listening: CancelScope | None = None  # the task that sits in `receive`
        self._told = False  # the application knows that the connection is over

    # For the server

    async def run(self) -> None:
        """Run the application, and keep what it raises. Only `end` ends it: what cancels this has to call that."""
        try:
            with self._running:
                await self._app(self._scope, self.receive, self.send)
        except* (trio.Cancelled, KeyboardInterrupt):
            raise
        except* BaseException as errors:
            self._errors = errors
        finally:
            self._returned.set()
            self._decided.set()

    async def decision(self) -> Accept:
        """Wait until the application has decided. Raises Refuse, also if it fails or is late."""
        with move_on_after(self._settings.handshake_timeout):
            await self._decided.wait()
        if isinstance(self._answer, Refuse):
            raise self._answer
        if self._answer is not None:
            return self._answer
        if not self._returned.is_set():
            report("WARNING", "the ASGI application did not decide in time", **self._about())
            raise Refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the server could not decide in time")
        errors, self._errors = self._errors, None
        if errors is None:
            error_id = report_error(RuntimeError("the ASGI application returned without a decision"), **self._about())
        else:
            error_id = report_error(errors, **self._about())
        raise Refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"internal server error {error_id}")

    async def bridge(self, ws: WebSocket[Any]) -> None:
        """The handler: it lasts as long as the application, and raises what that raises."""
        self._ws = ws
        self._settled.set()
        try:
            await self._returned.wait()
        finally:
            self.end()
        errors, self._errors = self._errors, None
        if errors is not None and (rest := self._without_disconnects(errors)) is not None:
            raise rest

    def end(self) -> None:
        """The connection is over, or there is none: tell the application, or cancel it if it is busy elsewhere."""
        self._settled.set()
        if self._listening is not None:
            self._listening.cancel()
            self._bound()
        elif not self._told:
            self._running.cancel()

    def report_rest(self) -> None:
        """Report what the application raised after the connection was over."""
        errors, self._errors = self._errors, None
        if errors is not None and (rest := self._without_disconnects(errors)) is not None:
            report_error(rest, **self._about())

    # For the application

    async def receive(self) -> ASGIEvent:
        """Return `websocket.connect`, then the messages, then `websocket.disconnect`, and that again if asked again.

        If cancelled, no message is lost.

        Raises:
            trio.BusyResourceError: another task is receiving.
        """
        if self._connecting:
            self._connecting = False
            await checkpoint()
            return {"type": "websocket.connect"}
        if self._told:
            await checkpoint()
            return self._disconnect()
        if self._listening is not None:
            raise BusyResourceError("another task is receiving from this connection")
        try:
            with CancelScope() as self._listening:
                if self._ws is None:
                    await self._settled.wait()
                if self._ws is not None:
                    message = await self._ws.receive()
                    text, data = (message, None) if isinstance(message, str) else (None, message)
                    return {"type": "websocket.receive", "text": text, "bytes": data}
        except Disconnected:
            pass
        finally:
            self._listening = None
        self._tell()
        return self._disconnect()

    async def send(self, event: ASGIEvent) -> None:
        """Obey an event of the application.

        Raises:
            OSError: the connection is over.
            RuntimeError: the event does not fit the state of the connection, or is unknown.
            TypeError, ValueError: something in it cannot be sent.
        """
        match event["type"]:
            case "websocket.send" if isinstance(self._answer, Accept) or self._told:
                await self._send(event)
            case "websocket.close" if self._told:
                await checkpoint()
            case "websocket.close" if isinstance(self._answer, Accept):
                await self._close(event)
            case "websocket.close" if self._answer is None and self._denial is None:
                await self._refuse(Refuse(HTTPStatus.FORBIDDEN))
            case "websocket.accept" if self._answer is None and self._denial is None:
                await self._accept(event)
            case "websocket.http.response.start" if self._answer is None and self._denial is None:
                self._denial = event
                await checkpoint()
            case "websocket.http.response.body" if self._answer is None and self._denial is not None:
                await self._deny(self._denial, event)
            case unexpected:
                raise RuntimeError(f"the ASGI event {unexpected!r} is not possible {self._stage()}")

    async def _accept(self, event: ASGIEvent) -> None:
        accepted = Accept(event.get("subprotocol"), _headers(_decoded(event.get("headers", ()))))
        check_answer(accepted, self._scope["subprotocols"])
        self._decide(accepted)
        await self._settled.wait()
        if self._ws is None:
            self._gone()

    async def _deny(self, start: ASGIEvent, event: ASGIEvent) -> None:
        self._denial_body += event.get("body", b"")
        if event.get("more_body", False):
            await checkpoint()
            return
        headers = [(k, v) for k, v in _decoded(start.get("headers", ())) if k.lower() not in FRAMING]
        refused = _Denial(start["status"], bytes(self._denial_body), _headers(headers))
        check_answer(refused, ())
        await self._refuse(refused)

    async def _refuse(self, refused: Refuse) -> None:
        self._decide(refused)
        self._tell()
        await checkpoint()

    async def _send(self, event: ASGIEvent) -> None:
        message = event.get("bytes")
        if message is None:
            message = event.get("text")
        if not isinstance(message, str | bytes | bytearray | memoryview):
            raise TypeError(f"`text` of websocket.send is a str, or `bytes` bytes; not {type(message).__name__}")
        if self._ws is None:
            await self._settled.wait()
        try:
            if self._ws is not None:
                await self._ws.send(message if isinstance(message, str) else bytes(message))
                return
        except Disconnected:
            pass
        self._gone()

    async def _close(self, event: ASGIEvent) -> None:
        code = event.get("code")
        await self._settled.wait()
        if self._ws is not None:
            self._tell()
            with move_on_after(0):  # the application may go on; the connection closes all the same
                await self._ws.close(NORMAL if code is None else code, event.get("reason") or "")

    # Inside

    def _decide(self, answer: Accept | Refuse) -> None:
        self._answer = answer
        self._decided.set()

    def _tell(self) -> None:
        """The application gets to know that the connection is over."""
        self._told = True
        self._bound()

    def _bound(self) -> None:
        """Give the application `close_timeout` seconds to finish."""
        deadline = current_time() + self._settings.close_timeout
        self._running.deadline = min(self._running.deadline, deadline)

    def _gone(self) -> NoReturn:
        self._tell()
        close = self._closed()
        raise ClientDisconnected(f"the connection is over: {close.code} {close.reason}".rstrip()) from None

    def _disconnect(self) -> ASGIEvent:
        close = self._closed()
        return {"type": "websocket.disconnect", "code": close.code, "reason": close.reason}

    def _closed(self) -> Close:
        if self._ws is None:
            return Close(ABNORMAL)
        return self._ws.closed or Close(SERVICE_RESTART)  # cancelled from outside, which it does not know yet

    def _stage(self) -> str:
        if self._answer is not None:
            return "after the connection was accepted" if isinstance(self._answer, Accept) else "after the refusal"
        return "before a decision" if self._denial is None else "within a response"

    def _without_disconnects(self, errors: BaseExceptionGroup[BaseException]) -> BaseExceptionGroup[Any] | None:
        """What is left of the errors without those that only say that the peer is gone."""
        return errors.split(_is_disconnect)[1] if self._told else errors

    def _about(self) -> dict[str, Any]:
        scope = self._scope
        return {"connection": self._ws and self._ws.id, "peer": scope["client"], "path": scope["path"]}


def _is_disconnect(error: BaseException) -> bool:
    return isinstance(error, ClientDisconnected) or type(error).__name__ in DISCONNECT_ERRORS


def _headers(pairs: list[tuple[str, str]]) -> Mapping[str, str]:
    """Headers of which some may come several times, such as `Set-Cookie`: `items` has all of them."""
    return cast("Mapping[str, str]", Headers(pairs))


def _decoded(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
