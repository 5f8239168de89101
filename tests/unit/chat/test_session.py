"""A session: what one client is answered and told."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from tricorn.chat import SUBPROTOCOLS, Chat, Run
from tricorn.chat.delivery import BATCH_BYTES, BYTES_PER_TURN, EVENTS_PER_TURN
from tricorn.chat.logs.base import Append, Entry, LogState
from tricorn.chat.logs.memory import MemoryLog
from tricorn.chat.protocol import AgentThinking, ClientRequest
from tricorn.chat.session import decode
from tricorn.chat.settings import ChatSettings

Connect = Callable[..., Awaitable[Any]]


async def echo(run: Run) -> None:
    await run.say(run.message)


async def sleeper(run: Run) -> None:
    await trio.sleep_forever()


def types(objects: list[dict[str, Any]]) -> list[str]:
    return [object["type"] for object in objects]


def seqs(objects: list[dict[str, Any]], conversation: str = "c") -> list[int]:
    return [object["seq"] for object in objects if "at" in object and object["conversation"] == conversation]


async def fill(log: MemoryLog, count: int, conversation: str = "c") -> None:
    key = f"local/{conversation}"
    epoch, *_ = await log.open(key)
    for n in range(count):
        thinking = AgentThinking(conversation=conversation, seq=0, at=0.0, run="r", text=f"{n}")
        await log.append(key, epoch, Append(thinking))


class LostLog(MemoryLog):
    """Says that there is more than there is."""

    immediate = False

    async def open(self, conversation: str) -> LogState:
        return (await super().open(conversation))._replace(head=5)


class BadLog(MemoryLog):
    immediate = False

    async def open(self, conversation: str) -> LogState:
        if conversation == "local/bad":
            raise OSError("secret")
        return await super().open(conversation)


# Welcome


async def test_welcome_comes_first(connect: Connect, nursery: trio.Nursery) -> None:
    settings = ChatSettings(heartbeat=7.0, text_characters=9, open_conversations=3, max_message_bytes=1000)
    async with Chat(echo, settings) as chat:
        client = await connect(chat)
        client.say("authenticate", token="any")
        welcome = await client.hear()
    assert json.loads(client.messages[0]) == welcome
    assert welcome == {
        "type": "welcome",
        "connection": "connection-1",
        "user": "local",
        "heartbeat": 7.0,
        "limits": {
            "message_bytes": 1000,
            "event_bytes": 262144,
            "text_characters": 9,
            "open_conversations": 3,
            "user_runs": 20,
            "posts_per_minute": 60,
        },
    }


def test_who_offers_both_subprotocols_gets_the_batch() -> None:
    assert SUBPROTOCOLS == ("tricorn.v1", "tricorn.v1.batch")


# Calls that are none


@pytest.mark.parametrize(
    ("message", "code", "says", "ref"),
    [
        (b'{"type":"ping"}', "malformed", "binary", None),
        ("", "malformed", "truncated", None),
        ("{", "malformed", "truncated", None),
        ("[]", "malformed", "array", None),
        ("{}", "malformed", "type", None),
        ('{"type":5}', "malformed", "$.type", None),
        ('{"type":"ping"} {"type":"ping"}', "malformed", "trailing", None),
        ('{"type":"ping","x":' + "[" * 100_000, "malformed", "recursion", None),
        ('{"type":"leave","conversation":5,"x":' + "[" * 100_000, "malformed", "$.conversation", None),
        ('{"type":"post","id":"p","conversation":"c"}', "malformed", "text", "p"),
        ('{"type":"answer","conversation":"c","ask":"q"}', "malformed", "text", "q"),
        ('{"type":"answer","conversation":"c","ask":"a b","text":"x"}', "malformed", "regex", "c"),
        ('{"type":"open","conversation":"a b"}', "malformed", "regex", None),
        ('{"type":"post","id":"a b","conversation":"c"}', "malformed", "", "c"),
        (f'{{"type":"post","id":"{"x" * 129}"}}', "malformed", "", None),
        ('{"type":"open","conversation":"c","after":-1}', "malformed", "$.after", "c"),
        ('{"type":"post","id":"p","conversation":"c","text":"\\ud800"}', "malformed", "truncated", None),
        ('{"type":"dance","id":"p"}', "unknown_type", "'dance'", "p"),
        ('{"type":"welcome"}', "unknown_type", "'welcome'", None),
    ],
)
async def test_what_is_no_request_gets_an_error_that_names_what_is_wrong(
    message: str | bytes, code: str, says: str, ref: str | None, connect: Connect
) -> None:
    async with Chat(echo) as chat:
        client = await connect(chat)
        client.send(message)
        client.say("ping")
        error, pong = await client.hear(), await client.hear()
    assert (error["type"], error["code"], error.get("ref")) == ("error", code, ref)
    assert says in error["message"]
    assert len(error["message"]) < 200
    assert pong == {"type": "pong"}


def test_unknown_fields_are_ignored() -> None:
    assert msgspec.to_builtins(decode('{"type":"ping","new":1}')) == {"type": "ping"}


def test_every_request_is_known() -> None:
    for request in ClientRequest.__args__:
        tag = request.__struct_config__.tag
        error = decode(json.dumps({"type": tag, "conversation": 5, "token": 5}))
        assert tag == "ping" or error.code == "malformed"  # type: ignore[union-attr]


# Conversations


async def test_a_post_is_answered_and_its_run_follows(connect: Connect) -> None:
    async with Chat(echo) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="hello")
        opened, *heard = await client.hear_until("agent_completed")
    assert (opened["type"], opened["conversation"], opened["head"]) == ("opened", "c", 0)
    assert opened["epoch"]
    assert types(heard) == ["posted", "user_message", "agent_started", "agent_message", "agent_completed"]
    assert heard[0] == {"type": "posted", "id": "p", "conversation": "c", "seq": 1}
    assert (heard[1]["id"], heard[1]["text"]) == ("p", "hello")
    assert seqs(heard) == [1, 2, 3, 4]


async def test_posting_needs_no_open(connect: Connect) -> None:
    async with Chat(echo) as chat:
        client = await connect(chat)
        client.say("post", id="p", conversation="c", text="hello")
        assert types(await client.hear_all()) == ["posted"]
        client.say("open", conversation="c")
        opened, *events = await client.hear_until("agent_completed")
    assert opened["head"] == 4
    assert seqs(events) == [1, 2, 3, 4]


async def test_a_repeated_post_is_answered_alike(connect: Connect) -> None:
    async with Chat(echo) as chat:
        client, other = await connect(chat), await connect(chat)
        for _ in range(2):
            client.say("post", id="p", conversation="c", text="hello")
        other.say("post", id="p", conversation="c", text="hello")
        answers = await client.hear_all() + await other.hear_all()
        assert {(answer["type"], answer["seq"]) for answer in answers} == {("posted", 1)}
        client.say("open", conversation="c")
        assert types(await client.hear_all()).count("agent_started") == 1


@pytest.mark.parametrize(
    ("after", "epoch", "expected"),
    [
        (0, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (2, "own", [3, 4]),
        (4, "own", []),
        (2, "foreign", [1, 2, 3, 4]),
        (99, "foreign", [1, 2, 3, 4]),
    ],
)
async def test_open_replays_what_follows_the_cursor(
    after: int, epoch: str | None, expected: list[int], connect: Connect
) -> None:
    log = MemoryLog()
    await fill(log, 4)
    own, *_ = await log.open("local/c")
    async with Chat(echo, log=log) as chat:
        client = await connect(chat)
        client.say("open", conversation="c", after=after, epoch={"own": own}.get(epoch or "", epoch))
        opened, *events = await client.hear_all()
    assert opened == {"type": "opened", "conversation": "c", "epoch": own, "head": 4}
    assert seqs(events) == expected


async def test_a_cursor_past_the_end_is_refused(connect: Connect) -> None:
    async with Chat(echo) as chat:
        client = await connect(chat)
        client.say("open", conversation="c", after=1)
        (error,) = await client.hear_all()
        assert (error["code"], error["ref"]) == ("not_found", "c")
        client.say("post", id="p", conversation="c", text="hello")
        assert types(await client.hear_all()) == ["posted"]  # not attached


async def test_opening_again_moves_the_cursor(connect: Connect) -> None:
    log = MemoryLog()
    await fill(log, 4)
    async with Chat(echo, log=log) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        assert seqs(await client.hear_all()) == [1, 2, 3, 4]
        client.say("open", conversation="c", after=2)
        assert seqs(await client.hear_all()) == [3, 4]
        client.say("post", id="p", conversation="c", text="hello")
        assert seqs(await client.hear_all()) == [5, 6, 7, 8]  # attached once
        await client.leave()
        assert len(chat._sessions) == 0


async def test_after_leave_nothing_is_heard(connect: Connect) -> None:
    async with Chat(echo) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        client.say("leave", conversation="c")
        client.say("leave", conversation="never-opened")
        client.say("post", id="p", conversation="c", text="hello")
        assert types(await client.hear_all()) == ["opened", "posted"]


async def test_several_conversations_on_one_connection(connect: Connect) -> None:
    async with Chat(echo) as chat:
        client = await connect(chat)
        for name in "ab":
            client.say("open", conversation=name)
        for name in "ab":
            client.say("post", id="p", conversation=name, text=name)
        heard = await client.hear_all()
    for name in "ab":
        assert seqs(heard, name) == [1, 2, 3, 4]
        assert [h["text"] for h in heard if h["type"] == "agent_message" and h["conversation"] == name] == [name]


async def test_several_connections_on_one_conversation(connect: Connect) -> None:
    async with Chat(echo) as chat:
        clients = [await connect(chat) for _ in range(3)]
        for client in clients:
            client.say("open", conversation="c")
        await trio.testing.wait_all_tasks_blocked()
        clients[0].say("post", id="p", conversation="c", text="hello")
        heard = [await client.hear_until("agent_completed") for client in clients]
    assert all(seqs(each) == [1, 2, 3, 4] for each in heard)
    assert "posted" in types(heard[0])
    assert "posted" not in types(heard[1])


async def test_what_was_framed_for_a_room_is_not_kept(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not while there are always more clients to tell."""
    monkeypatch.setattr("tricorn.chat.delivery.TOLD_AT_ONCE", 1)
    kept: list[int] = []

    async def agent(run: Run) -> None:
        for _ in range(20):
            await run.say("x")
            await trio.lowlevel.checkpoint()
            kept.append(len(chat._teller._prepared))

    async with Chat(agent) as chat:
        clients = [await connect(chat) for _ in range(3)]
        for client in clients:
            client.say("open", conversation="c")
        await trio.testing.wait_all_tasks_blocked()
        clients[0].say("post", id="p", conversation="c", text="hello")
        heard = [await client.hear_until("agent_completed") for client in clients]
    assert all(seqs(each) == list(range(1, 24)) for each in heard)
    assert set(kept) == {0}


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "does not read"])
async def test_a_turn_of_a_client_is_bounded_in_bytes(connect: Connect, reads: bool) -> None:
    async def agent(run: Run) -> None:
        for _ in range(20):
            await run.say("x" * 200_000)

    async with Chat(agent) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        assert types(await client.hear_all()) == ["opened"]
        if not reads:
            client.stop_reading()
        client.say("post", id="p", conversation="c", text="hello")
        await trio.testing.wait_all_tasks_blocked()
        client.readable.set()
        heard = await client.hear_until("agent_completed")
    assert seqs(heard) == list(range(1, 24))
    assert 200_000 < max(client.sizes) <= BYTES_PER_TURN


async def test_too_many_conversations(connect: Connect) -> None:
    async with Chat(echo, ChatSettings(open_conversations=2)) as chat:
        client = await connect(chat)
        for name in "abca":
            client.say("open", conversation=name)
        answers = await client.hear_all()
        assert [answer.get("code") for answer in answers] == [None, None, "too_many", None]
        assert answers[2]["ref"] == "c"
        client.say("leave", conversation="a")
        client.say("open", conversation="c")
        assert types(await client.hear_all()) == ["opened"]


@pytest.mark.parametrize(("text", "code"), [("x" * 11, "too_long"), ("", "malformed"), (" \n", "malformed")])
async def test_texts_that_are_refused(text: str, code: str, connect: Connect) -> None:
    async with Chat(echo, ChatSettings(text_characters=10)) as chat:
        client = await connect(chat)
        client.say("post", id="p1", conversation="c", text=text)
        client.say("post", id="p2", conversation="c", text="x" * 10)
        error, posted = await client.hear_all()
    assert (error["code"], error["ref"]) == (code, "p1")
    assert (posted["type"], posted["seq"]) == ("posted", 1)


async def test_cancel(connect: Connect) -> None:
    async with Chat(sleeper) as chat:
        client, other = await connect(chat), await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="hello")
        run = (await client.hear_until("agent_started"))[-1]["run"]
        other.say("cancel", conversation="c", run="unknown")
        other.say("cancel", conversation="d", run=run)
        assert [(error["code"], error["ref"]) for error in await other.hear_all()] == [
            ("not_found", "c"),
            ("not_found", "d"),
        ]
        other.say("cancel", conversation="c", run=run)
        assert (await client.hear_until("agent_completed"))[-1]["outcome"] == "cancelled"
        assert await other.hear_all() == []
        other.say("cancel", conversation="c", run=run)
        assert types(await other.hear_all()) == ["error"]


async def test_what_the_log_cannot_do_is_an_internal_error(connect: Connect, capfd: pytest.CaptureFixture[str]) -> None:
    async with Chat(echo, log=BadLog()) as chat:
        client = await connect(chat)
        client.say("open", conversation="bad")
        client.say("post", id="p", conversation="bad", text="x")
        client.say("open", conversation="good")
        one, two, opened = await client.hear_all()
    assert (one["code"], one["ref"], two["code"], two["ref"]) == ("internal", "bad", "internal", "p")
    assert "secret" not in str([one, two])
    assert opened["type"] == "opened"
    reported = capfd.readouterr().err
    assert one["error_id"] in reported
    assert two["error_id"] in reported


async def test_a_log_that_has_lost_its_end_ends_the_connection(client_type: type[Any]) -> None:
    async with Chat(echo, log=LostLog()) as chat:
        client = client_type("tricorn.v1")
        client.say("open", conversation="c")
        await client.serve(chat)
    assert client.closed == (1012, "the log has lost its past")


# The end of a session


async def test_a_run_goes_on_without_its_user(connect: Connect, autojump_clock: trio.testing.MockClock) -> None:
    async def slow(run: Run) -> None:
        await trio.sleep(100)
        await run.say("done")

    async with Chat(slow, ChatSettings(abandon_after=inf)) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="hello")
        *_, last = await client.hear_until("agent_started")
        await client.leave()
        await trio.sleep(200)
        other = await connect(chat)
        other.say("open", conversation="c", after=last["seq"])
        _, *events = await other.hear_until("agent_completed")
    assert seqs(events) == [3, 4]
    assert events[-1]["text"] == "done"


async def test_a_cancelled_session_detaches(connect: Connect, autojump_clock: trio.testing.MockClock) -> None:
    async with Chat(echo, ChatSettings(linger=1.0)) as chat:
        client = await connect(chat)
        client.say("open", conversation="c")
        await client.hear_until("opened")
        client.nursery.cancel_scope.cancel()
        await client.ended.wait()
        assert not chat._sessions
        await trio.sleep(2)
        assert not chat._conversations


# The writer


async def test_heartbeat_when_nothing_else_was_sent(connect: Connect, autojump_clock: trio.testing.MockClock) -> None:
    async with Chat(echo, ChatSettings(heartbeat=20.0)) as chat:
        client = await connect(chat)
        began = trio.current_time()
        assert await client.hear() == {"type": "heartbeat"}
        assert trio.current_time() - began == pytest.approx(20)
        await trio.sleep(15)
        client.say("leave", conversation="no-answer")
        assert await client.hear() == {"type": "heartbeat"}
        assert trio.current_time() - began == pytest.approx(40)
        await trio.sleep(15)
        client.say("ping")
        await client.hear_until("pong")
        await client.hear_until("heartbeat")
        assert trio.current_time() - began == pytest.approx(75)


async def test_heartbeats_of_many_come_early_and_never_late(
    connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    async with Chat(echo, ChatSettings(heartbeat=20.0)) as chat:
        one = await connect(chat)
        await trio.sleep(1)
        other = await connect(chat)
        for beat in (20, 40):
            assert await one.hear() == await other.hear() == {"type": "heartbeat"}
            assert trio.current_time() == pytest.approx(beat)
        await trio.sleep(5)
        one.say("ping")
        await one.hear_until("pong")
        assert await other.hear() == {"type": "heartbeat"}
        assert trio.current_time() == pytest.approx(60)
        assert await one.hear() == {"type": "heartbeat"}
        assert trio.current_time() == pytest.approx(65)


@pytest.mark.parametrize("subprotocol", ["tricorn.v1", "tricorn.v1.batch", None])
async def test_a_long_replay_comes_whole_in_bounded_turns(subprotocol: str | None, connect: Connect) -> None:
    log = MemoryLog()
    await fill(log, 1000)
    async with Chat(echo, log=log) as chat:
        client = await connect(chat, subprotocol)
        client.say("open", conversation="c")
        heard = await client.hear_all()
    assert seqs(heard) == list(range(1, 1001))
    assert client.writes < 10
    if subprotocol != "tricorn.v1.batch":
        assert all("\n" not in message for message in client.messages)
    else:
        assert 2 < len(client.messages) <= 10


async def test_conversations_share_a_turn(connect: Connect) -> None:
    log = MemoryLog()
    for name in "ab":
        await fill(log, 1000, name)
    async with Chat(echo, log=log) as chat:
        client = await connect(chat)
        client.stop_reading()
        for name in "ab":
            client.say("open", conversation=name)
        await trio.testing.wait_all_tasks_blocked()
        client.readable.set()
        heard = await client.hear_all()
    assert seqs(heard, "a") == seqs(heard, "b") == list(range(1, 1001))
    order = [each["conversation"] for each in heard if "at" in each]
    assert order.index("b") < 2 * EVENTS_PER_TURN
    assert order[::-1].index("a") <= 2 * EVENTS_PER_TURN


async def test_a_slow_reader_lags_in_the_log_and_loses_nothing(connect: Connect) -> None:
    async def chatty(run: Run) -> None:
        for n in range(600):
            await run.say(str(n))

    async with Chat(chatty) as chat:
        client, other = await connect(chat), await connect(chat)
        for each in (client, other):
            each.say("open", conversation="c")
            await each.hear_until("opened")
        client.stop_reading()
        other.say("post", id="p", conversation="c", text="go")
        assert seqs(await other.hear_until("agent_completed")) == list(range(1, 604))
        assert await client.hear_all() == []
        client.readable.set()
        assert seqs(await client.hear_until("agent_completed")) == list(range(1, 604))


async def test_a_batch_of_requests_is_served_in_order(connect: Connect) -> None:
    async with Chat(echo) as chat:
        client = await connect(chat, "tricorn.v1.batch")
        client.send('{"type":"open","conversation":"a"}\n\n {"type":"dance"}\r\n\n{"type":"ping"}\n')
        assert types(await client.hear_all()) == ["opened", "error", "pong"]
        client.send(b"\n")
        assert types(await client.hear_all()) == ["error"]


async def test_the_messages_of_a_batch_are_bounded(connect: Connect) -> None:
    big = "x" * (BATCH_BYTES // 2 + 1)

    async def agent(run: Run) -> None:
        for _ in range(4):
            await run.say(big)

    async with Chat(agent) as chat:
        client = await connect(chat, "tricorn.v1.batch")
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_all()  # posted; the run is over
        client.say("open", conversation="c")
        await client.hear_until("agent_completed")
    messages = [message for message in client.messages if big in message]
    assert len(messages) == 5
    assert all(len(message) < BATCH_BYTES for message in messages[:-1])  # the last line says it all again


async def test_a_line_that_is_longer_than_a_batch_is_a_message_by_itself(connect: Connect) -> None:
    async with Chat(lambda run: run.say("x" * BATCH_BYTES)) as chat:
        client = await connect(chat, "tricorn.v1.batch")
        client.say("open", conversation="c")
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_until("agent_completed")
    assert all(client.messages)


async def test_many_requests_at_once_from_a_client_that_reads(connect: Connect) -> None:
    async with Chat(echo, ChatSettings(outbox=8)) as chat:
        client = await connect(chat, "tricorn.v1.batch")
        client.send('{"type":"ping"}\n' * 1000)
        for _ in range(1000):
            client.say("ping")
        assert types(await client.hear_all()) == ["pong"] * 2000
        assert client.closed is None


async def test_asking_without_reading_closes_with_4004(connect: Connect) -> None:
    async with Chat(echo, ChatSettings(outbox=8)) as chat:
        client = await connect(chat)
        client.stop_reading()
        client.say("ping")
        await trio.testing.wait_all_tasks_blocked()  # this one is on its way
        for _ in range(8):
            client.say("ping")
        await trio.testing.wait_all_tasks_blocked()
        assert client.closed is None
        client.say("ping")
        await client.ended.wait()
    assert client.closed == (4004, "outbox overflow")


async def test_what_waits_for_a_client_that_does_not_read_is_small_whatever_it_asked(connect: Connect) -> None:
    long = "x" * 1_000_000
    asked = [
        *({"type": "post", "id": long}, {"type": "open", "conversation": long}, {"type": "cancel", "run": long}),
        *({"type": long}, {"type": "\0" * 1000}, {"type": "😀" * 1000, "id": "y" * 128}, {long: long}, [long], long),
    ]
    async with Chat(echo, ChatSettings(outbox=256)) as chat:
        client = await connect(chat)
        client.stop_reading()
        for n in range(250):
            client.say("ping") if n == 0 else client.send(json.dumps(asked[n % len(asked)]))
        await trio.testing.wait_all_tasks_blocked()
        assert client.closed is None
        client.readable.set()
        replies = await client.hear_all()
    assert len(replies) == 250
    assert max(map(len, client.messages)) < 1024


async def test_each_request_of_a_batch_counts(connect: Connect, autojump_clock: trio.testing.MockClock) -> None:
    async with Chat(echo, ChatSettings(messages_per_second=10, outbox=1000)) as chat:
        client = await connect(chat, "tricorn.v1.batch")
        client.send('{"type":"ping"}\n' * 100)
        assert len(await client.hear_all()) == 100
        await trio.sleep(1)
        client.send('{"type":"ping"}\n' * 10)
        assert len(await client.hear_all()) == 10
        client.send('{"type":"ping"}\n' * 2)
        await client.ended.wait()
    assert client.closed == (4003, "more than 10 requests a second")
    assert chat.metrics.limit_hits.values["messages_per_second"] == 1


class SlowLog(MemoryLog):
    """Reading takes so long that much else can happen meanwhile."""

    immediate = False

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry]:
        await trio.testing.wait_all_tasks_blocked()
        return await super().read(conversation, after, limit)


async def test_nothing_overtakes_its_answer(connect: Connect) -> None:
    log = SlowLog()
    for name in "ab":
        await fill(log, 300, name)
    async with Chat(echo, log=log) as chat:
        client = await connect(chat)
        for name in "ab":
            client.say("open", conversation=name)
        for n in range(5):
            client.say("post", id=f"new{n}", conversation="a", text="x")
            client.say("leave", conversation="b")
            client.say("open", conversation="b", after=290)
        heard: list[dict[str, Any]] = []
        while types(heard).count("agent_completed") < 5:
            heard.append(await client.hear())
        heard += await client.hear_all()
    assert seqs(heard, "a") == list(range(1, 321))
    for n in range(5):
        posted = next(i for i, each in enumerate(heard) if each["type"] == "posted" and each["id"] == f"new{n}")
        event = next(i for i, each in enumerate(heard) if each["type"] == "user_message" and each["id"] == f"new{n}")
        assert posted < event
    first = types(heard).index("user_message")
    assert types(heard[:first]).count("opened") >= 1
    assert next(each for each in heard if each.get("conversation") == "b")["type"] == "opened"
    assert seqs(heard, "b")[-10:] == list(range(291, 301))


async def test_agents_are_told_who_asks(connect: Connect) -> None:
    users: list[str] = []

    async def agent(run: Run) -> None:
        users.append(run.user)
        await run.say("x")

    async with Chat(agent) as chat:
        client = await connect(chat)
        client.say("post", id="p", conversation="c", text="x")
        await client.hear_all()
    assert users == ["local"]
