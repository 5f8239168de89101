"""What is an ASGI application, and where one cannot be served."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from fastapi import FastAPI
from quart_trio import QuartTrio
from starlette.applications import Starlette

import tricorn
from tricorn.asgi_handler import is_asgi_app
from tricorn.testing import connect
from tricorn.trio_websocket import adapt


async def app(scope: Any, receive: Any, send: Any) -> None: ...


async def handler(ws: tricorn.WebSocket) -> None: ...


async def handler_with_options(ws: tricorn.WebSocket, one: int = 1, two: int = 2) -> None: ...


async def anything(*args: Any) -> None: ...


class ASGI2:
    def __init__(self, scope: Any) -> None: ...

    async def __call__(self, receive: Any, send: Any) -> None: ...


@pytest.mark.parametrize("what", [app, Starlette(), FastAPI(), QuartTrio("name"), tricorn.asgi_app(handler)])
def test_asgi_applications(what: Any) -> None:
    assert is_asgi_app(what)


NOT_APPS = [handler, handler_with_options, anything, partial(handler), tricorn.asgi_handler(app), ASGI2, Starlette, {}]


@pytest.mark.parametrize("what", NOT_APPS)
def test_what_is_no_asgi_application(what: Any) -> None:
    assert not is_asgi_app(what)


@pytest.mark.parametrize("what", [handler, ASGI2, Starlette, "module:app"])
def test_asgi_handler_refuses_what_cannot_be_an_application(what: Any) -> None:
    with pytest.raises(TypeError, match="scope, receive and send"):
        tricorn.asgi_handler(what)


def test_asgi_handler_takes_a_callable_that_takes_anything() -> None:
    assert tricorn.asgi_handler(anything).app is anything


async def test_an_application_cannot_be_tested_in_memory() -> None:
    with pytest.raises(TypeError, match="test client"):
        async with connect(tricorn.asgi_handler(app)):
            raise AssertionError("connected")


@pytest.mark.parametrize("handlers", [tricorn.asgi_handler(app), {"/": tricorn.asgi_handler(app), "/h": handler}])
def test_trio_websocket_cannot_serve_an_application(handlers: Any) -> None:
    with pytest.raises(TypeError, match="lifespan"):
        adapt(handlers)
