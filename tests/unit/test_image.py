"""`.ci/image` on a machine without a builder: only what cannot be helped is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "image"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="it skips everything for others than root")


def run(directory: Path, apt_get_says: str | None) -> tuple[int, str]:
    """The exit status and the output, with no tools but those that the script begins with, and this `apt-get`."""
    for tool in ("bash", "dirname"):
        found = shutil.which(tool)
        assert found is not None
        (directory / tool).symlink_to(found)
    if apt_get_says is not None:
        apt_get = directory / "apt-get"
        apt_get.write_text(f"#!{directory}/bash\necho '{apt_get_says}' >&2\nexit 100\n")
        apt_get.chmod(0o755)
    command = [directory / "bash", SCRIPT]
    done = subprocess.run(command, env={"PATH": str(directory)}, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "says",
    [
        "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 1 (apt)",
        "E: dpkg was interrupted",
    ],
)
def test_a_package_manager_that_fails_is_a_failure(tmp_path: Path, says: str) -> None:
    assert run(tmp_path, says) == (1, f"IMAGE FAILED: its tools cannot be installed: {says}\n")


@pytest.mark.parametrize(
    "says",
    [
        "E: Unable to locate package buildah",
        "W: Failed to fetch http://deb.debian.org/InRelease  Temporary failure resolving deb.debian.org",
    ],
)
def test_a_machine_that_cannot_get_a_builder_is_skipped(tmp_path: Path, says: str) -> None:
    skipped = f"IMAGE SKIPPED: no builder on this machine, and none to be had from here: {says}\n"
    assert run(tmp_path, says) == (0, skipped)


def test_a_machine_without_apt_get_is_skipped(tmp_path: Path) -> None:
    assert run(tmp_path, None) == (0, "IMAGE SKIPPED: no builder on this machine, and no apt-get to install one\n")
