"""Whatever type a public signature mentions can be imported from `tricorn`."""

from __future__ import annotations

import re
from inspect import getmembers, isclass, isfunction, signature
from typing import Any

import pytest

import tricorn
from tricorn import server, testing

FOR_HOSTS = {"count_end"}
TYPES_OF_OURS = {
PUBLIC = [getattr(tricorn, name) for name in tricorn.__all__] + [getattr(testing, name) for name in testing.__all__]


def callables(of: Any) -> list[Any]:
    if isfunction(of):
        return [of]
    if isclass(of) and of.__module__.startswith("tricorn"):
        return [
            member for name, member in getmembers(of, isfunction) if not name.startswith("_") and name not in FOR_HOSTS
        ]
    return []


@pytest.mark.parametrize("function", [each for public in PUBLIC for each in callables(public)])
def test_every_type_in_a_signature_is_exported(function: Any) -> None:
    text = " ".join(map(str, [*(p.annotation for p in signature(function).parameters.values()), ""]))
    text += str(signature(function).return_annotation)
    for name in re.findall(r"\b[A-Z]\w+", text):
        module = vars(__import__(function.__module__, fromlist=["x"]))
        found = module.get(name)
        is_ours = getattr(found, "__module__", "").startswith("tricorn") or name in TYPES_OF_OURS
        assert not is_ours or name in {*tricorn.__all__, *testing.__all__}, name


    "Handler",
    "Handlers",
    "ASGIApp",
    "BeforeUpgrade",
    "Drain",
    "Address",
    "Message",
    "Connection",
    "Site",
    "Phase",
}


def test_running_and_serving_take_the_same_arguments() -> None:
    of_run, of_serve = (list(signature(each).parameters.values()) for each in (server.run, server.serve))
    assert of_run == [each for each in of_serve if each.name != "task_status"]
