"""Whatever type a public signature mentions can be imported from `tricorn` or `tricorn.testing`."""

from __future__ import annotations

import re
from inspect import getmembers, isclass, isfunction, signature
from typing import Any

import pytest

import tricorn
from tricorn import server, testing

EXPORTED = {*tricorn.__all__, *testing.__all__}
PUBLIC = [getattr(tricorn, name) for name in tricorn.__all__] + [getattr(testing, name) for name in testing.__all__]
ALIASES = {"ASGIApp", "Address", "BeforeUpgrade", "Connection", "Drain", "Handler", "Handlers", "Message", "Site"}
FOR_HOSTS = {"count_end"}


def functions(public: Any) -> list[Any]:
    """The function itself, or the public methods of a class of ours."""
    if isfunction(public):
        return [public]
    if isclass(public) and public.__module__.startswith("tricorn"):
        members = getmembers(public, isfunction)
        return [member for name, member in members if not name.startswith("_") and name not in FOR_HOSTS]
    return []


@pytest.mark.parametrize("function", [each for public in PUBLIC for each in functions(public)])
def test_every_type_in_a_signature_is_exported(function: Any) -> None:
    known = vars(__import__(function.__module__, fromlist=["x"]))
    asked = signature(function)
    annotations = [*(parameter.annotation for parameter in asked.parameters.values()), asked.return_annotation]
    for name in re.findall(r"\b[A-Z]\w+", " ".join(map(str, annotations))):
        is_ours = name in ALIASES or getattr(known.get(name), "__module__", "").startswith("tricorn")
        assert not is_ours or name in EXPORTED


def test_running_and_serving_take_the_same_arguments() -> None:
    of_run, of_serve = (list(signature(each).parameters.values()) for each in (server.run, server.serve))
    assert of_run == [each for each in of_serve if each.name != "task_status"]
