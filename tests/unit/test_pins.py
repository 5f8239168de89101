"""What the image is made of fits what pyproject.toml asks for; that the pins are complete its build shows."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
OF_NO_IMAGE = {"mcp", "unit", "test", "bench", "docs"}


def pins(name: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Each requirement of a file, and its hashes."""
    for line in (ROOT / ".ci" / name).read_text().replace("\\\n", "").splitlines():
        requirement, *hashes = line.split(" --hash=")
        yield Requirement(requirement), hashes


def test_each_base_image_can_be_pinned_by_its_digest() -> None:
    bases = re.findall("^FROM (.*)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert len(bases) == 2
    assert all("${DIGEST:+@${DIGEST}}" in base for base in bases)
    assert '--build-arg "DIGEST=$digest"' in (ROOT / ".ci" / "image").read_text()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "requirements.txt",
            [
                *PROJECT["project"]["dependencies"],
                *(each for extra in EXTRAS.keys() - OF_NO_IMAGE for each in EXTRAS[extra]),
            ],
        ),
        ("build-requirements.txt", PROJECT["build-system"]["requires"]),
    ],
)
def test_every_requirement_is_pinned_by_hash_to_what_it_allows(name: str, wanted: list[str]) -> None:
    versions: dict[str, list[str]] = {}
    for pin, hashes in pins(name):
        assert hashes
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", each.strip()) for each in hashes)
        [pinned] = pin.specifier
        assert pinned.operator == "=="
        versions.setdefault(pin.name, []).append(pinned.version)
    assert wanted
    for requirement in map(Requirement, wanted):
        if requirement.name == PROJECT["project"]["name"]:  # one extra that takes in another
            continue
        assert versions[requirement.name], requirement
        assert all(requirement.specifier.contains(version) for version in versions[requirement.name]), requirement
