"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def deny_late_imports() -> Iterator[None]:
    """Have every `tricorn serve` that a test starts fail at what it would import after start-up."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRICORN_IMPORT_GUARD", "deny")
        yield
