"""A pytest plugin: the fixture `tricorn_connect`, for tests of handlers that want several clients without nesting.

pytest imports this module in every run on a machine that has Tricorn. It is therefore not in the package, and imports
the package, which takes a tenth of a second, only for a test that uses the fixture.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tricorn.testing import Connect


@pytest.fixture
async def tricorn_connect() -> AsyncGenerator[Connect]:
    """Connect to handlers: `client = await tricorn_connect(handler)`, with the arguments of `tricorn.testing.connect`.

    The connections are closed at the end of the test, which needs pytest-trio. If a handler fails, so does the test,
    unless a `Disconnected` had that as its cause.
    """
    async with resolve_name("tricorn.testing:open_clients")() as connect:
        yield connect
