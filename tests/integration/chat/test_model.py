"""The model agent against an endpoint that goes wrong: what people and operators are told, and what is tried again."""

from __future__ import annotations

import json
from math import inf
from typing import Any

import pytest
import trio

from fixtures.fake_model import (
    CUT,
    DONE,
    END,
    HEAD,
    STALL,
    Endpoint,
    Script,
    calls,
    chunked,
    delta,
    endpoint,
    event,
    refused,
    said,
    usage,
)
from fixtures.records import Records
from tricorn.chat import Run, ToolCall, ToolError, Turn
from tricorn.chat.agents import model as model_module
from tricorn.chat.agents.model import Model
from tricorn.chat.agents.sse import EVENT_MAX, Timeouts
from tricorn.chat.protocol import AgentCompleted, AgentMessage, AgentThinking, ToolCompleted, Usage
from tricorn.chat.testing import Result, ask

KEY = "sk-the-secret"
SHORT = Timeouts(connect=5.0, first=1.0, silence=1.0)
PATIENCE = 30  # seconds, for what takes one or two


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "FIRST_PAUSE", 0.01)


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    return Records(capfd)


class Weather:
    """A tool as others define them."""

    name = "weather"
    description = "The weather of a city."

    def __init__(self, parties: int = 0) -> None:
        self.parameters: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}
        self._waiting = parties
        self._all = trio.Event()

    async def call(self, run: Run, arguments: bytes | str) -> str:
        try:
            async with run.tool("weather") as tool:
                try:
                    city = json.loads(arguments)["city"]
                except ValueError as error:
                    raise ToolError(f"these arguments are not JSON: {error}") from None
                self._waiting -= 1
                if self._waiting == 0:
                    self._all.set()
                if self._waiting >= 0:
                    await self._all.wait()
                if city == "Cairo":
                    raise ToolError("no station")
                tool.result = f"rain in {city}"
                return f"rain in {city}"
        except ToolError as error:
            return f"Error: {error}"


async def answer(
    served: Endpoint, text: str = "hello", history: tuple[Turn, ...] = (), cancel_after: float = inf, **options: Any
) -> Result:
    options = {"api_key": KEY, **options}
    with trio.fail_after(PATIENCE):
        return await ask(Model("m-1", base_url=served.url, **options), text, history=history, cancel_after=cancel_after)


def end(result: Result) -> AgentCompleted:
    completed = result.events[-1]
    assert isinstance(completed, AgentCompleted)
    return completed


def thoughts(result: Result) -> list[str]:
    return [event.text for event in result.events if isinstance(event, AgentThinking)]


# What goes well


async def test_an_answer_is_said_with_its_usage() -> None:
    async with endpoint(said("Hel", "lo")) as served:
        result = await answer(served, system="Be kind.", options={"temperature": 0.5})
    assert (result.outcome, result.answer, end(result).usage) == ("success", "Hello", Usage(10, 2))
    assert result.events[0].agent == "m-1"  # type: ignore[union-attr]
    assert served.requests == [
        {
            "model": "m-1",
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}],
        }
    ]
    [head] = served.heads
    assert head.target == b"/v1/chat/completions"
    assert (b"authorization", f"Bearer {KEY}".encode()) in list(head.headers)


async def test_reasoning_is_thought_and_cached_tokens_are_counted() -> None:
    for field in ("reasoning_content", "reasoning"):
        parts = [delta(**{field: "let me "}), delta(**{field: "see"}), delta(content="4"), delta("stop")]
        cached = usage(100, 5, prompt_tokens_details={"cached_tokens": 64})
        async with endpoint([HEAD + chunked(*parts, cached, DONE) + END]) as served:
            result = await answer(served)
        assert ("".join(thoughts(result)), result.answer) == ("let me see", "4")
        assert end(result).usage == Usage(100, 5, 64)


async def test_pieces_that_come_together_are_one_event() -> None:
    parts = [delta(content=f"{index} ") for index in range(100)]
    async with endpoint([HEAD + chunked(*parts, delta("stop"), DONE) + END]) as served:
        result = await answer(served, join=1.0)
    assert sum(isinstance(event, AgentMessage) for event in result.events) <= 3  # as many as reads, at most
    assert result.answer == "".join(f"{index} " for index in range(100))


async def test_what_waits_is_said_in_time_if_nothing_more_comes() -> None:
    parts = chunked(delta(content="one "), delta(content="two "))
    async with endpoint([HEAD + parts, STALL]) as served:
        result = await answer(served, join=0.05, cancel_after=2.0)
    assert (result.outcome, result.answer) == ("cancelled", "one two ")


async def test_the_first_piece_is_said_at_once() -> None:
    async with endpoint([HEAD + chunked(delta(content="one ")), STALL]) as served:
        result = await answer(served, join=PATIENCE, cancel_after=2.0)
    assert (result.outcome, result.answer) == ("cancelled", "one ")


async def test_the_end_of_an_answer_is_not_waited_for() -> None:
    async with endpoint([HEAD + chunked(delta(content="one "), delta("stop"), DONE) + END]) as served:
        result = await answer(served, join=2 * PATIENCE)
    assert (result.outcome, result.answer) == ("success", "one ")


async def test_a_very_long_piece_is_several_events() -> None:
    async with endpoint(said("x" * 300_000)) as served:
        result = await answer(served)
    assert (result.outcome, len(result.answer)) == ("success", 300_000)


async def test_the_model_is_told_the_history() -> None:
    history = (
        Turn("local", "weather?", 0.0, "It rains.", "success", (ToolCall("weather", {"city": "Oslo"}, "rain"),)),
        Turn("local", "and Cairo?", 0.0, "It", "cancelled", (ToolCall("weather", {}, None, "no station"),)),
        Turn("local", "so?", 0.0, "", "failed"),
    )
    async with endpoint(said("Yes.")) as served:
        await answer(served, "again", history, tools=[Weather()])
        await answer(served, "again", history)
        await answer(served, "again", history, history_characters=10)
    told, without_tools, short = (request["messages"] for request in served.requests)
    call = {"id": "call_0_0", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    assert told[:4] == [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0_0", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    assert told[6:] == [
        {"role": "tool", "tool_call_id": "call_1_0", "content": "Error: no station"},
        {"role": "assistant", "content": "It [cancelled]"},
        {"role": "user", "content": "so?"},
        {"role": "assistant", "content": "[failed]"},
        {"role": "user", "content": "again"},
    ]
    assert [message["role"] for message in without_tools] == ["user", "assistant"] * 3 + ["user"]
    assert [message["content"] for message in short] == ["so?", "[failed]", "again"]


# Tools


async def test_tools_are_called_at_once_and_their_results_come_in_order() -> None:
    both = calls(("weather", '{"city": "Oslo"}'), ("weather", '{"city": "Cairo"}'))
    async with endpoint(both, said("It rains in Oslo.")) as served:
        result = await answer(served, tools=[Weather(parties=2)])
    assert (result.outcome, result.answer) == ("success", "It rains in Oslo.")
    assert end(result).usage == Usage(20, 4)
    assert served.connections == 1
    first, second = served.requests
    function = {"name": "weather", "description": Weather.description, "parameters": Weather().parameters}
    assert first["tools"] == [{"type": "function", "function": function}]
    asked, oslo, cairo = second["messages"][1:]
    assert [call["function"]["arguments"] for call in asked["tool_calls"]] == ['{"city": "Oslo"}', '{"city": "Cairo"}']
    assert oslo == {"role": "tool", "tool_call_id": "call-0", "content": "rain in Oslo"}
    assert cairo == {"role": "tool", "tool_call_id": "call-1", "content": "Error: no station"}


async def test_malformed_arguments_are_the_tools_error_and_the_model_is_told() -> None:
    async with endpoint(calls(("weather", '{"city": "Os')), said("Sorry.")) as served:
        result = await answer(served, tools=[Weather()])
    assert (result.outcome, result.answer) == ("success", "Sorry.")
    [completed] = [event for event in result.events if isinstance(event, ToolCompleted)]
    assert completed.error is not None
    assert "not JSON" in completed.error
    asked, told = served.requests[1]["messages"][1:]
    assert "not JSON" in told["content"]
    assert asked["tool_calls"][0]["function"]["arguments"] == "{}", "some servers refuse what is not an object"


async def test_the_model_is_told_that_there_is_no_such_tool() -> None:
    async with endpoint(calls(("rocket", "{}")), said("Sorry.")) as served:
        result = await answer(served, tools=[Weather()])
    assert result.outcome == "success"
    assert served.requests[1]["messages"][-1]["content"] == "Error: there is no tool 'rocket'; there are weather"


async def test_rounds_of_tools_are_bounded(records: Records) -> None:
    async with endpoint(calls(("weather", '{"city": "Oslo"}'))) as served:
        result = await answer(served, tools=[Weather()], max_rounds=3)
    assert len(served.requests) == 3
    assert end(result).error == "the model was asked 3 times, and used tools each time instead of answering"
    assert end(result).usage == Usage(30, 6)


async def test_calls_that_never_end_are_bounded() -> None:
    piece = delta(tool_calls=[{"index": 0, "function": {"name": "weather", "arguments": "x" * 400_000}}])
    async with endpoint([HEAD + chunked(piece, piece, piece), STALL]) as served:
        result = await answer(served, tools=[Weather()])
    assert end(result).error == "the model called tools with far too much text"


# What is tried again

LOST = "the connection to the model was lost"
UNREADABLE = "the model's server sent something unreadable"

FAULTS: dict[str, tuple[Script, str, str]] = {
    "429": (refused(429, "slow down"), "the model's server has too many requests", "HTTP 429: slow down"),
    "500": (refused(500, "oops"), "the model's server fails (500)", "HTTP 500: oops"),
    "503": (refused(503), "the model's server fails (503)", "HTTP 503"),
    "closed before the head": ([CUT], LOST, "broke off the answer"),
    "closed in the head": ([b"HTTP/1.1 200 OK\r\nContent-", CUT], LOST, "broke off the answer"),
    "not HTTP": ([b"SSH-2.0-OpenSSH_9.2\r\n", CUT], LOST, "broke off the answer"),
    "a head that does not end": ([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, STALL], LOST, "broke off the answer"),
    "closed before the first piece": ([HEAD, CUT], LOST, "broke off the answer"),
    "nothing in it": ([HEAD + END], LOST, "the stream ended too early"),
    "no head in time": ([STALL], "the model has stopped answering", "has sent nothing for too long"),
    "no piece in time": ([HEAD, STALL], "the model has stopped answering", "has sent nothing for too long"),
    "not JSON": ([HEAD + chunked(event(b'{"choices": [')), STALL], UNREADABLE, '{"choices": ['),
    "not a chunk": ([HEAD + chunked(event([1, 2])), STALL], UNREADABLE, "[1, 2]"),
    "not UTF-8": ([HEAD + chunked(event(b'{"choices": "\xff"}')), STALL], UNREADABLE, '{"choices": "'),
    "an error in the stream": (
        [HEAD + chunked(event({"error": {"message": "CUDA out of memory"}})), STALL],
        "the model's server failed in mid-answer",
        "CUDA out of memory",
    ),
    "a line without an end": (
        [HEAD + chunked(b"data: " + b"x" * 2 * EVENT_MAX), STALL],
        LOST,
        "more than 1048576 bytes",
    ),
    "an event without an end": (
        [HEAD + chunked((b"data: " + b"x" * 65536 + b"\n") * 32), STALL],
        LOST,
        "more than 1048576 bytes",
    ),
    "an empty answer": (
        [HEAD + chunked(delta(role="assistant"), delta("stop"), DONE) + END],
        "the model gave no answer",
        "stop",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_before_anything_is_said_is_tried_again(fault: str) -> None:
    script, text, _ = FAULTS[fault]
    async with endpoint(script, script, said("Hello")) as served:
        result = await answer(served, timeouts=SHORT)
    assert (result.outcome, result.answer) == ("success", "Hello")
    assert [thought.partition(";")[0] for thought in thoughts(result)] == [text, text]
    assert len(served.requests) == 3


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_that_stays_fails_the_run_and_says_what_happened(fault: str, records: Records) -> None:
    script, text, detail = FAULTS[fault]
    async with endpoint(script) as served:
        result = await answer(served, timeouts=SHORT)
    assert (result.outcome, result.answer, end(result).error) == ("failed", "", text)
    assert len(served.requests) == model_module.ATTEMPTS
    [record] = [each for each in records.read("ERROR") if each.get("error_id") == end(result).error_id]
    assert detail in json.dumps(record, ensure_ascii=False).replace('\\\\\\"', '"').replace('\\"', '"')
    assert KEY not in json.dumps(record)


async def test_thoughts_do_not_keep_it_from_being_tried_again() -> None:
    async with endpoint([HEAD + chunked(delta(reasoning="hm")), CUT], said("Hello")) as served:
        result = await answer(served)
    assert (result.outcome, result.answer) == ("success", "Hello")


async def test_tool_calls_that_are_cut_are_not_made() -> None:
    cut = [HEAD + chunked(delta(tool_calls=[{"index": 0, "id": "1", "function": {"name": "weather"}}])), CUT]
    async with endpoint(cut, said("Hello")) as served:
        result = await answer(served, tools=[Weather()])
    assert (result.outcome, result.answer) == ("success", "Hello")
    assert not [event for event in result.events if isinstance(event, ToolCompleted)]


async def test_a_server_is_asked_again_when_it_wants() -> None:
    async with endpoint(refused(429, Retry_After="1"), said("Hello")) as served:
        result = await answer(served)
    assert result.outcome == "success"
    assert served.times[1] - served.times[0] >= 1
    assert thoughts(result) == ["the model's server has too many requests; asking again in 1.0 s"]


async def test_a_server_that_wants_to_be_left_alone_for_long_is_not_asked_again() -> None:
    async with endpoint(refused(429, Retry_After="3600"), said("Hello")) as served:
        result = await answer(served)
    assert end(result).error == "the model's server has too many requests; try again in 3600 s"
    assert len(served.requests) == 1


async def test_a_server_that_is_not_there_is_tried_again() -> None:
    async with endpoint(said("Hello")) as served:
        url = served.url
    with trio.fail_after(PATIENCE):
        result = await ask(Model("m-1", base_url=url), "hello")
    assert end(result).error == "the model cannot be reached"
    assert len(thoughts(result)) == model_module.ATTEMPTS - 1


async def test_a_connection_that_was_kept_open_and_is_closed_is_made_anew() -> None:
    tools = calls(("weather", '{"city": "Oslo"}'))
    async with endpoint([*tools, CUT], said("Hello")) as served:
        result = await answer(served, tools=[Weather()])
    assert (result.outcome, result.answer) == ("success", "Hello")
    assert served.connections == 2


# What is not tried again


OVERFLOW = "this is too long for the model: shorten it, or begin a new conversation"
REFUSALS: dict[str, tuple[Script, str]] = {
    "OpenAI's context overflow": (refused(400, '{"error": {"code": "context_length_exceeded"}}'), OVERFLOW),
    "llama.cpp's": (refused(400, '{"error": {"type": "exceed_context_size_error"}}'), OVERFLOW),
    "vLLM's": (refused(400, "This model's maximum context length is 4096 tokens"), OVERFLOW),
    "a content filter": (refused(400, '{"code": "content_filter"}'), "the model's content filter does not allow this"),
    "400": (refused(400, "bad"), "the model's server refuses the request (400)"),
    "401": (refused(401, f"no such key: {KEY}"), "the model's server does not accept the API key"),
    "404": (refused(404), "the model's server knows no such model or address"),
    "a redirect": (refused(307, Location="http://127.0.0.1:1/"), "the model's server refuses the request (307)"),
    "a page": (
        [b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>"],
        "the model's server sent something other than a stream",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_a_refusal_fails_the_run(name: str, records: Records) -> None:
    script, text = REFUSALS[name]
    async with endpoint(script, said("Hello")) as served:
        result = await answer(served)
    assert (result.outcome, end(result).error) == ("failed", text)
    assert len(served.requests) == 1
    [record] = [each for each in records.read("ERROR") if each.get("error_id") == end(result).error_id]
    assert KEY not in json.dumps(record)
    if name == "a redirect":
        assert "http://127.0.0.1:1/" in json.dumps(record)


AFTER_A_WORD: dict[str, tuple[Script, str]] = {
    "cut": ([HEAD + chunked(delta(content="Hel"), delta(content="lo")), CUT], LOST),
    "cut in a chunk": ([HEAD + chunked(delta(content="Hello")) + b"100\r\ndata: {", CUT], LOST),
    "stalled": ([HEAD + chunked(delta(content="Hello")), STALL], "the model has stopped answering"),
    "malformed": ([HEAD + chunked(delta(content="Hello"), event(b"{"))], UNREADABLE),
    "too many tokens": (
        said("Hello", finish="length"),
        "the answer is not complete: the model has reached its limit of tokens",
    ),
    "filtered": (said("Hello", finish="content_filter"), "the model's content filter has stopped the answer"),
    "ended without a reason": ([HEAD + chunked(delta(content="Hello"), DONE) + END], LOST),
}


@pytest.mark.parametrize("name", AFTER_A_WORD)
async def test_a_fault_after_something_was_said_fails_the_run(name: str) -> None:
    script, text = AFTER_A_WORD[name]
    async with endpoint(script, said("again")) as served:
        result = await answer(served, timeouts=SHORT)
    assert (result.outcome, result.answer, end(result).error) == ("failed", "Hello", text)
    assert len(served.requests) == 1


# Other ways to end an answer


WHOLE = (delta(content="Hel"), delta(content="lo"), delta("stop"))
SSE = b"HTTP/1.%d 200 OK\r\nContent-Type: text/event-stream\r\n%b\r\n"
ENDINGS: dict[str, Script] = {
    "HTTP/1.0": [SSE % (0, b"") + b"".join(WHOLE) + DONE, CUT],
    "closed instead of chunked": [SSE % (1, b"Connection: close\r\n") + b"".join(WHOLE) + DONE, CUT],
    "with a length": [SSE % (1, b"Content-Length: %d\r\n" % len(b"".join(WHOLE))) + b"".join(WHOLE)],
    "no [DONE]": [HEAD + chunked(*WHOLE) + END],
    "cut after the reason": [HEAD + chunked(*WHOLE), CUT],
    "no empty line at the end": [HEAD + chunked(b"".join(WHOLE)[:-1]) + END],
    "CRLF": [HEAD + chunked(b"".join((*WHOLE, DONE)).replace(b"\n", b"\r\n")) + END],
    "comments and other fields": [HEAD + chunked(b": ping\n\n", b"event: x\nid: 1\n", *WHOLE, DONE) + END],
    "nulls": [
        HEAD + chunked(event({"choices": None, "usage": None}), event({"choices": [{"delta": None}]}), *WHOLE) + END
    ],
    "a byte at a time": [HEAD, *(chunked(bytes([byte])) for byte in b"".join((*WHOLE, DONE))), END],
}


@pytest.mark.parametrize("name", ENDINGS)
async def test_an_answer_may_end_otherwise(name: str) -> None:
    async with endpoint(ENDINGS[name]) as served:
        result = await answer(served, timeouts=SHORT)
    assert (result.outcome, result.answer) == ("success", "Hello")
    assert len(served.requests) == 1


# Stop


@pytest.mark.parametrize("script", [[STALL], [HEAD, STALL], [HEAD + chunked(delta(content="Hello")), STALL]])
async def test_cancelling_closes_the_connection_at_once(script: Script) -> None:
    async with endpoint(script) as served:
        result = await answer(served, cancel_after=0.5)
        assert result.outcome == "cancelled"
        with trio.fail_after(PATIENCE):
            await served.gone.wait()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"base_url": url}, "must be a URL like https://api.example.com/v1")
        for url in (
            "",
            "api.openai.com",
            "ftp://x/",
            "http://",
            "http://u:p@x/",
            "http://x/?y",
            "http://x:99999/",
            "http://x y",
        )
    ]
    + [({"api_key": "a\nb"}, "the API key must be printable ASCII")],
)
def test_what_cannot_be_used_is_refused(arguments: dict[str, str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Model("m-1", **arguments)  # type: ignore[arg-type]
