"""The documentation site's pages that say what the code is: the settings, and every public name.

`sphinx-build -W` checks the rest, in `.ci/run`: that each page can be built, and that each link leads somewhere.
"""

from __future__ import annotations

import re
from dataclasses import fields
from importlib import import_module
from inspect import getdoc, isclass, isfunction
from pathlib import Path
from runpy import run_path

import pytest

import tricorn
import tricorn.chat
import tricorn.testing
from tricorn.service.settings import ServiceSettings

DOCS = Path(__file__).parents[2] / "docs"
REFERENCE = DOCS / "reference"
PUBLIC = ("tricorn", "tricorn.testing", "tricorn.chat")


def test_the_page_of_settings_is_what_the_code_says() -> None:
    generate = run_path(str(REFERENCE / "generate.py"))
    message = "run: python docs/reference/generate.py"
    assert (REFERENCE / "settings.md").read_text() == generate["page"](), message


@pytest.mark.parametrize("setting", [field.name for field in fields(ServiceSettings)])
def test_the_page_has_each_setting_with_a_variable_that_is_read(setting: str) -> None:
    page = (REFERENCE / "settings.md").read_text()
    [section] = re.findall(rf"^### {setting}\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    [variable] = re.findall(r"^\| Environment \| `(\w+)` \|", section, re.MULTILINE)
    problem = ""
    try:
        ServiceSettings.from_environ({variable: "\0 no setting can be this"})
    except tricorn.SettingError as error:
        problem = str(error)
    assert "no such setting" not in problem


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_function_and_class_has_a_docstring(module: str) -> None:
    namespace = import_module(module)
    for name in namespace.__all__:
        public = getattr(namespace, name)
        assert not (isclass(public) or isfunction(public)) or getdoc(public), name


@pytest.mark.parametrize("name", [f"tricorn.{name}" for name in tricorn.__all__])
def test_the_page_of_the_server_has_every_public_name(name: str) -> None:
    assert described("server.md", name)


@pytest.mark.parametrize("name", [f"tricorn.chat.{name}" for name in tricorn.chat.__all__])
def test_the_page_of_the_chat_has_every_public_name(name: str) -> None:
    assert described("chat.md", name)


def described(page: str, name: str) -> bool:
    module, _, short = name.rpartition(".")
    text = (REFERENCE / page).read_text()
    return re.search(rf"^\.\. [a-z:]+ ({re.escape(module)}\.)?{short}$", text, re.MULTILINE) is not None


def test_every_page_is_in_the_site() -> None:
    index = (DOCS / "index.md").read_text()
    trees = " ".join(re.findall(r"^```{toctree}\n(.*?)^```", index, re.MULTILINE | re.DOTALL)).split()
    assert set(trees) >= {page.stem for page in DOCS.glob("*.md")} - {"index"}
