"""The demo agent: arithmetic, the time elsewhere, facts about a text, and something slow. Made to be copied.

An agent is one async function of a `Run`. It tells what it is about (`run.think`), does its work in tools (`run.tool`)
and streams its answer (`run.say`); the rest is ordinary Python. Files are read at import, not in a run.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Awaitable, Callable
from datetime import datetime
from itertools import pairwise
from zoneinfo import ZoneInfo, available_timezones

import trio

from tricorn.chat import Run, ToolError
from tricorn.chat.agents.arithmetic import EXPRESSION, evaluate, show

HELP = """\
I am a small demo agent. Ask me
- to calculate: 12*(7+5)^2, or: what is 20% of 150
- for the time somewhere: what time is it in Tokyo
- to look at a text: count the words in …, how many letters in …, statistics of …
- to turn one around: reverse …
- to take my time: slow 10 (you can cancel it)"""

MAX_SECONDS = 600


async def demo(run: Run) -> None:
    """Do what `run.message` asks for, or say what can be asked. A tool that refuses is an answer, not a failure."""
    message = POLITENESS.sub("", run.message.strip())
    for pattern, skill in SKILLS:
        if request := pattern.fullmatch(message):
            try:
                await skill(run, **request.groupdict())
            except ToolError as refusal:
                await answer(run, f"Sorry, that did not work. {refusal}")
            return
    await answer(run, HELP)


async def answer(run: Run, text: str) -> None:
    """Stream `text` in pieces of a word or a few."""
    for piece in PIECE.findall(text):
        await run.say(piece)


async def calculate(run: Run, expression: str) -> None:
    expression = expression.strip("=?! \t\n").removesuffix(".")
    await run.think("That is arithmetic.")
    async with run.tool("calculate", expression=expression) as tool:
        sign, tool.result = show(evaluate(expression))
    await answer(run, f"{expression} {sign} {tool.result}")


async def tell_time(run: Run, place: str | None) -> None:
    place = place or "UTC"
    await run.think(f"I look for the time zone of {place}.")
    async with run.tool("time", place=place) as tool:
        zone = find_zone(place)
        now = datetime.now(zone)
        tool.result = {"zone": zone.key, "time": now.isoformat(timespec="seconds")}
    await answer(run, f"In {city(zone)} it is {now:%H:%M} on {now:%A}, {now.day} {now:%B %Y} (UTC{now:%z}).")


async def count(run: Run, unit: str, text: str) -> None:
    unit, text = unit.lower(), unquote(text)
    await run.think(f"I count: {unit}.")
    async with run.tool("count", unit=unit, text=text) as tool:
        tool.result = len(COUNTED[unit](text)) if unit in COUNTED else text.lower().count(unit)
    await answer(run, f"That text has {quantity(tool.result, unit)}.")


async def reverse(run: Run, text: str) -> None:
    text = unquote(text)
    await run.think("I turn the text around and leave the accents on their letters.")
    async with run.tool("reverse", text=text) as tool:
        tool.result = "".join(reversed(characters(text)))
    await answer(run, tool.result)


async def describe(run: Run, text: str) -> None:
    text = unquote(text)
    await run.think("I measure the text.")
    async with run.tool("statistics", text=text) as tool:
        if not words(text):
            raise ToolError("There is no word in that text.")
        counts = {unit: len(select(text)) for unit, select in COUNTED.items()}
        longest = max(words(text), key=len)
        tool.result = {**counts, "longest word": longest}
    listed = ", ".join(quantity(number, unit) for unit, number in counts.items())
    await answer(run, f"That text has {listed}. Its longest word is “{longest}”.")


async def slow(run: Run, seconds: str) -> None:
    duration = float(seconds)
    await run.think(f"This will take {seconds} s. Cancel it if that is too long.")
    async with run.tool("slow", seconds=duration) as tool:
        if duration > MAX_SECONDS:
            raise ToolError(f"I stay at one thing for {MAX_SECONDS} s at most.")
        started = trio.current_time()
        await trio.sleep(duration)
        tool.result = round(trio.current_time() - started, 1)
    await answer(run, f"Done. It took {tool.result} s.")


# Time zones


def find_zone(place: str) -> ZoneInfo:
    """The zone that `place` names in full (Europe/Berlin) or by its city (Berlin, or Berlin, Germany)."""
    for name in (place, place.partition(",")[0]):
        if zone := ZONES.get(plain(name)):
            return zone
    raise ToolError(
        f"I know no time zone “{place}”. Ask for one by its city, like New York, or in full, like Europe/Berlin."
    )


def city(zone: ZoneInfo) -> str:
    return zone.key.rpartition("/")[2].replace("_", " ")


def plain(name: str) -> str:
    """Lower case, without accents and underscores: São_Paulo is sao paulo."""
    letters = unicodedata.normalize("NFKD", name.replace("_", " ").strip().casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def read_zones() -> dict[str, ZoneInfo]:
    zones = [ZoneInfo(key) for key in sorted(available_timezones())]
    # Not by "city" where that is an offset: Etc/GMT+5 is the zone west of Greenwich, not what people mean by GMT+5.
    cities = {plain(city(zone)): zone for zone in zones if not zone.key.startswith("Etc/")}
    return cities | {plain(zone.key): zone for zone in zones}


ZONES = read_zones()


# Texts


def characters(text: str) -> list[str]:
    """What a reader takes for one: a letter with its marks, an emoji with its skin tone and all it is joined to."""
    if text.isascii():
        return list(text)
    starts = [
        index
        for index, part in enumerate(text)
        if index == 0 or not (unicodedata.category(part)[0] == "M" or part in JOINED or text[index - 1] == JOINER)
    ]
    return [text[start:end] for start, end in pairwise([*starts, len(text)])]


def letters(text: str) -> list[str]:
    return [character for character in characters(text) if character[0].isalpha()]


def words(text: str) -> list[str]:
    bare = (word.strip(PUNCTUATION) for word in text.split())
    return [word for word in bare if any(map(str.isalnum, word))]


def unquote(text: str) -> str:
    quoted = QUOTED.fullmatch(text)
    return quoted[1] if quoted else text


def quantity(number: int, unit: str) -> str:
    if unit not in COUNTED:
        return f"{number} “{unit}”"
    return f"{number} {unit.removesuffix('s') if number == 1 else unit}"


JOINER = "\u200d"
JOINED = {JOINER, *map(chr, range(0x1F3FB, 0x1F400))}
PUNCTUATION = ".,:;!?…*_()[]{}\"'“”„‘’«»"
QUOTED = re.compile("[\"'“„‘«](.+)[\"'”“’»][.?!]?", re.DOTALL)
COUNTED: dict[str, Callable[[str], list[str]]] = {
    "words": words,
    "letters": letters,
    "characters": characters,
    "lines": str.splitlines,
}


# Messages


def asking(pattern: str) -> re.Pattern[str]:
    """For a whole message in any case. Possessive (`++`) where it repeats, so that no message makes it backtrack."""
    return re.compile(pattern, re.VERBOSE | re.IGNORECASE | re.DOTALL)


TEXT = r"(?:\s++ (?:the|this) \s++ (?:text|word|sentence)\b)? \s*+ :? \s*+ (?P<text>.+)"
NOW = r"(?:\s++ (?:is|it|right|now|today|currently|please)\b)*+"

REVERSE = asking(rf"reverse\b {TEXT}")
STATISTICS = asking(rf"(?:statistics|stats)\b (?:\s++ (?:of|for|about)\b)? {TEXT}")
COUNT = asking(
    rf"""(?:count|how\s++many)\b (?:\s++ the\b)? \s++ (?P<unit>words|letters|characters|lines|\w) (?:['’]?s)?\b
    (?:\s++ (?:are|is|there)\b)*+ \s++ (?:in|of)\b {TEXT}"""
)
SLOW = asking(r"slow(?:ly)?\b (?:\s++ for\b)? \s++ (?P<seconds>\d{1,9}(?:\.\d{1,9})?) \s*+ (?:s|seconds?)? [.!]?")
UTC = asking(r"(?P<place>utc|gmt) (?:\s++ time)? [\s.?!]*+")
TIME = asking(
    rf"""(?:[\w'’]++ \s++){{0,8}} time\b {NOW}
    (?:\s++ (?:in|at|for) \s++ (?P<place>.{{1,60}}?) {NOW})? [\s.?!]*+"""
)
CALCULATE = asking(r"(?:calculate|compute|evaluate)\b \s*+ :? \s*+ (?P<expression>.+)")
ARITHMETIC = asking(
    rf"""(?:(?:what(?:\s++is|['’]?s)|how\s++much\s++is)\b)? \s*+ (?:the\b)? \s*+
    (?P<expression>{EXPRESSION}) [\s?!]*+"""
)
SKILLS: list[tuple[re.Pattern[str], Callable[..., Awaitable[None]]]] = [
    (REVERSE, reverse),
    (STATISTICS, describe),
    (COUNT, count),
    (SLOW, slow),
    (UTC, tell_time),
    (TIME, tell_time),
    (CALCULATE, calculate),
    (ARITHMETIC, calculate),
]
POLITENESS = re.compile(
    r"\A(?:(?:hello|hi|hey|please|can you|could you|would you|tell me)\b[\s,.!]*+)++", re.IGNORECASE
)
PIECE = re.compile(r".{1,7}(?:\s+|\Z)|\S{1,16}\s*|\s+", re.DOTALL)
