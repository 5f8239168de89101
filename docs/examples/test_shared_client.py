import httpx
import pytest
from shared_client import forecast

from tricorn.chat import ToolError


def service(request: httpx.Request) -> httpx.Response:
    """Stand in for the weather service."""
    known = request.url.params["city"] == "Oslo"
    return httpx.Response(200, text="rain") if known else httpx.Response(404)


async def test_the_forecast_is_that_of_the_service() -> None:
    async with httpx.AsyncClient(base_url="http://weather", transport=httpx.MockTransport(service)) as client:
        assert await forecast(client, "Oslo") == "rain"


async def test_a_city_that_the_service_does_not_know_is_an_error_that_people_see() -> None:
    async with httpx.AsyncClient(base_url="http://weather", transport=httpx.MockTransport(service)) as client:
        with pytest.raises(ToolError, match="there is no weather station in Atlantis"):
            await forecast(client, "Atlantis")
