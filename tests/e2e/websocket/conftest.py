"""What the end-to-end tests of the incident have in common: tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fixtures.service import KEY

if TYPE_CHECKING:
    from fixtures.service import Service


@pytest.fixture
async def service(service: Service) -> Service:
    """The service with a key: who comes in needs a token of `tricorn token`."""
    service.environ = KEY
    return service
