"""What the service can be told, and the one place where the environment is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from os import environ
from typing import Annotated, Any, Literal, Self

from tricorn.chat.agents.model import HISTORY, OPENAI
from tricorn.chat.agents.sse import endpoint
from tricorn.chat.settings import ChatSettings, Linger
from tricorn.errors.import_guard import Mode
from tricorn.listening.binds import PORT, check_bind, parse_bind
from tricorn.service.bind import show_bind
from tricorn.service.systemd import ALL
from tricorn.settings import Count, Rule, Seconds, SettingError, one_of, rules


class Secret:
    """A text that is shown nowhere: not by `repr`, in no error, and it has no JSON form."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "Secret(…)"

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.reveal() == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def reveal(self) -> str:
        """Return the text."""
        return self._text


HOST = Rule(description="an address or a host name", test=lambda value: isinstance(value, str) and value != "")

Host = Annotated[str, HOST]
Port = Annotated[int, PORT]


def _are_binds(value: object) -> bool:
    if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
        return False
    for each in value:
        if each != ALL:
            check_bind(each, "bind=")
    return True


Binds = Annotated[
    tuple[str, ...], Rule(description="a tuple of HOST:PORT, :PORT, unix:PATH, fd:N or fd://", test=_are_binds)
]
Bind = Annotated[
    tuple[str, int] | None,
    Rule(
        description="HOST:PORT, for example 127.0.0.1:9090",
        test=lambda value: (
            value is None
            or (isinstance(value, tuple) and len(value) == 2 and HOST.test(value[0]) and PORT.test(value[1]))
        ),
    ),
]
DEMO = "tricorn.chat.agents.demo:demo"
MODEL = "tricorn.chat.agents.model:Model"


def _is_endpoint(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(endpoint(value, ""))
    except ValueError:
        return False


AgentName = Annotated[str, Rule(description="module:function", test=HOST.test)]
Auth = Annotated[
    Literal["none"] | None,
    Rule(description="none, which lets everybody in, or not set", test=lambda value: value is None or value == "none"),
]
ImportGuard = Annotated[
    Mode, Rule(description="off, count, report or deny", test=one_of("off", "count", "report", "deny"))
]
Name = Annotated[
    str | None, Rule(description="a name that is not empty", test=lambda value: value is None or HOST.test(value))
]
BaseURL = Annotated[str, Rule(description="a URL like https://api.example.com/v1", test=_is_endpoint)]
Text = Annotated[str | None, Rule(description="text or nothing", test=lambda value: isinstance(value, str | None))]
Hidden = Annotated[
    Secret | None,
    Rule(
        description="a text that is not empty",
        test=lambda value: value is None or (isinstance(value, Secret) and bool(value)),
        parse=Secret,
        secret=True,
    ),
]


@dataclass(frozen=True, kw_only=True)
class ServiceSettings(ChatSettings):
    """What the service can be told, checked when it is made: raises `SettingError`.

    Times are in seconds, and `inf` means never; `heartbeat` has no `inf`.
    """

    host: Host = "127.0.0.1"
    """The address or host name to listen on. By default only this machine can connect."""

    port: Port = 8080
    """The port to listen on; 0 takes a free one."""

    bind: Binds = ()
    """What to listen on in place of `host` and `port`: HOST:PORT, :PORT for every address, unix:PATH, fd:N, fd://."""

    agent: AgentName = DEMO
    """The agent that answers, or what makes it when the server starts, as module:name."""

    model: Name = None
    """The language model that answers in place of an agent, by its name at `base_url`."""

    base_url: BaseURL = OPENAI
    """The endpoint of the model: any that speaks OpenAI's chat completions, without `/chat/completions`."""

    api_key: Hidden = None
    """The key of the endpoint, from `OPENAI_API_KEY`."""

    system_prompt: Name = None
    """A file with the model's system prompt, in UTF-8. It is read when the server starts."""

    history_characters: Count = HISTORY
    """Characters of the conversation so far that the model is told. A token has about four."""

    workers: Count = 1
    """Processes that serve, all on one port. Several need a log that they can share."""

    jwt_key: Hidden = None
    """The key that tokens are checked with: a secret, a PEM key, or a https: or file: URL.

    At the URL is one of these, or a JWKS. It is read again every `jwks_refresh` seconds.
    """

    jwks_refresh: Seconds = 300.0
    """Seconds between two readings of the keys at the URL of `jwt_key`."""

    jwt_audience: Text = None
    """The audience that a token must be made for (`aud`). If it is not set, a token must have none."""

    jwt_issuer: Text = None
    """The issuer that a token must be made by (`iss`). If it is not set, anybody with the key may be."""

    jwt_leeway: Linger = 10.0
    """Seconds by which the clocks of issuer and server may differ."""

    auth: Auth = None
    """`none` lets everybody in, from anywhere, without a token."""

    token: Hidden = None
    """The token that `tricorn chat` and `tricorn check` show to the server."""

    log: Hidden = Secret("sqlite:///tricorn.db")  # noqa: RUF009 (it cannot change)
    """Where conversations are kept: memory:, sqlite:///PATH, redis://… or postgresql://…"""

    metrics: Bind = None
    """Where /metrics is served, if anywhere: on an address of its own, since whoever gets there may read it."""

    import_guard: ImportGuard = "report"
    """What `tricorn serve` does about an import after start-up: see `tricorn.errors.import_guard.guarded`."""

    service: Text = None
    """The name of the service on Cloud Run."""

    revision: Text = None
    """The name of the service's revision on Cloud Run."""

    configuration: Text = None
    """The name of the configuration on Cloud Run that the revision was made from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jwt_key is not None and self.auth is not None:
            raise SettingError("auth=none: there is a jwt_key as well; only one of them can be meant")
        if self.model is not None and self.agent != DEMO:
            raise SettingError(f"model={self.model}: there is an agent as well; only one of them can answer")

    @property
    def answering(self) -> str:
        """What answers, as module:function."""
        return self.agent if self.model is None else MODEL

    @property
    def binds(self) -> tuple[str, ...]:
        """What to listen on."""
        return self.bind or (show_bind(self.host, self.port),)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = environ) -> Self:
        """Read `TRICORN_BIND` (`bind`, with spaces or commas between), `TRICORN_METRICS` (HOST:PORT), other
        `TRICORN_<FIELD>`, `OPENAI_API_KEY` (`api_key`), and what Cloud Run says.

        `K_SERVICE`, `K_REVISION` and `K_CONFIGURATION` name the service, and a service listens on every interface
        unless `TRICORN_HOST` says another. `PORT` is its port. `TRICORN_BIND` goes before all of these. Raises
        `SettingError`, also for a `TRICORN_` variable that does not exist: a misspelt setting must not pass for one
        that was made.
        """
        values: dict[str, Any] = {name: environ.get(f"K_{name.upper()}") for name in _OF_CLOUD_RUN}
        if "K_SERVICE" in environ:
            values["host"] = "0.0.0.0"  # noqa: S104 (a container has its own network)
        if environ.get(_API_KEY):
            values["api_key"] = rules(cls)["api_key"].read(f"{_API_KEY}=", environ[_API_KEY])
        if "PORT" in environ:
            values["port"] = PORT.read("PORT=", environ["PORT"])
        settable = {name.upper(): name for name in rules(cls) if name not in _NOT_VARIABLES}
        for variable, text in environ.items():
            if not variable.startswith(_PREFIX):
                continue
            name = variable.removeprefix(_PREFIX)
            if name == "BIND":
                values["bind"] = _binds(variable, text)
            elif name == "METRICS":
                values["metrics"] = parse_bind(text, f"{variable}=")
            elif field := settable.get(name):
                values[field] = rules(cls)[field].read(f"{variable}=", text)
            else:
                raise SettingError(f"{variable}: no such setting; {_nearest(name, sorted(['BIND', *settable]))}")
        return cls(**values)

    def shown_token(self) -> str | None:
        """Return the token that clients show. Raises `SettingError` if it cannot be one."""
        token = None if self.token is None else self.token.reveal()
        if token is not None and not (token.isascii() and token.isprintable()):
            raise SettingError("TRICORN_TOKEN: must be a token, as `tricorn token` makes it")
        return token


_PREFIX = "TRICORN_"
_OF_CLOUD_RUN = ("service", "revision", "configuration")
_API_KEY = "OPENAI_API_KEY"
_NOT_VARIABLES = {"api_key", "bind", "port", *_OF_CLOUD_RUN}


def _binds(variable: str, text: str) -> tuple[str, ...]:
    binds = tuple(text.replace(",", " ").split()) or (text,)
    for each in binds:
        if each != ALL:
            check_bind(each, f"{variable}=")
    return binds


def _nearest(name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f"did you mean {_PREFIX}{near[0]}?" if near else f"there are {', '.join(_PREFIX + each for each in names)}"
