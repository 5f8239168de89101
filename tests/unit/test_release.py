"""What a release needs: one version, a changelog that fits it, and pages without placeholders."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import tricorn

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = (ROOT / "docs" / "changelog.md").read_text()
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
SUPPORTED = ("3.11", "3.12", "3.13", "3.14")


def test_the_version_stands_only_in_the_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", tricorn.__version__)
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]


def test_the_changelog_has_the_version_or_announces_it() -> None:
    first, *_ = re.findall("^## (.*)", CHANGELOG, re.MULTILINE)
    if first == "Unreleased":
        unreleased = CHANGELOG.partition("## Unreleased")[2].partition("\n## ")[0]
        assert f"{tricorn.__version__} will be" in unreleased or f"\n## {tricorn.__version__} - " in CHANGELOG
    else:
        assert re.fullmatch(rf"{re.escape(tricorn.__version__)} - \d{{4}}-\d\d-\d\d", first)


def test_the_changelog_has_the_kinds_of_keep_a_changelog() -> None:
    assert set(re.findall("^### (.*)", CHANGELOG, re.MULTILINE)) <= KINDS


@pytest.mark.parametrize("version", SUPPORTED)
def test_the_same_pythons_are_tested_everywhere(version: str) -> None:
    assert version in (ROOT / ".ci" / "pythons").read_text()
    assert f'"{version}"' in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert version in (ROOT / "docs" / "compatibility.md").read_text()


def test_no_placeholder_is_left_in_what_is_published() -> None:
    pages = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "pyproject.toml", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        assert not re.search(r"\b(OWNER|TODO|FIXME|example\.invalid)\b|\bVERSION$", page.read_text(), re.MULTILINE), (
            page
        )


def test_a_python_that_is_missing_is_skipped_with_one_line(tmp_path: Path) -> None:
    """As on a new machine: there is no Python but the one in .venv."""
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "pythons"
    script.write_text((ROOT / ".ci" / "pythons").read_text())
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/sh\necho 3.12\n")
    own.chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)
    environ = {"PATH": str(tools), "HOME": str(tmp_path)}
    done = subprocess.run([tools / "bash", script], env=environ, capture_output=True, text=True, check=False)
    others = [version for version in SUPPORTED if version != "3.12"]
    said = "".join(f"PYTHON {version} SKIPPED: this machine has none\n" for version in others)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_every_version_of_python_in_a_classifier_is_supported() -> None:
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert named
    assert set(named) <= set(SUPPORTED)
