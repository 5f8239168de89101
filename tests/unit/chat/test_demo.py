from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime
from fractions import Fraction
from math import inf
from typing import TypeVar

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from tricorn.chat import ToolError, testing
from tricorn.chat.agents.arithmetic import MAX_BITS, MAX_CHARACTERS, evaluate, show
from tricorn.chat.agents.demo import HELP, ZONES, characters, demo
from tricorn.chat.protocol import (
    AgentCompleted,
    AgentMessage,
    AgentStarted,
    AgentThinking,
    ToolCompleted,
    ToolExecuting,
)
from tricorn.chat.settings import ChatSettings
from tricorn.chat.testing import AgentEvent, Result

E = TypeVar("E", bound=AgentEvent)


async def ask(message: str) -> Result:
    result = await testing.ask(demo, message, settings=ChatSettings(run_timeout=inf))
    [completed] = of(AgentCompleted, result)
    assert (completed.outcome, completed.text) == ("success", result.answer)
    return result


def of(kind: type[E], result: Result) -> list[E]:
    return [event for event in result.events if isinstance(event, kind)]


def tool_of(result: Result) -> ToolCompleted:
    [completed] = of(ToolCompleted, result)
    return completed


def steps(result: Result) -> list[type[AgentEvent]]:
    return list(dict.fromkeys(map(type, result.events)))


# Arithmetic


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ("12*(7+5)^2", "12*(7+5)^2 = 1728"),
        ("what is 3/4 + 2", "3/4 + 2 = 2.75"),
        ("What's 20% of 150?", "20% of 150 = 30"),
        ("how much is 6 × 7 ÷ 2?", "6 × 7 ÷ 2 = 21"),
        ("calculate: 2**10", "2**10 = 1024"),
        ("please compute -2^2", "-2^2 = -4"),
        ("0.1 + 0.2", "0.1 + 0.2 = 0.3"),
        ("1/3", "1/3 ≈ 0.333333333333333"),
        ("2^-2", "2^-2 = 0.25"),
        ("2^3^2", "2^3^2 = 512"),
        ("10-4-3", "10-4-3 = 3"),
        ("7 % 3", "7 % 3 = 1"),
        ("50%", "50% = 0.5"),
        ("10% + 5", "10% + 5 = 5.1"),
        ("sqrt(2.25)", "sqrt(2.25) = 1.5"),
        ("what is the square root of 144?", "square root of 144 = 12"),
        ("two plus 2", HELP),
        ("3 squared plus four", HELP),
        ("5 squared plus 3", "5 squared plus 3 = 28"),
        ("1,000,000 / 8", "1,000,000 / 8 = 125000"),
        ("3+4=", "3+4 = 7"),
        (".5*2.", ".5*2 = 1"),
        ("1^999999999", "1^999999999 = 1"),
        ("2^200", f"2^200 = {2**200}"),
        ("sqrt(2)", "sqrt(2) ≈ 1.41421356237310"),
        ("1/8^20", "1/8^20 ≈ 8.67361737988404E-19"),
    ],
)
async def test_it_calculates(message: str, answer: str) -> None:
    result = await ask(message)
    assert result.answer == answer


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("9^9^9", "too large"),
        ("9^999999999999999999999", "too large"),
        ("2^4000*2^4000", "too large"),
        ("0.5^9999999", "too large"),
        ("1.5^99999.5", "too large"),
        ("1/0", "divided by zero"),
        ("5 % 0", "divided by zero"),
        ("0^-1", "divided by zero"),
        ("0^-0.5", "divided by zero"),
        ("sqrt(-1)", "negative"),
        ("(1+2", "parenthesis"),
        ("1+", "ends too early"),
        ("sqrt", "ends too early"),
        ("()", "number in place of “)”"),
        ("1 2", "operator in place of “2”"),
        ("2)", "operator in place of “)”"),
        ("foo", "number in place of “f”"),
        ("__import__('os')", "number in place of “_”"),
        ("1+" * MAX_CHARACTERS, "characters"),
    ],
)
async def test_it_says_why_it_cannot_calculate(expression: str, error: str) -> None:
    result = await ask(f"calculate {expression}")
    assert tool_of(result).tool == "calculate"
    assert error in (tool_of(result).error or "")
    assert tool_of(result).error in result.answer


@pytest.mark.parametrize("deep", ["(", "-", "sqrt", "-(", "2^", "2^-", "((2)+"])
def test_nesting_is_bounded_by_length(deep: str) -> None:
    with pytest.raises(ToolError):
        evaluate(deep * (MAX_CHARACTERS // len(deep)))


NUMBERS = st.integers(0, 99).map(str) | st.decimals(0, 99, places=2, allow_nan=False, allow_infinity=False).map(str)


def combine(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(parts, st.sampled_from([" + ", "-", "*", " / "]), parts).map("".join),
        st.tuples(parts, st.sampled_from(["%(", " % ("]), parts, st.just(")")).map("".join),
        st.tuples(st.just("("), parts, st.just(")")).map("".join),
        st.tuples(st.just("-"), parts).map("".join),
        st.tuples(st.just("("), parts, st.just(")^"), st.sampled_from(["0", "1", "2", "3", "-1", "-2"])).map("".join),
    )


def by_python(expression: str) -> Fraction:
    source = re.sub(r"\d+(?:\.\d+)?", lambda number: f"Fraction('{number[0]}')", expression).replace("^", "**")
    return Fraction(eval(source, {"Fraction": Fraction}))


@given(st.recursive(NUMBERS, combine, max_leaves=8).filter(lambda text: len(text) <= MAX_CHARACTERS))
def test_arithmetic_is_that_of_python(expression: str) -> None:
    try:
        expected = by_python(expression)
    except ZeroDivisionError:
        with pytest.raises(ToolError, match="zero"):
            evaluate(expression)
    else:
        assert evaluate(expression) == expected


@given(st.fractions())
def test_what_is_shown_is_exact_or_says_so(value: Fraction) -> None:
    sign, digits = show(value)
    if sign == "=":
        assert Fraction(digits) == value
    else:
        assert sign == "≈"
        assert abs(Fraction(digits) - value) <= abs(value) * Fraction(1, 10**14)


SYMBOLS = [
    "(",
    ")",
    "+",
    "-",
    "*",
    "/",
    "%",
    "^",
    "sqrt",
    ".",
    ",",
    " ",
    "0",
    "7",
    "99",
    "1.5",
    "of",
    "squared",
    "ſ",
    "²",
    "٣",
    "=",
]


@given(st.lists(st.sampled_from(SYMBOLS), max_size=60).map("".join))
@example("9^9^9^9")
@example("(-8)^(1/3)")
def test_any_text_has_a_bounded_value_or_a_human_error(expression: str) -> None:
    with suppress(ToolError):
        value = evaluate(expression)
        assert max(value.numerator.bit_length(), value.denominator.bit_length()) <= 2 * MAX_BITS
        show(value)


# The time


@pytest.mark.parametrize(
    ("message", "zone"),
    [
        ("time in Tokyo", "Asia/Tokyo"),
        ("what time is it in Europe/Berlin", "Europe/Berlin"),
        ("What time is it in berlin, Germany?", "Europe/Berlin"),
        ("Could you tell me the current time in New York right now?", "America/New_York"),
        ("time in america/new_york please", "America/New_York"),
        ("what's the time in São Paulo?", "America/Sao_Paulo"),
        ("time at UTC", "UTC"),
        ("UTC", "UTC"),
        ("gmt time", "GMT"),
        ("what time is it?", "UTC"),
    ],
)
async def test_it_tells_the_time(message: str, zone: str) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    result = await ask(message)
    assert tool_of(result).tool == "time"
    assert tool_of(result).result["zone"] == zone
    told = datetime.fromisoformat(tool_of(result).result["time"])
    assert before <= told <= datetime.now(UTC)
    assert told.utcoffset() == told.astimezone(ZONES[zone.lower().replace("_", " ")]).utcoffset()
    assert f"{told:%H:%M}" in result.answer


@pytest.mark.parametrize("place", ["Atlantis", "GMT+5", "../etc/passwd", "."])
async def test_it_says_how_to_ask_for_a_time(place: str) -> None:
    result = await ask(f"time in {place}")
    assert place in tool_of(result).error
    assert "Europe/Berlin" in tool_of(result).error
    assert tool_of(result).error in result.answer


# Texts


@pytest.mark.parametrize(
    ("message", "number", "answer"),
    [
        ("count the words in the quick brown fox", 4, "4 words"),
        ("How many words are there in: one - two!", 2, "2 words"),
        ("count the words in what time is it in Tokyo", 6, "6 words"),
        ("count the words in the text “slow”", 1, "1 word."),
        ("how many letters in banana?", 6, "6 letters"),
        ("how many letters in cafe\u0301", 4, "4 letters"),
        ("How many r's are in strawberry?", 3, "3 “r”"),
        ("count the a in Banana", 3, "3 “a”"),
        ('how many characters are in "a b"?', 3, "3 characters"),
        ("count the characters in 👨\u200d👩\u200d👧👍🏽", 2, "2 characters"),
        ("count the lines in a\nb\nc", 3, "3 lines"),
    ],
)
async def test_it_counts(message: str, number: int, answer: str) -> None:
    result = await ask(message)
    assert tool_of(result).tool == "count"
    assert tool_of(result).result == number
    assert answer in result.answer


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ("reverse hello", "olleh"),
        ("Please reverse: slow 5", "5 wols"),
        ("reverse the word 'abc'", "cba"),
        ("reverse the end", "dne eht"),
        ("reverse e\u0301a", "ae\u0301"),
        ("reverse a👨\u200d👩\u200d👧b", "b👨\u200d👩\u200d👧a"),
        ("reverse a\nb", "b\na"),
    ],
)
async def test_it_reverses(message: str, answer: str) -> None:
    result = await ask(message)
    assert result.answer == tool_of(result).result == answer


@given(st.text())
def test_no_character_is_lost(text: str) -> None:
    assert "".join(characters(text)) == text


async def test_it_describes_a_text() -> None:
    result = await ask("statistics of To be, or not to be: that\nis the question.")
    expected = {"words": 10, "letters": 30, "characters": 42, "lines": 2, "longest word": "question"}
    assert tool_of(result).result == expected
    assert "10 words, 30 letters, 42 characters, 2 lines" in result.answer
    assert "“question”" in result.answer


async def test_a_text_without_words_has_no_statistics() -> None:
    result = await ask("statistics of ...")
    assert tool_of(result).error in result.answer


# Something slow


@pytest.mark.parametrize(
    ("message", "seconds"), [("slow 10", 10), ("slow for 2.5 seconds", 2.5), ("slow 600s", 600), ("slow 0", 0)]
)
async def test_slow_takes_its_time(message: str, seconds: float, autojump_clock: trio.testing.MockClock) -> None:
    started = trio.current_time()
    result = await ask(message)
    assert trio.current_time() - started == pytest.approx(seconds)
    [executing] = of(ToolExecuting, result)
    assert executing.arguments == {"seconds": seconds}
    assert tool_of(result).result == seconds
    assert f"{tool_of(result).result} s." in result.answer


async def test_slow_can_be_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    result = await testing.ask(demo, "slow 10", cancel_after=3)
    assert trio.current_time() == pytest.approx(3)
    assert result.outcome == "cancelled"
    assert tool_of(result).error == "cancelled"
    assert of(AgentMessage, result) == []


async def test_slow_has_an_upper_end(autojump_clock: trio.testing.MockClock) -> None:
    result = await ask("slow 601")
    assert trio.current_time() == 0
    assert "600 s at most" in tool_of(result).error
    assert tool_of(result).error in result.answer


# Whatever it is asked


@pytest.mark.parametrize(
    "message", ["", "hello", "tell me a joke", "what is the meaning of 42", "slow", "count", "calculate", "."]
)
async def test_it_says_what_it_can_do(message: str) -> None:
    result = await ask(message)
    assert result.answer == HELP
    assert steps(result) == [AgentStarted, AgentMessage, AgentCompleted]


@pytest.mark.parametrize(
    "message",
    [
        "1+1",
        "1/0",
        "time in Tokyo",
        "time in Atlantis",
        "count the words in a",
        "reverse a",
        "statistics of a",
        "slow 0",
    ],
)
async def test_it_thinks_then_works_then_answers(message: str) -> None:
    result = await ask(message)
    work = [AgentThinking, ToolExecuting, ToolCompleted, AgentMessage]
    assert steps(result) == [AgentStarted, *work, AgentCompleted]


@pytest.mark.parametrize("message", ["(1+2)*-3", "what time is it", "count the words in a b", "1/0", ""])
async def test_an_answer_streams_in_pieces(message: str) -> None:
    result = await ask(message)
    assert len(of(AgentMessage, result)) > 1


REQUESTS = [
    "calculate ",
    "what is ",
    "time in ",
    "count the words in ",
    "how many letters in ",
    "reverse ",
    "statistics of ",
    "slow 0 ",
]


@given(st.sampled_from(["", *REQUESTS]), st.text())
@example("calculate ", "ſqrt(4)")
@example("calculate ", "²")
@example("reverse ", '"')
@example("time in ", "\0")
async def test_it_answers_whatever_is_asked(request_: str, text: str) -> None:
    result = await ask(request_ + text)
    assert result.answer


@pytest.mark.parametrize(
    "text", ["a", " ", "time ", "1+", "(", ".", "now ", "please ", "the ", "\u0301", "how many words in "]
)
@pytest.mark.parametrize("request_", ["", *REQUESTS])
async def test_a_long_message_does_not_hold_the_loop(request_: str, text: str) -> None:
    """A pattern that backtracks takes minutes for one of these: that would be noticed without a clock."""
    result = await ask(request_ + text * (32_000 // len(text)) + "x")
    assert result.answer
