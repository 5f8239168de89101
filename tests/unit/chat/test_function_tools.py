"""`@tool`: what the model is told of a function, what it may send, what it gets back, and what people see of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date
from enum import Enum
from functools import partial
from typing import Annotated, Any, Literal

import pytest
import trio
from msgspec import Meta
from trio.testing import MockClock, wait_all_tasks_blocked

from fixtures.chats import errors, until
from fixtures.records import Records
from tricorn.chat import FunctionTool, Run, Tool, ToolError, tool
from tricorn.chat.function_tools import THREADS
from tricorn.chat.model_tools import by_name
from tricorn.chat.protocol import ToolCompleted, ToolExecuting
from tricorn.chat.settings import ChatSettings
from tricorn.chat.testing import Result, ask


@dataclass
class Place:
    city: str
    country: str | None = None


class Unit(Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


@tool
async def forecast(
    run: Run, place: Place, day: date, unit: Unit = Unit.CELSIUS, hours: Annotated[int, Meta(ge=1, le=48)] = 24
) -> dict[str, Any]:
    """Return the weather at a place.

    Asks the weather service.

    Args:
        place: where,
            by name
        day (date): of the forecast
        hours: how many

    Returns: the forecast.
    """
    return {"who": run.user, "city": place.city, "day": day, "unit": unit, "hours": hours}


async def calling(used: Tool, *arguments: bytes | str) -> tuple[list[str], Result]:
    """What the model gets for each of these arguments, and the run."""
    texts: list[str] = []

    async def agent(run: Run) -> None:
        for each in arguments:
            texts.append(await used.call(run, each))

    return texts, await ask(agent, "go")


def seen(result: Result) -> list[Any]:
    """What people see of calls."""
    return [event for event in result.events if isinstance(event, ToolExecuting | ToolCompleted)]


@pytest.fixture
def records(capfd: pytest.CaptureFixture[str]) -> Records:
    return Records(capfd)


# What the model is told


def test_the_schema_comes_from_types_defaults_and_docstring() -> None:
    assert isinstance(forecast, FunctionTool)
    assert forecast.name == "forecast"
    assert (
        forecast.description == "Return the weather at a place.\n\nAsks the weather service.\n\nReturns: the forecast."
    )
    assert forecast.parameters == {
        "type": "object",
        "properties": {
            "place": {"$ref": "#/$defs/Place", "description": "where, by name"},
            "day": {"type": "string", "format": "date", "description": "of the forecast"},
            "unit": {"$ref": "#/$defs/Unit", "default": "C"},
            "hours": {"type": "integer", "minimum": 1, "maximum": 48, "default": 24, "description": "how many"},
        },
        "required": ["place", "day"],
        "additionalProperties": False,
        "$defs": {
            "Place": {
                "title": "Place",
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "country": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
                },
                "required": ["city"],
            },
            "Unit": {"title": "Unit", "enum": ["C", "F"]},
        },
    }


def test_a_tool_without_parameters_and_docstring() -> None:
    @tool(name="ping-2", seconds=5, characters=10)
    def ping() -> None:
        pass

    assert (ping.name, ping.description, ping.seconds, ping.characters) == ("ping-2", "", 5, 10)
    assert ping.parameters == {"type": "object", "properties": {}, "required": [], "additionalProperties": False}


async def test_a_tool_is_still_the_function() -> None:
    @tool
    def double(number: int) -> int:
        """Return twice the number."""
        return 2 * number

    assert double(4) == double.function(4) == 8
    assert (double.__name__, double.__doc__) == ("double", "Return twice the number.")


class Shop:
    def __init__(self, prices: dict[str, int]) -> None:
        self._prices = prices

    async def price(self, of: str, times: int = 1) -> int:
        """Return a price."""
        return self._prices[of] * times


async def test_a_bound_method_and_a_partial_function_are_tools() -> None:
    shop = Shop({"tea": 3})
    texts, _ = await calling(tool(shop.price), '{"of":"tea"}')
    assert texts == ["3"]
    twice = tool(name="twice")(partial(shop.price, times=2))
    texts, _ = await calling(twice, '{"of":"tea"}')
    assert (texts, twice.parameters["properties"]["times"]["default"]) == (["6"], 2)


# Definitions that cannot work


def untyped(city) -> None:  # type: ignore[no-untyped-def]
    pass


def many(*cities: str) -> None:
    pass


def options(**options: str) -> None:
    pass


def positional(city: str, /) -> None:
    pass


def untold(what: threading.Thread) -> None:
    pass


def ambiguous(what: list[int] | set[int]) -> None:
    pass


def unknown(what: Nowhere) -> None:  # type: ignore[name-defined] # noqa: F821
    pass


async def stream(city: str) -> AsyncIterator[str]:
    yield city


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (untyped, "the parameter 'city' has no annotation; write its type, as in city: str"),
        (many, "it takes *cities: 'str'; a model needs each parameter by name"),
        (options, "it takes **options: 'str'; a model needs each parameter by name"),
        (positional, "the parameter 'city' is positional-only; a model passes arguments by name"),
        (untold, "Generating JSON schema for custom types requires either: "),
        (ambiguous, "Type unions may not contain more than one array-like"),
        (unknown, "name 'Nowhere' is not defined"),
        (stream, "it is a generator; return the whole result"),
    ],
)
def test_a_bad_definition_is_one_line_that_says_what_and_where(function: Callable[..., object], problem: str) -> None:
    with pytest.raises(TypeError) as raised:
        tool(function)
    line = function.__code__.co_firstlineno
    assert str(raised.value).startswith(f"tool '{function.__name__}' (test_function_tools.py, line {line}): {problem}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("chosen", "problem"),
    [
        ({"name": "fore cast"}, "the name of a tool is 1 to 64 of A-Z, a-z, 0-9, _ and -, not 'fore cast'"),
        ({"name": "x" * 65}, "the name of a tool is 1 to 64 of"),
        ({"seconds": 0}, "seconds must be more than 0, not 0"),
        ({"characters": 0}, "characters must be more than 0, not 0"),
    ],
)
def test_bad_options_are_refused(chosen: dict[str, Any], problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        tool(**chosen)(positional_or_not)


def positional_or_not(city: str) -> str:
    return city


def test_two_tools_of_the_same_name_are_refused() -> None:
    one, other = tool(positional_or_not), tool(name="forecast")(positional_or_not)
    assert by_name([one, other]) == {"positional_or_not": one, "forecast": other}
    with pytest.raises(ValueError, match="two tools have the name 'forecast'; give one of them another"):
        by_name([forecast, other])


# What the model sends


async def test_arguments_are_converted_and_shown_as_they_came() -> None:
    texts, result = await calling(forecast, '{"place": {"city": "Oslo"}, "day": "2026-05-01", "unit": "F"}')
    answer = '{"who":"local","city":"Oslo","day":"2026-05-01","unit":"F","hours":24}'
    assert texts == [answer]
    executing, completed = seen(result)
    assert (executing.tool, executing.call) == ("forecast", completed.call)
    assert executing.arguments == {"place": {"city": "Oslo"}, "day": "2026-05-01", "unit": "F"}
    assert (completed.result["city"], completed.error) == ("Oslo", None)


GOOD = '{"place":{"city":"Oslo"},"day":"2026-05-01"'


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (GOOD + ',"hours":"3"}', "wrong arguments: Expected `int`, got `str` - at `$.hours`"),
        (GOOD + ',"hours":49}', "wrong arguments: Expected `int` <= 48 - at `$.hours`"),
        (GOOD + ',"unit":"K"}', "wrong arguments: Invalid enum value 'K' - at `$.unit`"),
        (GOOD + ',"wind":1}', "wrong arguments: Object contains unknown field `wind`"),
        (GOOD + ',"run":1}', "wrong arguments: Object contains unknown field `run`"),
        ("{}", "wrong arguments: Object missing required field `place`"),
        ("", "wrong arguments: Object missing required field `place`"),
        ("[1]", "the arguments must be a JSON object: Expected `object`, got `array`"),
        (GOOD, "the arguments must be a JSON object: Input data was truncated"),
        (b"\xff", "the arguments must be a JSON object: JSON is malformed: invalid character (byte 0)"),
        ("\ud800", "the arguments must be a JSON object: JSON is malformed: invalid character (byte 0)"),
        ('{"a":NaN}', "the arguments must be a JSON object: JSON is malformed: invalid character (byte 5)"),
        ('{"a":' + "[" * 100_000, "the arguments must be a JSON object: "),
    ],
)
async def test_wrong_arguments_are_told_to_model_and_people_and_the_function_does_not_run(
    arguments: bytes | str, problem: str, records: Records
) -> None:
    [text], result = await calling(forecast, arguments)
    assert text.startswith(f"Error: {problem}")
    executing, completed = seen(result)
    assert completed.error == text.removeprefix("Error: ")
    assert result.outcome == "success"
    if problem.startswith("the arguments"):
        assert list(executing.arguments) == ["malformed"]
        assert len(executing.arguments["malformed"]) < 600
    assert records.read("ERROR") == []


async def test_an_argument_that_is_left_out_has_the_default_of_the_function() -> None:
    marker: Any = object()

    @tool
    async def which(a: Any = marker, b: list[int] = [1]) -> list[bool]:  # noqa: B006
        return [a is marker, b == [1]]

    texts, _ = await calling(which, "{}", '{"a": null, "b": []}')
    assert texts == ["[true,true]", "[false,false]"]
    assert which.parameters["properties"] == {
        "a": {},
        "b": {"type": "array", "items": {"type": "integer"}, "default": [1]},
    }


# What it gets


@pytest.mark.parametrize(
    ("value", "text", "shown"),
    [
        ("rain", "rain", "rain"),
        (None, "null", None),
        ([1.5, float("nan")], '[1.5,"NaN"]', [1.5, "NaN"]),
        (Place("Oslo"), '{"city":"Oslo","country":null}', {"city": "Oslo", "country": None}),
    ],
)
async def test_the_result_is_json_or_a_text_as_it_is(value: object, text: str, shown: object) -> None:
    @tool
    async def get() -> object:
        return value

    texts, result = await calling(get, "{}")
    assert texts == [text]
    assert seen(result)[1].result == shown


async def test_a_long_result_is_cut_for_the_model_and_for_the_event_each_at_its_own_length() -> None:
    @tool(characters=100)
    async def long(characters: int) -> str:
        return "x" * characters

    settings = ChatSettings(event_bytes=4096)
    texts: list[str] = []

    async def agent(run: Run) -> None:
        texts.append(await long.call(run, '{"characters":1000}'))
        texts.append(await long.call(run, '{"characters":100000}'))

    result = await ask(agent, "go", settings=settings)
    assert result.outcome == "success"
    assert texts == ["x" * 100 + f"… (cut: {count} characters in all)" for count in (1000, 100_000)]
    assert seen(result)[1].result == "x" * 1000
    assert seen(result)[3].result.strip("x") == "… (cut: 100000 characters in all)"
    assert 1000 < len(seen(result)[3].result) < 2048


async def test_arguments_longer_than_an_event_are_shown_cut_and_the_tool_runs() -> None:
    @tool
    async def length(text: str) -> int:
        return len(text)

    async def agent(run: Run) -> None:
        await run.say(await length.call(run, f'{{"text":"{"x" * 10_000}"}}'))

    result = await ask(agent, "go", settings=ChatSettings(event_bytes=4096))
    assert result.answer == "10000"
    assert seen(result)[0].arguments["cut"].endswith("… (cut: 10011 characters in all)")


# What fails


@tool
async def failing(how: Literal["told", "bug", "group", "both", "exit", "asyncio", "no JSON", "long"]) -> object:
    if how == "told":
        raise ToolError("no weather station in Atlantis")
    if how == "bug":
        raise LookupError("secret")
    if how == "group":
        async with trio.open_nursery() as nursery:
            nursery.start_soon(failing.function, "told")
            nursery.start_soon(failing.function, "told")
    if how == "both":
        async with trio.open_nursery() as nursery:
            nursery.start_soon(failing.function, "told")
            nursery.start_soon(failing.function, "bug")
    if how == "exit":
        raise SystemExit(3)
    if how == "asyncio":
        raise asyncio.CancelledError
    if how == "long":
        raise ToolError("x" * 10_000)
    return object()


async def test_a_tool_error_is_told_to_model_and_people_and_not_reported(records: Records) -> None:
    texts, result = await calling(failing, '{"how":"told"}', '{"how":"long"}')
    assert texts == ["Error: no weather station in Atlantis", "Error: " + "x" * 10_000]
    assert seen(result)[1].error == "no weather station in Atlantis"
    assert seen(result)[3].error == "x" * 500 + "…"
    assert (result.outcome, records.read("ERROR")) == ("success", [])


async def test_tool_errors_of_several_tasks_are_told_together(records: Records) -> None:
    [text], result = await calling(failing, '{"how":"group"}')
    assert text == "Error: " + "; ".join(["no weather station in Atlantis"] * 2)
    assert (result.outcome, records.read("ERROR")) == ("success", [])


@pytest.mark.parametrize(
    ("how", "headline"),
    [
        ("bug", "LookupError: secret"),
        ("both", "secret"),
        ("exit", "SystemExit: 3"),
        ("asyncio", "CancelledError"),
        ("no JSON", "TypeError: an object of type object cannot be encoded"),
    ],
)
async def test_any_other_error_is_reported_and_its_id_told(how: str, headline: str, records: Records) -> None:
    [text], result = await calling(failing, f'{{"how":"{how}"}}')
    [record] = records.read("ERROR")
    assert text == f"Error: the tool failed (error id {record['error_id']})"
    assert seen(result)[1].error == text.removeprefix("Error: ")
    assert headline in record["stack_trace"]
    assert (record["conversation"], record["run"], record["tool"]) == ("test", result.events[0].run, "failing")
    assert record["context"] == {"user": "local"}
    assert result.outcome == "success"


async def test_a_keyboard_interrupt_goes_through() -> None:
    @tool
    async def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.RaisesGroup(KeyboardInterrupt, flatten_subgroups=True):
        await calling(interrupted, "{}")


async def test_a_tool_after_the_end_of_the_run_is_refused() -> None:
    left: list[Run] = []

    async def agent(run: Run) -> None:
        left.append(run)

    await ask(agent, "go")
    with pytest.raises(RuntimeError, match="the run is over"):
        await forecast.call(left[0], GOOD + "}")


# Time


@tool(seconds=30)
async def wait(seconds: float) -> str:
    await trio.sleep(seconds)
    return f"waited {seconds:g} s"


async def test_a_tool_that_takes_too_long_is_cancelled_and_the_run_goes_on(
    autojump_clock: MockClock, records: Records
) -> None:
    texts, result = await calling(wait, '{"seconds":31}', '{"seconds":1}')
    assert texts == ["Error: timed out after 30 s", "waited 1 s"]
    assert seen(result)[1].error == "timed out after 30 s"
    assert seen(result)[1].seconds == pytest.approx(30)
    assert (result.outcome, trio.current_time(), records.read("ERROR")) == ("success", 31, [])


async def test_an_error_that_a_timeout_would_hide_is_reported(autojump_clock: MockClock, records: Records) -> None:
    @tool(seconds=1)
    async def clumsy() -> None:
        try:
            raise LookupError("the first error")
        finally:
            await trio.sleep_forever()

    texts, _ = await calling(clumsy, "{}")
    assert texts == ["Error: timed out after 1 s"]
    [record] = records.read("ERROR")
    assert record["message"] == "LookupError: the first error"


async def test_a_run_that_is_cancelled_cancels_its_tool(autojump_clock: MockClock, records: Records) -> None:
    async def agent(run: Run) -> None:
        await wait.call(run, '{"seconds":9}')
        raise AssertionError

    result = await ask(agent, "go", cancel_after=2)
    assert (result.outcome, seen(result)[1].error) == ("cancelled", "cancelled")
    assert (trio.current_time(), records.read("ERROR")) == (2, [])


async def test_what_a_tool_raises_while_its_run_is_cancelled_is_reported(
    autojump_clock: MockClock, records: Records
) -> None:
    @tool
    async def clumsy() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise LookupError("in the clean-up")

    async def agent(run: Run) -> None:
        await clumsy.call(run, "{}")

    result = await ask(agent, "go", cancel_after=2)
    assert result.outcome == "cancelled"
    assert [record["message"] for record in records.read("ERROR")] == ["LookupError: in the clean-up"]


async def test_several_calls_at_once_have_their_own_deadlines_and_events(autojump_clock: MockClock) -> None:
    texts: dict[int, str] = {}

    async def call(run: Run, seconds: int) -> None:
        texts[seconds] = await wait.call(run, f'{{"seconds":{seconds}}}')

    async def agent(run: Run) -> None:
        async with trio.open_nursery() as nursery:
            for seconds in (40, 20, 5, 10):
                nursery.start_soon(call, run, seconds)

    result = await ask(agent, "go")
    assert trio.current_time() == 30
    failed = "Error: timed out after 30 s"
    assert texts == {40: failed, 20: "waited 20 s", 5: "waited 5 s", 10: "waited 10 s"}
    started = {event.call: event.arguments["seconds"] for event in seen(result) if isinstance(event, ToolExecuting)}
    ended = {event.call: event for event in seen(result) if isinstance(event, ToolCompleted)}
    assert len(started) == len(ended) == 4
    for call_id, seconds in started.items():
        assert ended[call_id].result == (None if seconds == 40 else f"waited {seconds} s")
        assert ended[call_id].seconds == pytest.approx(min(seconds, 30))


# The run, and threads


async def test_a_tool_can_use_its_run() -> None:
    @tool
    async def look(run: Run, city: str, again: Run) -> str:
        await run.think(f"looking up {city}")
        await again.say("found ")
        return run.message

    texts, result = await calling(look, '{"city":"Oslo"}')
    assert (texts, result.answer) == (["go"], "found ")
    assert list(look.parameters["properties"]) == ["city"]


variable: ContextVar[str] = ContextVar("variable", default="unset")


async def test_a_function_that_is_not_async_runs_in_a_thread_with_the_context_of_the_agent() -> None:
    @tool
    def where(run: Run) -> list[object]:
        trio.from_thread.run(run.say, "from a thread")
        trio.from_thread.check_cancelled()
        return [threading.current_thread() is threading.main_thread(), variable.get()]

    texts: list[str] = []

    async def agent(run: Run) -> None:
        variable.set("set")
        texts.append(await where.call(run, "{}"))

    result = await ask(agent, "go")
    assert (texts, result.answer) == (['[false,"set"]'], "from a thread")


async def cancel(a_tool: FunctionTool[..., Any], started: threading.Event, run: Run) -> None:
    """Call a tool, and cancel it as soon as its function has started."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a_tool.call, run, "{}")
        await trio.to_thread.run_sync(started.wait)
        nursery.cancel_scope.cancel()


async def test_a_thread_is_abandoned_when_the_run_ends_and_what_it_raises_then_is_reported(records: Records) -> None:
    started, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    @tool
    def block() -> None:
        started.set()
        try:
            go_on.wait()
            raise LookupError("too late")
        finally:
            ended.set()

    result = await ask(partial(cancel, block, started), "go")
    assert (result.outcome, seen(result)[1].error) == ("success", "cancelled")
    assert not ended.is_set()
    go_on.set()
    await trio.to_thread.run_sync(ended.wait)
    found = await errors(records)
    assert [(each["message"], each["tool"]) for each in found] == [("LookupError: too late", "block")]


async def test_a_thread_that_checks_ends_when_the_run_ends_without_a_report(records: Records) -> None:
    started, ended = threading.Event(), threading.Event()

    @tool
    def patient() -> None:
        started.set()
        try:
            while True:
                trio.from_thread.check_cancelled()
        finally:
            ended.set()

    await ask(partial(cancel, patient, started), "go")
    await trio.to_thread.run_sync(ended.wait)
    assert records.read("ERROR") == []


async def test_threads_are_bounded() -> None:
    go_on = threading.Event()
    at_work: list[int] = []

    @tool
    def block(number: int) -> None:
        at_work.append(number)
        go_on.wait()

    async def agent(run: Run) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(THREADS + 5):
                nursery.start_soon(block.call, run, f'{{"number":{number}}}')
            await until(lambda: len(at_work) >= THREADS)
            await wait_all_tasks_blocked(0.05)
            assert len(at_work) == THREADS
            go_on.set()

    result = await ask(agent, "go")
    assert (result.outcome, len(at_work)) == ("success", THREADS + 5)


# Approval


@tool(approve="Send the mail?", seconds=5)
async def send_mail(to: str) -> str:
    """Send a mail."""
    return f"sent to {to}"


async def mailer(run: Run) -> None:
    await run.say(await send_mail.call(run, '{"to": "ann"}'))


async def test_a_tool_that_needs_approval_runs_once_people_said_yes(autojump_clock: MockClock) -> None:
    result = await ask(mailer, "x", answers=["yes"])
    assert result.answer == "sent to ann"
    assert [event.__struct_config__.tag for event in result.events][1:5] == [
        "tool_executing",  # with its arguments, so that people see what they approve
        "agent_asking",
        "agent_asked",
        "tool_completed",
    ]


@pytest.mark.parametrize(
    ("answers", "told"), [(["no"], "the user has refused this call"), ([], "nobody approved this call in time")]
)
async def test_a_tool_that_nobody_approves_does_not_run(
    answers: list[str], told: str, autojump_clock: MockClock
) -> None:
    result = await ask(mailer, "x", answers=answers)
    assert result.answer == f"Error: {told}"
    assert result.outcome == "success"


async def test_a_tool_may_ask_for_longer_than_it_may_take(autojump_clock: MockClock) -> None:
    @tool(seconds=5)
    async def curious(run: Run) -> str:
        """Ask."""
        return await run.ask("Who?", seconds=100)

    async def agent(run: Run) -> None:
        await run.say(await curious.call(run, "{}"))

    assert (await ask(agent, "x", answers=["ann"])).answer == "ann"
    assert (await ask(agent, "x")).answer == "Error: nobody answered within 100 s: Who?"
    assert trio.current_time() == 100
