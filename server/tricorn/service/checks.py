"""The checks of a deployed chat: that it serves, and goes on serving after connections that fail on purpose."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Literal
from urllib.parse import urlsplit

import h11
import msgspec
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError
from websockets.frames import Close, Frame, Opcode

from tricorn.chat.client.connect import ServerMessage
from tricorn.chat.client.screen import one_line
from tricorn.chat.close_codes import UNAUTHENTICATED
from tricorn.chat.protocol import (
    SUBPROTOCOL,
    AgentCompleted,
    AgentStarted,
    AgentThinking,
    AnyEvent,
    ToolCompleted,
    ToolExecuting,
    Welcome,
)
from tricorn.errors.reason import innermost, reason
from tricorn.service.deployment import CONNECTION, LOST, CheckFailed, Connection, Deployment, NoConnection, end_of, tag

DEMO = "demo"
FIVE = (AgentStarted, AgentThinking, ToolExecuting, ToolCompleted, AgentCompleted)
NORMAL, PROTOCOL_ERROR, NOT_UTF8 = 1000, 1002, 1007
RSV2 = 0x20  # a bit of a frame's first byte that means nothing, RFC 6455 §5.2

Outcome = Literal["ok", "failed", "skipped"]

_decode = msgspec.json.Decoder(ServerMessage).decode


@dataclass(frozen=True)
class Result:
    """What a check found, in one sentence."""

    check: str
    outcome: Outcome
    seconds: float
    detail: str


# The checks. Each returns what it found in a sentence, or raises.


async def health(deployment: Deployment) -> str:
    """Ask whether the server runs."""
    return await _get_ok(deployment, "healthz", "a server that runs")


async def readiness(deployment: Deployment) -> str:
    """Ask whether the server is ready."""
    return await _get_ok(deployment, "readyz", "a server that is ready")


async def _get_ok(deployment: Deployment, name: str, who: str) -> str:
    path = deployment.page(name)
    status, body = await deployment.get(path)
    if status != 200:
        raise CheckFailed(f"GET {path} answered {status} ({body[:200]}); {who} answers 200")
    return f"GET {path} answered 200"


async def handshake(deployment: Deployment) -> str:
    """Open a WebSocket and be welcomed."""
    async with deployment.connect() as connection:
        if connection.subprotocol != SUBPROTOCOL:
            raise CheckFailed(f"the server chose the subprotocol {connection.subprotocol}, not {SUBPROTOCOL}")
        try:
            text = await connection.receive("`welcome`; a server with a key wants a token, TRICORN_TOKEN")
        except ConnectionClosed as closed:
            code, why = end_of(closed)
            token = "; set TRICORN_TOKEN to a token that is good there" if code == UNAUTHENTICATED else ""
            raise NoConnection(f"the server closed with {code} ({why}) instead of saying `welcome`{token}") from None
        try:
            welcome = _decode(text)
        except msgspec.DecodeError as error:
            raise CheckFailed(f"the first message is no `welcome` of {SUBPROTOCOL}: {error}") from None
        if not isinstance(welcome, Welcome):
            raise CheckFailed(f"the first message is `{tag(type(welcome))}`; it should be `welcome`")
        return f"{SUBPROTOCOL} for the user {welcome.user}"


async def events(deployment: Deployment) -> str:
    """Have the agent answer a post."""
    conversation = f"check-{token_hex(8)}"
    async with deployment.visit() as visit:
        await visit.open(conversation)
        await visit.post(conversation)
        return _judge_run([event for event, _ in await visit.events(AgentCompleted)])


def _judge_run(events: Sequence[AnyEvent]) -> str:
    seqs = [event.seq for event in events]
    if seqs != [*range(1, len(seqs) + 1)]:
        raise CheckFailed(f"the events have the sequence numbers {seqs}; they should count from 1 without gaps")
    seen = [kind for kind in dict.fromkeys(map(type, events)) if kind in FIVE]
    names = ", ".join(map(tag, seen))
    started = next((event for event in events if isinstance(event, AgentStarted)), None)
    end = events[-1]
    if not isinstance(end, AgentCompleted) or end.outcome != "success":
        outcome = getattr(end, "outcome", "nothing")
        error_id = f" (error {end.error_id})" if isinstance(end, AgentCompleted) and end.error_id else ""
        raise CheckFailed(f"the run ended with `{outcome}`{error_id} after {names}; it should end with `success`")
    if started is None or seen[0] is not AgentStarted or seen[-1] is not AgentCompleted:
        raise CheckFailed(f"the run had {names}; it should begin with agent_started and end with agent_completed")
    if seen == [*FIVE]:
        return "all five kinds of events, in order"
    if started.agent == DEMO:
        raise CheckFailed(f"the demo agent's run had {names}; it should have {', '.join(map(tag, FIVE))}")
    return f"the agent {started.agent} completed with success; of the five kinds of events it had {names}"


async def resume(deployment: Deployment) -> str:
    """Lose the connection in the middle of a run, and get the rest on another one."""
    conversation = f"check-{token_hex(8)}"
    async with deployment.visit(cut=True) as visit:
        opened = await visit.open(conversation)
        await visit.post(conversation)
        heard = await visit.events(AgentStarted)
    cursor = heard[-1][0].seq
    async with deployment.visit() as visit:
        again = await visit.open(conversation, cursor, opened.epoch)
        if again.epoch != opened.epoch:
            raise CheckFailed(
                "the second connection found another log than the first; instances that clients may come back to "
                "should share one"
            )
        heard += await visit.events(AgentCompleted)
    seqs = [event.seq for event, _ in heard]
    if seqs != [*range(1, len(seqs) + 1)]:
        raise CheckFailed(f"over two connections, cut after {cursor}, came the events {seqs}; each should come once")
    async with deployment.visit() as visit:
        await visit.open(conversation)
        if heard != await visit.events(AgentCompleted):
            raise CheckFailed("a third connection was told other events than the first two; they should be the same")
    return f"cut after event {cursor}, a new connection brought {cursor + 1} to {seqs[-1]}, each once and in order"


async def close_codes(deployment: Deployment) -> str:
    """Ask the server to close, and, if it wants tokens, come without one."""
    async with deployment.connect() as connection:
        await connection.receive("the first message")
        await connection.write(_frame(Opcode.CLOSE, Close(NORMAL, "").serialize()))
        _check_end("the client asked to close with 1000", NORMAL, await connection.until_closed())
    found = "1000 was answered with 1000"
    if deployment.token is None:
        return f"{found}; without tokens no close code of the chat's own can be provoked"
    async with deployment.connect(with_token=False) as connection:
        await connection.write(_frame(Opcode.TEXT, b'{"type":"ping"}'))
        _check_end("a client without a token spoke", UNAUTHENTICATED, await connection.until_closed())
    return f"{found}, a client without a token with {UNAUTHENTICATED}"


def _check_end(cause: str, code: int, end: tuple[int, str]) -> None:
    if end[0] != code:
        raise CheckFailed(f"{cause}: the server ended the connection with {end[0]} ({end[1]}); right would be {code}")


@dataclass(frozen=True)
class Mistake:
    """What a client should not send, and what the server should do about it."""

    name: str
    data: bytes
    code: int | None = None  # closes with this
    error: str | None = None  # answers with this


def _frame(opcode: Opcode, data: bytes, *, reserved: int = 0, mask: bool = True) -> bytes:
    first, *rest = Frame(opcode, data).serialize(mask=mask)
    return bytes((first | reserved, *rest))


MISTAKES = (
    Mistake("a frame with a reserved bit", _frame(Opcode.TEXT, b"{}", reserved=RSV2), code=PROTOCOL_ERROR),
    Mistake("a frame without a mask", _frame(Opcode.TEXT, b"{}", mask=False), code=PROTOCOL_ERROR),
    Mistake("a text that is not UTF-8", _frame(Opcode.TEXT, b"\xff"), code=NOT_UTF8),
    Mistake("a text that is not JSON", _frame(Opcode.TEXT, b"}"), error="malformed"),
    Mistake("a post without its fields", _frame(Opcode.TEXT, b'{"type":"post"}'), error="malformed"),
    Mistake("a binary message", _frame(Opcode.BINARY, b"{}"), error="malformed"),
    Mistake("a message of an unknown type", _frame(Opcode.TEXT, b'{"type":"check"}'), error="unknown_type"),
    Mistake("a connection lost in the middle of a frame", _frame(Opcode.TEXT, b"{}")[:-1]),
)


async def import_stability(deployment: Deployment) -> str:
    """Fail in every way that is documented, in sequence and at once: the rare paths of the server run."""
    without_code = [await _make(mistake, deployment) for mistake in MISTAKES]
    await _ask_badly(deployment)
    async with trio.open_nursery() as nursery:
        for mistake in MISTAKES:
            nursery.start_soon(_make, mistake, deployment)
        nursery.start_soon(_ask_badly, deployment)
    count = len(MISTAKES) + 1
    found = f"{count} connections failed on purpose, one by one and then at once, each with the documented answer"
    return f"{found}; who breaks RFC 6455 gets no close code, as under plain Hypercorn" if any(without_code) else found


async def _make(mistake: Mistake, deployment: Deployment) -> bool:
    """Return whether there was no close code, as Hypercorn gives none in place of 1002 and 1007."""
    async with deployment.connect() as connection:
        try:
            await connection.receive("the first message")
            await connection.write(mistake.data)
            if mistake.code is not None:
                end = await connection.until_closed()
                if end[0] == LOST:
                    return True
                _check_end(mistake.name, mistake.code, end)
            elif mistake.error is not None:
                await _check_error(mistake, mistake.error, connection)
        except ConnectionClosed as closed:
            code, why = end_of(closed)
            right = f"the error `{mistake.error}`" if mistake.error else "nothing"
            raise CheckFailed(
                f"{mistake.name}: the server ended the connection with {code} ({why}); right would be {right}"
            ) from None
    return False


async def _check_error(mistake: Mistake, error: str, connection: Connection) -> None:
    answer: dict[str, object] = {}
    while answer.get("type") != "error":
        answer = msgspec.json.decode(await connection.receive(f"the answer to {mistake.name}"))
    if answer.get("code") != error:
        raise CheckFailed(
            f"{mistake.name}: the server answered with the error `{answer.get('code')}`; right would be `{error}`"
        )


async def _ask_badly(deployment: Deployment) -> None:
    headers = [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Version", "13"),
    ]
    status, _ = await deployment.get(deployment.url.path, headers)
    if not 400 <= status < 500:
        raise CheckFailed(f"a handshake without a key was answered with {status}; right would be 400")


async def recovery(deployment: Deployment) -> str:
    """Chat once more after all that failed."""
    await health(deployment)
    return f"still healthy; {await events(deployment)}"


CHECKS: tuple[tuple[str, Callable[[Deployment], Awaitable[str]], bool], ...] = (  # and whether it needs a welcome
    ("health", health, False),
    ("readiness", readiness, False),
    ("handshake", handshake, False),
    ("events", events, True),
    ("resume", resume, True),
    ("close codes", close_codes, False),
    ("import stability", import_stability, False),
    ("recovery", recovery, True),
)


async def check(url: str, token: str | None, patience: float, tell: Callable[[Result], None]) -> bool:
    """Run all checks on the chat at a WebSocket URL, `tell` each result, and return whether all of them are ok.

    A check fails if it takes more than `patience` seconds. If one finds that there is no connection to be had, those
    after it are skipped. If cancelled, the connections are dropped without a closing handshake.
    """
    deployment = Deployment(urlsplit(url), token)
    results: list[Result] = []
    missing = {"welcome": "", "connection": ""}
    for name, function, needs_welcome in CHECKS:
        reason_to_skip = missing["connection"] or (missing["welcome"] if needs_welcome else "")
        if reason_to_skip:
            result = Result(name, "skipped", 0.0, reason_to_skip)
        else:
            result, no_connection = await _run(name, function, deployment, patience)
            if no_connection:
                missing["connection"] = f"not tried, because {name} failed"
            if name == "handshake" and result.outcome == "failed":
                missing["welcome"] = "not tried, because handshake failed"
        results.append(result)
        tell(result)
    return all(result.outcome == "ok" for result in results)


async def _run(
    name: str, function: Callable[[Deployment], Awaitable[str]], deployment: Deployment, patience: float
) -> tuple[Result, bool]:
    began = trio.current_time()
    outcome: Outcome = "failed"
    detail, no_connection = "", False
    try:
        with trio.fail_after(patience):
            detail = await function(deployment)
        outcome = "ok"
    except* trio.TooSlowError:
        detail = f"not done within {patience:g} s: still waiting for {deployment.waiting_for}"
        no_connection = deployment.waiting_for == CONNECTION
    except* CheckFailed as errors:
        detail, no_connection = str(_first(errors)), isinstance(_first(errors), NoConnection)
    except* ConnectionRejected as errors:
        status = getattr(innermost(errors), "status_code", 0)
        detail, no_connection = f"the server answered {status} instead of opening a WebSocket (101)", True
    except* ConnectionClosed as errors:
        code, why = end_of(innermost(errors))
        detail = f"the server ended the connection with {code} ({why}) while it should say {deployment.waiting_for}"
    except* (HandshakeError, h11.RemoteProtocolError, OSError, trio.BrokenResourceError) as errors:
        detail = f"connection lost while waiting for {deployment.waiting_for}: {reason(errors)}"
    return Result(name, outcome, trio.current_time() - began, one_line(detail)), no_connection


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
