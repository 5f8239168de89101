from __future__ import annotations

import dataclasses
from math import inf, nan
from pathlib import Path

import msgspec
import pytest

from tricorn.service.settings import Secret, ServiceSettings
from tricorn.service.start_up import make_agent
from tricorn.settings import SettingError


def test_nothing_has_to_be_set() -> None:
    assert ServiceSettings.from_environ({"PATH": "/bin", "HOME": "/"}) == ServiceSettings()


ORIGINS = "origins as browsers send them, like https://example.org, https://*.example.org, http://localhost:*"


@pytest.mark.parametrize("field", dataclasses.fields(ServiceSettings), ids=lambda field: field.name)
def test_every_field_is_a_variable_or_has_another_way_in(field: dataclasses.Field[object]) -> None:
    ways = {
        "host": {"TRICORN_HOST": "example.org"},
        "port": {"PORT": "3"},
        "bind": {"TRICORN_BIND": "127.0.0.1:3"},
        "event_bytes": {"TRICORN_EVENT_BYTES": "5000"},
        "metrics": {"TRICORN_METRICS": "[::1]:3"},
        "service": {"K_SERVICE": "3"},
        "revision": {"K_REVISION": "3"},
        "configuration": {"K_CONFIGURATION": "3"},
        "import_guard": {"TRICORN_IMPORT_GUARD": "deny"},
        "auth": {"TRICORN_AUTH": "none"},
        "deflate": {"TRICORN_DEFLATE": "takeover"},
        "origins": {"TRICORN_ORIGINS": "https://3.example"},
        "trusted_proxies": {"TRICORN_TRUSTED_PROXIES": "127.0.0.1, 10.0.0.0/8 unix"},
        "base_url": {"TRICORN_BASE_URL": "http://127.0.0.1:3/v1"},
        "api_key": {"OPENAI_API_KEY": "3"},
        "proxy_protocol": {"TRICORN_PROXY_PROTOCOL": "true", "TRICORN_TRUSTED_PROXIES": "unix"},
    }
    values = {
        "host": "example.org",
        "bind": ("127.0.0.1:3",),
        "auth": "none",
        "deflate": "takeover",
        "import_guard": "deny",
        "origins": ("https://3.example",),
        "trusted_proxies": ("127.0.0.1", "10.0.0.0/8", "unix"),
        "proxy_protocol": True,
        "base_url": "http://127.0.0.1:3/v1",
    }
    environ = ways.get(field.name, {f"TRICORN_{field.name.upper()}": "3"})
    value = getattr(ServiceSettings.from_environ(environ), field.name)
    if isinstance(value, Secret):
        assert value.reveal() == "3"
    else:
        assert value in (values.get(field.name), "3", 3, 5000, ("::1", 3))
    assert value != field.default


def test_seconds_are_decimal_and_may_be_never() -> None:
    environ = {"TRICORN_RUN_TIMEOUT": "inf", "TRICORN_LINGER": "0", "TRICORN_HEARTBEAT": "0.5", "TRICORN_LEASE": "1e3"}
    settings = ServiceSettings.from_environ(environ)
    assert (settings.run_timeout, settings.linger, settings.heartbeat, settings.lease) == (inf, 0, 0.5, 1000)


@pytest.mark.parametrize(
    ("environ", "bind"),
    [
        ({"PORT": "9000"}, "127.0.0.1:9000"),
        ({"K_SERVICE": "chat", "PORT": "9000"}, "0.0.0.0:9000"),
        ({"K_SERVICE": "chat", "PORT": "9000", "TRICORN_BIND": "127.0.0.1:1"}, "127.0.0.1:1"),
        ({"TRICORN_BIND": "[::1]:0", "PORT": "9000"}, "[::1]:0"),
        ({"TRICORN_HOST": "0.0.0.0"}, "0.0.0.0:8080"),
        ({"TRICORN_HOST": "::1"}, "[::1]:8080"),
        ({"TRICORN_HOST": "0.0.0.0", "PORT": "9000"}, "0.0.0.0:9000"),
        ({"K_SERVICE": "chat", "TRICORN_HOST": "127.0.0.1"}, "127.0.0.1:8080"),
        ({"TRICORN_BIND": "[::1]:0", "TRICORN_HOST": "0.0.0.0", "PORT": "9000"}, "[::1]:0"),
        ({"TRICORN_BIND": ":80, unix:/run/a fd:4 fd://"}, ":80 unix:/run/a fd:4 fd://"),
    ],
)
def test_where_to_listen(environ: dict[str, str], bind: str) -> None:
    assert ServiceSettings.from_environ(environ).binds == tuple(bind.split())


ORIGINS = "origins as browsers send them, like https://example.org, https://*.example.org, http://localhost:*"


@pytest.mark.parametrize(
    ("variable", "text", "error"),
    [
        ("TRICORN_LINGER", "-1", "TRICORN_LINGER=-1: must be a number of seconds, 0 or more"),
        ("TRICORN_RUN_TIMEOUT", "0", "TRICORN_RUN_TIMEOUT=0: must be a number of seconds above 0"),
        ("TRICORN_RUN_TIMEOUT", "", "TRICORN_RUN_TIMEOUT=: must be a number of seconds above 0"),
        ("TRICORN_RUN_TIMEOUT", "nan", "TRICORN_RUN_TIMEOUT=nan: must be a number of seconds above 0"),
        ("TRICORN_RUN_TIMEOUT", "5\n6", r"TRICORN_RUN_TIMEOUT='5\n6': must be a number of seconds above 0"),
        ("TRICORN_HEARTBEAT", "inf", "TRICORN_HEARTBEAT=inf: must be a number of seconds above 0, at most 3600"),
        ("TRICORN_OUTBOX", "1.5", "TRICORN_OUTBOX=1.5: must be a whole number above 0"),
        ("TRICORN_OUTBOX", "1_0", "TRICORN_OUTBOX=1_0: must be a whole number above 0"),
        ("TRICORN_OUTBOX", " 1", "TRICORN_OUTBOX= 1: must be a whole number above 0"),
        ("TRICORN_OUTBOX", "٣", "TRICORN_OUTBOX=٣: must be a whole number above 0"),
        ("TRICORN_OUTBOX", "0", "TRICORN_OUTBOX=0: must be a whole number above 0"),
        ("TRICORN_IMPORT_GUARD", "on", "TRICORN_IMPORT_GUARD=on: must be off, count, report or deny"),
        ("TRICORN_AGENT", "", "TRICORN_AGENT=: must be module:function"),
        ("TRICORN_AUTH", "off", "TRICORN_AUTH=off: must be none, which lets everybody in, or not set"),
        ("TRICORN_JWT_KEY", "", "TRICORN_JWT_KEY: must be a text that is not empty"),
        *(
            ("TRICORN_ORIGINS", text, f"TRICORN_ORIGINS={text}: must be {ORIGINS}")
            for text in ("example.org", "https://", "https://a.example/", "https://A.example", "ws://a.example")
        ),
        (
            "TRICORN_TRUSTED_PROXIES",
            "127.0.0.1 nginx",
            "TRICORN_TRUSTED_PROXIES=127.0.0.1 nginx: must be addresses like 127.0.0.1 or ::1, "
            "networks by their first address like 10.0.0.0/8, or unix",
        ),
        ("TRICORN_PROXY_PROTOCOL", "1", "TRICORN_PROXY_PROTOCOL=1: must be true or false"),
        ("TRICORN_BIND", "8080", "TRICORN_BIND=8080: must be HOST:PORT, for example 127.0.0.1:8080"),
        ("TRICORN_BIND", "", "TRICORN_BIND=: must be HOST:PORT, for example 127.0.0.1:8080"),
        ("TRICORN_BIND", ":80 unix:", "TRICORN_BIND=unix:: must be unix:PATH, for example unix:/run/tricorn.sock"),
        ("PORT", "65536", "PORT=65536: must be a whole number from 0 to 65535"),
        ("PORT", "http", "PORT=http: must be a whole number from 0 to 65535"),
        ("TRICORN_RUN_TIMEOUTS", "1", "TRICORN_RUN_TIMEOUTS: no such setting; did you mean TRICORN_RUN_TIMEOUT?"),
        ("TRICORN_DRAIN_TIMEOUT", "2", "close_timeout=2.0: must be less than drain_timeout, which is 2.0"),
    ],
)
def test_a_bad_setting_says_in_one_line_what_would_be_right(variable: str, text: str, error: str) -> None:
    with pytest.raises(SettingError) as raised:
        ServiceSettings.from_environ({variable: text})
    assert str(raised.value) == error


KEY = "correct-horse-battery-staple-correct-horse"


def test_a_secret_is_shown_nowhere() -> None:
    settings = ServiceSettings.from_environ({"TRICORN_JWT_KEY": KEY, "TRICORN_TOKEN": KEY})
    assert settings.jwt_key is not None
    assert settings.jwt_key.reveal() == KEY
    shown = [f"{settings!r} {settings} {settings.jwt_key} {settings.jwt_key!r} {settings.jwt_key:}"]
    for values in ({"jwt_key": KEY}, {"jwt_key": Secret("")}, {"jwt_key": settings.jwt_key, "auth": "none"}):
        with pytest.raises(SettingError) as raised:
            ServiceSettings(**values)  # type: ignore[arg-type]
        shown.append(str(raised.value))
    for encode in (msgspec.json.encode, msgspec.to_builtins):
        with pytest.raises(TypeError) as unsupported:
            encode(settings)  # type: ignore[operator]
        shown.append(str(unsupported.value))
    assert not any(KEY in text for text in shown)


def test_origins_are_a_list() -> None:
    settings = ServiceSettings.from_environ(
        {"TRICORN_ORIGINS": "https://a.example, http://b.example:81\thttp://[::1]:3"}
    )
    assert settings.origins == ("https://a.example", "http://b.example:81", "http://[::1]:3")


def test_a_variable_like_no_other_gets_the_list() -> None:
    names = "TRICORN_ABANDON_AFTER, TRICORN_AGENT, TRICORN_AUTH, TRICORN_AUTH_TIMEOUT, TRICORN_BASE_URL, TRICORN_BIND, "
    with pytest.raises(SettingError, match=f"^TRICORN_PORT: no such setting; there are {names}"):
        ServiceSettings.from_environ({"TRICORN_PORT": "1"})


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"port": -1}, "port=-1: must be a whole number from 0 to 65535"),
        ({"bind": ("80",)}, "bind=80: must be HOST:PORT, for example 127.0.0.1:8080"),
        ({"bind": ":80"}, "bind=:80: must be a tuple of HOST:PORT, :PORT, unix:PATH, fd:N or fd://"),
        ({"host": ""}, "host=: must be an address or a host name"),
        ({"ping_timeout": nan}, "ping_timeout=nan: must be a number of seconds above 0"),
        ({"outbox": "256"}, "outbox=256: must be a whole number above 0"),
        ({"outbox": True}, "outbox=True: must be a whole number above 0"),
        ({"outbox": 2.0}, "outbox=2.0: must be a whole number above 0"),
        ({"linger": True}, "linger=True: must be a number of seconds, 0 or more"),
        ({"origins": "*"}, f"origins=*: must be {ORIGINS}"),
        ({"deflate": None}, "deflate=None: must be off, takeover or no-takeover"),
        ({"metrics": ("h", 65536)}, "metrics=('h', 65536): must be HOST:PORT, for example 127.0.0.1:9090"),
        ({"metrics": 9090}, "metrics=9090: must be HOST:PORT, for example 127.0.0.1:9090"),
        ({"service": 1}, "service=1: must be text or nothing"),
        ({"drain_timeout": 1.5}, "close_timeout=2.0: must be less than drain_timeout, which is 1.5"),
    ],
)
def test_settings_made_in_a_program_are_checked_too(values: dict[str, object], error: str) -> None:
    with pytest.raises(SettingError) as raised:
        ServiceSettings(**values)  # type: ignore[arg-type]
    assert str(raised.value) == error
    with pytest.raises(SettingError):
        dataclasses.replace(ServiceSettings(), **values)


def test_a_model_and_an_agent_cannot_both_answer() -> None:
    with pytest.raises(SettingError) as raised:
        ServiceSettings.from_environ({"TRICORN_MODEL": "m", "TRICORN_AGENT": "my:agent"})
    assert str(raised.value) == "model=m: there is an agent as well; only one of them can answer"


def test_the_key_of_a_model_has_one_way_in_and_is_not_shown() -> None:
    assert ServiceSettings.from_environ({"OPENAI_API_KEY": ""}).api_key is None
    assert "sk-x" not in repr(ServiceSettings.from_environ({"OPENAI_API_KEY": "sk-x"}))
    with pytest.raises(SettingError, match="TRICORN_API_KEY: no such setting"):
        ServiceSettings.from_environ({"TRICORN_API_KEY": "sk-x"})


def test_a_model_that_can_be_used_is_the_agent(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Be kind.\n")
    settings = ServiceSettings(model="m-1", api_key=Secret("sk-x"), system_prompt=str(prompt))
    assert make_agent(settings).__name__ == "m-1"  # type: ignore[attr-defined]
    assert settings.answering == "tricorn.chat.agents.model:Model"
    with pytest.raises(SettingError, match="OPENAI_API_KEY: the API key must be printable ASCII"):
        make_agent(ServiceSettings(model="m-1", api_key=Secret("sk\nx")))
    prompt.write_bytes(b"\xff")
    with pytest.raises(SettingError, match="cannot be read: is not UTF-8"):
        make_agent(settings)
