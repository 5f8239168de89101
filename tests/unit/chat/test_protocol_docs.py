"""docs/protocol.md agrees with tricorn.chat.protocol: every object, every field, every example."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec
import pytest

from tricorn.chat import close_codes, protocol
from tricorn.protocol import close

PAGE = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()


class Section(NamedTuple):
    """What the page says under one `### name` heading. A field's name ends with `?` where it may be absent."""

    fields: set[str]
    examples: list[str]


def sections() -> dict[str, Section]:
    parts = re.split(r"^#{2,3} (.*)$", PAGE, flags=re.MULTILINE)[1:]
    return {
        heading.strip("`"): Section(
            fields=set(re.findall(r"^\| `([a-z_]+\??)` \|", text, re.MULTILINE)),
            examples=re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL),
        )
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }


def fields(struct: type[msgspec.Struct]) -> set[str]:
    return {field.name if field.required else f"{field.name}?" for field in msgspec.structs.fields(struct)}


SECTIONS = sections()
STRUCTS: dict[str, type[protocol.WireObject]] = {
    struct.__struct_config__.tag: struct
    for union in (protocol.ClientRequest, protocol.Reply, protocol.AnyEvent)
    for struct in get_args(union)
}


@pytest.mark.parametrize("tag", STRUCTS)
def test_every_object_is_described_field_by_field(tag: str) -> None:
    struct = STRUCTS[tag]
    shared = fields(protocol.RunEvent) if issubclass(struct, protocol.ConversationEvent) else set()
    assert SECTIONS[tag].fields == fields(struct) - shared


@pytest.mark.parametrize("tag", STRUCTS)
def test_the_example_of_an_object_is_one(tag: str) -> None:
    (example,) = SECTIONS[tag].examples
    decoded = msgspec.json.decode(example, type=STRUCTS[tag])
    assert json.loads(msgspec.json.encode(decoded)) == json.loads(example)  # no field that it has not


def test_the_fields_that_several_objects_have_are_described() -> None:
    assert fields(protocol.RunEvent) == fields(protocol.ConversationEvent) | {"run"}
    assert SECTIONS["The events"].fields == fields(protocol.ConversationEvent) | {"run?"}
    assert SECTIONS["limits"].fields == fields(protocol.Limits)
    assert SECTIONS["usage"].fields == fields(protocol.Usage)


@pytest.mark.parametrize(
    ("heading", "literal"),
    [
        ("error", msgspec.structs.fields(protocol.Error)[0].type),
        ("agent_completed", protocol.Outcome),
        ("agent_asked", protocol.AskOutcome),
    ],
)
def test_every_value_of_an_enumeration_is_described(heading: str, literal: Any) -> None:
    text = PAGE.partition(f"### `{heading}`\n")[2].partition("\n### ")[0]
    assert set(re.findall(r"^- `([a-z_]+)`:", text, re.MULTILINE)) == set(get_args(literal))


def test_the_session_that_is_shown_is_one() -> None:
    (talk,) = (text for text in re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) if text.startswith("←"))
    for line in talk.splitlines():
        arrow, text = line[0], line[2:]
        msgspec.json.decode(text, type=protocol.ClientRequest if arrow == "→" else protocol.Reply | protocol.AnyEvent)


def test_the_subprotocols_are_named() -> None:
    assert f"`{protocol.SUBPROTOCOL}`" in PAGE
    assert f"`{protocol.BATCH_SUBPROTOCOL}`" in PAGE


def test_every_close_code_is_described() -> None:
    codes = [*vars(close).values(), *vars(close_codes).values()]
    sent_or_seen = {code for code in codes if isinstance(code, int)} - {close.NO_STATUS}
    assert {int(code) for code in re.findall(r"^\| (?:none, )?(\d{4}) \|", PAGE, re.MULTILINE)} == sent_or_seen
