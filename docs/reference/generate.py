"""Writes `settings.md`, the page of every setting, from the classes that define them. A test holds the page to them."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from textwrap import dedent, fill

from tricorn.chat.settings import ChatSettings
from tricorn.service.settings import Secret, ServiceSettings
from tricorn.settings import Settings, rules

PAGE = Path(__file__).with_name("settings.md")

CLASSES = (
    (Settings, "tricorn.Settings", "Any server takes these: `tricorn.serve(..., settings=...)`."),
    (ChatSettings, "tricorn.chat.settings.ChatSettings", "`Chat` takes these, and those of `tricorn.Settings`."),
    (ServiceSettings, "tricorn.service.settings.ServiceSettings", "`tricorn serve` has these, and all of the above."),
)
VARIABLES = {
    "api_key": "OPENAI_API_KEY",
    "port": "PORT",
    "service": "K_SERVICE",
    "revision": "K_REVISION",
    "configuration": "K_CONFIGURATION",
}
UNITS = ("Seconds", "Bytes", "Characters")  # with which the text of such a setting begins

INTRODUCTION = """\
# Settings

<!-- Do not edit: python docs/reference/generate.py writes this page. -->

Every setting of Tricorn, with its default, its unit and its environment variable. Times are in seconds, and `inf` means
never or no limit. Settings are checked when they are made: a value that cannot be used raises `SettingError`, which
says what would be right.

`tricorn serve` and `tricorn.asgi:app` read the environment. A program passes an object of one of the classes instead;
nothing else reads the environment. [Operations](../operations.md) says how to choose values, and which settings have an
effect [on each way in](../operations.md#settings-and-ways-in).
"""


def page() -> str:
    parts = [INTRODUCTION]
    for cls, name, about in CLASSES:
        parts.append(f"## {name}\n\n{about}\n")
        parts += [section(cls, field, text) for field, text in documented(cls)]
    return "\n".join(parts)


def documented(cls: type[Settings]) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each setting that a class adds to the one before."""
    [module] = ast.parse(dedent(inspect.getsource(cls))).body
    body = module.body if isinstance(module, ast.ClassDef) else []
    for field, below in pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                yield name, inspect.cleandoc(text)


def section(cls: type[Settings], name: str, text: str) -> str:
    unit = next((unit.lower() for unit in UNITS if text.startswith(unit)), None)
    rows = [
        ("Default", shown(cls, name)),
        *([("Unit", unit)] if unit else []),
        ("Must be", rules(cls)[name].description.replace("|", "\\|")),
        ("Environment", f"`{VARIABLES.get(name, f'TRICORN_{name.upper()}')}`"),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {head} | {value} |" for head, value in rows)])
    paragraphs = "\n\n".join(fill(paragraph, 120, break_long_words=False) for paragraph in text.split("\n\n"))
    return f"### {name}\n\n{paragraphs}\n\n{table}\n"


def shown(cls: type[Settings], name: str) -> str:
    [default] = [field.default for field in fields(cls) if field.name == name]
    if isinstance(default, Secret):
        default = default.reveal()
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default:,}`" if isinstance(default, int) else f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(page())
