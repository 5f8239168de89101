"""Why something failed, in one line."""

from __future__ import annotations

from errno import ECONNREFUSED

import pytest

from tricorn.errors.reason import innermost, reason


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no"), "no"),
        (ValueError(" first \nsecond"), "first"),
        (ValueError(), "ValueError"),
        (OSError(ECONNREFUSED, "Connection refused"), "Connection refused"),
        (caused(ValueError("outer"), KeyError("inner")), "'inner'"),
        (ExceptionGroup("group", [ValueError("one"), ValueError("two")]), "one"),
        (ExceptionGroup("group", [caused(ValueError("outer"), OSError("inner"))]), "inner"),
        (caused(ValueError("outer"), ExceptionGroup("group", [OSError("inner")])), "inner"),
    ],
)
def test_the_innermost_error_is_told_in_one_line(error: Exception, text: str) -> None:
    assert reason(error) == text


def test_an_error_without_a_cause_is_the_innermost() -> None:
    error = ValueError()
    assert innermost(error) is error
