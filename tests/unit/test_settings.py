"""The settings of the three layers: that they are checked and documented where they are defined."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from math import nan

import pytest

from tricorn.chat.settings import ChatSettings
from tricorn.service.settings import ServiceSettings
from tricorn.settings import SettingError, Settings


@pytest.mark.parametrize("kind", [Settings, ChatSettings, ServiceSettings])
def test_every_setting_has_a_docstring(kind: type[Settings]) -> None:
    """In the form that tools take for attributes: a literal below the field."""
    [module] = ast.parse(inspect.getsource(kind)).body
    assert isinstance(module, ast.ClassDef)
    fields = {
        each.target.id: below
        for each, below in zip(module.body, module.body[1:], strict=False)
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    inherited = {field.name for base in kind.__bases__ if base is not object for field in dataclasses.fields(base)}
    assert fields.keys() == {field.name for field in dataclasses.fields(kind)} - inherited
    for name, below in fields.items():
        match below:
            case ast.Expr(ast.Constant(str(text))):
                assert text.strip().endswith((".", "…")), name
            case _:
                pytest.fail(f"{name} has no docstring")


def test_each_layer_has_settings_of_its_own() -> None:
    """The server's know no agents, tokens or platforms."""
    names = {field.name for field in dataclasses.fields(Settings)}
    assert names == {
        *("handshake_timeout", "close_timeout", "stall_timeout", "ping_interval", "ping_timeout", "drain_timeout"),
        *("max_connections", "peer_connections", "max_handshakes", "max_head_bytes", "max_message_bytes", "deflate"),
        *("messages_per_second", "bytes_per_second", "origins", "trusted_proxies", "proxy_protocol"),
    }


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"ping_timeout": nan}, "ping_timeout=nan: must be a number of seconds above 0"),
        ({"max_connections": "9"}, "max_connections=9: must be a whole number above 0"),
        ({"peer_connections": 0.5}, "peer_connections=0.5: must be a number, 1 or more, or inf"),
        (
            {"trusted_proxies": ("10.0.0.1/8",)},
            "trusted_proxies=('10.0.0.1/8',): must be addresses like 127.0.0.1 or ::1, "
            "networks by their first address like 10.0.0.0/8, or unix",
        ),
        ({"proxy_protocol": "yes", "trusted_proxies": ("unix",)}, "proxy_protocol=yes: must be true or false"),
        (
            {"proxy_protocol": True},
            "proxy_protocol=True: needs trusted_proxies, which are those that send its header",
        ),
        ({"drain_timeout": 1.5}, "close_timeout=2.0: must be less than drain_timeout, which is 1.5"),
    ],
)
@pytest.mark.parametrize("kind", [Settings, ChatSettings, ServiceSettings])
def test_they_are_checked_when_they_are_made(kind: type[Settings], values: dict[str, object], error: str) -> None:
    with pytest.raises(SettingError) as raised:
        kind(**values)  # type: ignore[arg-type]
    assert str(raised.value) == error


def test_settings_are_given_by_name_and_stay() -> None:
    with pytest.raises(TypeError):
        Settings(1.0)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().close_timeout = 1.0  # type: ignore[misc]
