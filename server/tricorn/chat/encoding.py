"""What tools take and give, as JSON.

Beyond what msgspec encodes by itself (dataclasses, dates, Decimal, UUID, Enum, sets, bytes in base64), this encodes
paths, models of pydantic, and what numpy and pandas have. JSON has no NaN and no infinity: they become the texts "NaN",
"Infinity" and "-Infinity", as in the JSON of Protocol Buffers, and never null.
"""

from __future__ import annotations

from math import isfinite, isnan
from pathlib import PurePath
from typing import Any

from msgspec import DecodeError, Raw, to_builtins
from msgspec.json import Decoder, Encoder, decode

PLAIN: tuple[type[Any], ...] = (str, int, float, bytes)  # msgspec refuses their subclasses


def encode(value: object) -> bytes:
    """Return a value as JSON. What msgspec raises for a value that has none says which type is at fault."""
    if type(value) is Raw:
        return bytes(value)
    json = _encode(value)
    # msgspec makes null of a NaN. Only then is it worth looking at every value.
    return _encode(_finite(to_builtins(value, enc_hook=_plain))) if b"null" in json else json


def shortened(json: bytes, room: int) -> bytes:
    """Return the beginning of a JSON value as a JSON text of at most `room` bytes, with a notice that it is cut."""
    text = _text_in(json)
    kept = room
    while len(short := _encode(cut(text, kept))) > room:
        kept = kept * 3 // 4
    return short


def cut(text: str, characters: int) -> str:
    """Return the beginning of a text with a notice that it is cut, or all of it if it has no more characters."""
    return text if len(text) <= characters else f"{text[:characters]}… (cut: {len(text)} characters in all)"


def _text_in(json: bytes) -> str:
    """Return what JSON stands for if that is a text, else the JSON itself."""
    try:
        return _decode_text(json)
    except DecodeError:
        return json.decode()


def _plain(value: Any) -> Any:
    """Return a value of a type that msgspec does not know as one that it does. What numpy has is told by `tolist`."""
    for kind in PLAIN:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Raw):  # of which `to_builtins` knows nothing
        return decode(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):  # a subclass of datetime, as of pandas
        return value.isoformat()
    raise TypeError(f"an object of type {type(value).__name__} cannot be encoded")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


_encode = Encoder(enc_hook=_plain).encode
_decode_text = Decoder(str).decode
