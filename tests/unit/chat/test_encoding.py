"""What tools take and give becomes JSON, and nothing becomes null that is something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from json import loads
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.chat.encoding import cut, encode, shortened

NAN, INFINITY = float("nan"), float("inf")


@dataclass
class Point:
    x: float
    y: float | None = None


class Model(pydantic.BaseModel):
    path: Path = Path("/a")
    value: float = NAN


class Colour(Enum):
    RED = "red"


class Text(str):
    pass


class Moment(datetime):
    pass


@pytest.mark.parametrize(
    ("value", "json"),
    [
        (Point(1.5), '{"x":1.5,"y":null}'),
        (datetime(2026, 1, 2, tzinfo=UTC), '"2026-01-02T00:00:00Z"'),
        (Moment(2026, 1, 2, tzinfo=UTC), '"2026-01-02T00:00:00+00:00"'),
        (Decimal("1.10"), '"1.10"'),
        (UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (Path("/a/b"), '"/a/b"'),
        (Colour.RED, '"red"'),
        ({1}, "[1]"),
        (b"abc", '"YWJj"'),
        (Text("a"), '"a"'),
        (2**70, str(2**70)),
        (np.float64(1.5), "1.5"),
        (np.int64(3), "3"),
        (np.bool_(True), "true"),
        (np.array([[1, 2], [3, 4]]), "[[1,2],[3,4]]"),
        (msgspec.Raw(b"[1]"), "[1]"),
        (None, "null"),
    ],
)
def test_each_type_has_its_json(value: object, json: str) -> None:
    assert encode(value).decode() == json
    assert encode([value]).decode() == f"[{json}]"


@pytest.mark.parametrize(
    ("value", "json"),
    [
        (NAN, '"NaN"'),
        ([INFINITY, -INFINITY, None], '["Infinity","-Infinity",null]'),
        ({"a": (1, {"b": NAN}), "c": {2.5: NAN}}, '{"a":[1,{"b":"NaN"}],"c":{"2.5":"NaN"}}'),
        (Point(NAN), '{"x":"NaN","y":null}'),
        (Decimal("NaN"), '"NaN"'),
        (Model(), '{"path":"/a","value":"NaN"}'),
        (np.float32("nan"), '"NaN"'),
        (np.array([1, NAN, INFINITY]), '[1.0,"NaN","Infinity"]'),
        ([NAN, msgspec.Raw(b"[null]")], '["NaN",[null]]'),
        (["null", None], '["null",null]'),
    ],
)
def test_nan_and_infinity_are_texts_and_only_none_is_null(value: object, json: str) -> None:
    assert encode(value).decode() == json


@pytest.mark.parametrize("value", [object(), "\ud800", {None: 1}, [lambda: 1]])
def test_what_has_no_json_raises(value: object) -> None:
    with pytest.raises((TypeError, UnicodeEncodeError)):
        encode(value)


def test_a_list_in_itself_raises() -> None:
    loop: list[Any] = [NAN]
    loop.append(loop)
    with pytest.raises(RecursionError):
        encode(loop)


@given(st.text() | st.lists(st.text()), st.integers(100, 300))
def test_what_is_too_long_is_cut_to_a_text_that_fits(value: Any, room: int) -> None:
    json = encode(value)
    short = shortened(json, room)
    text = value if isinstance(value, str) else json.decode()
    assert len(short) <= room
    assert loads(short) == text or loads(short).endswith(f"… (cut: {len(text)} characters in all)")
    assert text.startswith(loads(short).rpartition("… (cut")[0] or text)


@pytest.mark.parametrize("of", [lambda n: "x" * n, lambda n: "\n" * n, lambda n: "é" * n, lambda n: "\x01" * n])
def test_most_of_the_room_is_used(of: Callable[[int], str]) -> None:
    assert 4000 // 2 < len(shortened(encode(of(10_000)), 4000)) <= 4000


def test_a_text_is_cut_only_if_it_is_longer() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcd", 3) == "abc… (cut: 4 characters in all)"
