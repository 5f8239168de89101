"""Every setting, and the one place where the environment is read."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from math import inf
from os import environ
from typing import Annotated, Any, Literal, Self

from msgspec import Meta, Struct, ValidationError, convert
from msgspec.structs import fields

from tricorn.protocol.origin import check_pattern

Seconds = Annotated[float, Meta(gt=0, description="a number of seconds above 0")]
Linger = Annotated[float, Meta(ge=0, description="a number of seconds, 0 or more")]
# JSON has no infinity, and the heartbeat is told to every client.
Heartbeat = Annotated[float, Meta(gt=0, le=3600, description="a number of seconds above 0, at most 3600")]
Count = Annotated[int, Meta(ge=1, description="a whole number above 0")]
Limit = Annotated[float, Meta(ge=1, description="a number, 1 or more, or inf")]
EventBytes = Annotated[int, Meta(ge=4096, description="a whole number, 4096 or more")]
Port = Annotated[int, Meta(ge=0, le=65535, description="a whole number from 0 to 65535")]
Host = Annotated[str, Meta(min_length=1, description="an address or a host name")]
ImportGuard = Annotated[Literal["off", "count", "report", "deny"], Meta(description="off, count, report or deny")]
Deflate = Annotated[Literal["off", "takeover", "no-takeover"], Meta(description="off, takeover or no-takeover")]
Bind = Annotated[tuple[Host, Port] | None, Meta(description="HOST:PORT, for example 127.0.0.1:9090")]
AgentName = Annotated[str, Meta(min_length=1, description="module:function")]
Auth = Annotated[Literal["none"] | None, Meta(description="none, which lets everybody in, or not set")]
Origins = Annotated[tuple[str, ...], Meta(description="origins like https://example.org, or *")]


class Secret:
    """A text that is shown nowhere: not by `repr`, in no error, and it has no JSON form."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "Secret(…)"

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def reveal(self) -> str:
        """The text."""
        return self._text


Hidden = Annotated[Secret | None, Meta(description="a text that is not empty")]


class SettingError(ValueError):
    """A setting cannot be used. The text is one line: which setting, its value, and what would be right."""


class Settings(Struct, frozen=True, kw_only=True):
    """Everything that can be set, checked when it is made: raises `SettingError`.

    Times are in seconds, and `inf` means never; `heartbeat` has no `inf`.
    """

    # Where to listen; port 0 takes a free one.
    host: Host = "127.0.0.1"
    port: Port = 8080
    # The agent of the chat, as module:function.
    agent: AgentName = "tricorn.chat.agents.demo:demo"
    # Processes that serve, all on one port. More than one need a log that they can share.
    workers: Count = 1

    # Who may come in. The key that tokens are checked with: a secret, a PEM key, or a https: or file: URL where one of
    # these or a JWKS is, which is read again every `jwks_refresh` seconds.
    jwt_key: Hidden = None
    jwks_refresh: Seconds = 300.0
    # Who a token must be made for (`aud`) and by (`iss`).
    jwt_audience: str | None = None
    jwt_issuer: str | None = None
    # How far the clocks of issuer and server may be apart.
    jwt_leeway: Linger = 10.0
    # "none" lets everybody in, from anywhere, without a token.
    auth: Auth = None
    # How long a client may take to show its token.
    auth_timeout: Seconds = 10.0
    # Pages of which other origins may connect: patterns as `tricorn.protocol.origin` has them.
    origins: Origins = ()
    # What `tricorn chat` shows to the server.
    token: Hidden = None

    # A connection: from accepting it to the end of its handshake.
    handshake_timeout: Seconds = 10.0
    # From the end of a connection to its socket being closed, whatever the peer does.
    close_timeout: Seconds = 2.0
    # How long a peer may read nothing while something is being sent to it.
    stall_timeout: Seconds = 30.0
    # Between two pings, and from a ping to its pong.
    ping_interval: Seconds = 20.0
    ping_timeout: Seconds = 20.0
    # From SIGTERM to the exit; longer than close_timeout, and Cloud Run kills after 10.
    drain_timeout: Seconds = 8.0

    # The chat: how long a run may take.
    run_timeout: Seconds = 300.0
    # Where conversations are kept: memory:, sqlite:///PATH, redis://… or postgresql://…
    log: Hidden = Secret("sqlite:///tricorn.db")
    # How long a run of an instance that died keeps others from answering in its conversation.
    lease: Seconds = 15.0
    # How long the log may take to do what it is asked.
    log_timeout: Seconds = 10.0
    # What the log may forget: all but so many events of a conversation, and what is older than so many seconds.
    retention_events: Limit = inf
    retention_seconds: Seconds = inf
    # How long a conversation, and what is being answered in it, goes on with nobody attached.
    linger: Linger = 30.0
    # Between two messages to a client that has nothing else to hear.
    heartbeat: Heartbeat = 20.0

    # WebSockets of the whole server.
    max_connections: Count = 10000
    # Sockets of one peer address: behind a proxy all have the proxy's.
    peer_connections: Limit = inf
    # Sockets whose request head has not come yet.
    max_handshakes: Count = 1000
    # Bytes of an HTTP request head, and of one WebSocket message.
    max_head_bytes: Count = 16384
    max_message_bytes: Count = 1048576
    # Compression of messages: none, with what went before remembered, or each message by itself.
    deflate: Deflate = "off"
    # What one connection may send; of both, ten seconds' worth may come at once.
    messages_per_second: Limit = 10000
    bytes_per_second: Limit = 67108864
    # Characters (Unicode code points) of one post.
    text_characters: Count = 32000
    # Conversations that one connection may have open.
    open_conversations: Count = 100
    # Connections of one user, and runs, waiting or going on, that a user's posts have led to.
    user_connections: Count = 20
    user_runs: Count = 20
    # Posts of one user in a minute; so many may also come at once.
    posts_per_minute: Count = 60
    # Posts that may wait in one conversation.
    waiting_posts: Count = 50
    # Replies that may wait for one client to read.
    outbox: Count = 256
    # Bytes of one event as it is sent: the agent's pieces of text, and what goes into its tools and comes out of them.
    event_bytes: EventBytes = 262144

    # Where /metrics is served, if it is to be: apart from everything else, since whoever gets there may read it.
    metrics: Bind = None

    # What `tricorn serve` does about an import after start-up: see `tricorn.errors.import_guard.guarded`.
    import_guard: ImportGuard = "report"

    # Cloud Run: the names of the service, of its revision, and of the configuration that this was made from.
    service: str | None = None
    revision: str | None = None
    configuration: str | None = None

    def __post_init__(self) -> None:
        for field in fields(Settings):
            _checked(field.name, getattr(self, field.name), field.type, strict=True)
        for origin in self.origins:
            try:
                check_pattern(origin)
            except ValueError as error:
                raise SettingError(f"origins={_shown(origin)}: {error}") from None
        if self.jwt_key is not None and self.auth is not None:
            raise SettingError("auth=none: there is a jwt_key as well; only one of them can be meant")
        if self.close_timeout >= self.drain_timeout:
            raise SettingError(
                f"close_timeout={self.close_timeout}: must be less than drain_timeout, which is {self.drain_timeout}"
            )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = environ) -> Self:
        """Read `TRICORN_BIND` and `TRICORN_METRICS` (HOST:PORT), `TRICORN_<FIELD>` else, and what Cloud Run says.

        `K_SERVICE`, `K_REVISION` and `K_CONFIGURATION` name the service, and a service listens on every interface
        unless `TRICORN_HOST` says another. `PORT` is its port. `TRICORN_BIND` goes before all of these. Raises
        `SettingError`, also for a `TRICORN_` variable that does not exist: a misspelt setting must not pass for one
        that was made.
        """
        values: dict[str, Any] = {name: environ.get(f"K_{name.upper()}") for name in _OF_CLOUD_RUN}
        if "K_SERVICE" in environ:
            values["host"] = "0.0.0.0"  # noqa: S104 (a container has its own network)
        if "PORT" in environ:
            values["port"] = _checked("PORT", environ["PORT"], Port, strict=False)
        bind = None
        settable = {field.name.upper(): field for field in fields(cls) if field.name not in _NOT_VARIABLES}
        for variable, text in environ.items():
            if not variable.startswith(_PREFIX):
                continue
            name = variable.removeprefix(_PREFIX)
            if name == "BIND":
                bind = parse_bind(text, f"{variable}=")
            elif name == "METRICS":
                values["metrics"] = parse_bind(text, f"{variable}=")
            elif field := settable.get(name):
                value: object = text
                if field.type is Origins:
                    value = text.replace(",", " ").split()
                elif field.type is Hidden:
                    value = Secret(text)
                values[field.name] = _checked(variable, value, field.type, strict=False)
            else:
                raise SettingError(f"{variable}: no such setting; {_nearest(name, ['BIND', *settable])}")
        if bind is not None:
            values["host"], values["port"] = bind
        return cls(**values)


def parse_bind(text: str, label: str = "") -> tuple[str, int]:
    """Split `HOST:PORT` into host and port. An IPv6 address stands in brackets: `[::1]:8080`.

    There is no default host: whether `:8080` means this machine or the whole network differs from program to program.
    Raises `SettingError`; its text begins with `label` and the text given.
    """
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or not bare.isprintable() or not {" ", "/"}.isdisjoint(bare):
        raise SettingError(f"{label}{_shown(text)}: must be HOST:PORT, for example 127.0.0.1:8080")
    if host != (f"[{bare}]" if ":" in bare else bare):
        raise SettingError(f"{label}{_shown(text)}: an IPv6 address, and only that, has brackets: [::1]:8080")
    try:
        return bare, convert(port, Port, strict=False)
    except ValidationError:
        raise SettingError(f"{label}{_shown(text)}: the port must be a whole number from 0 to 65535") from None


def parse_count(text: str, label: str) -> int:
    """Read a whole number above 0. Raises `SettingError`; its text begins with `label` and the text given."""
    try:
        return convert(text, Count, strict=False)
    except ValidationError:
        raise SettingError(f"{label}{_shown(text)}: must be {_description(Count)}") from None


_PREFIX = "TRICORN_"
_OF_CLOUD_RUN = ("service", "revision", "configuration")
_NOT_VARIABLES = {"port", *_OF_CLOUD_RUN}


def _checked(name: str, value: object, kind: Any, *, strict: bool) -> Any:
    """Return `value` as `kind`, made from text unless `strict`."""
    try:
        return convert(value, kind, strict=strict, dec_hook=_secret)
    except ValidationError:
        label = name if kind is Hidden else f"{name}={_shown(value)}"
        raise SettingError(f"{label}: must be {_description(kind)}") from None


def _secret(_: type, value: object) -> Secret:
    if not isinstance(value, Secret) or not value:
        raise ValueError("no secret")
    return value


def _description(kind: Any) -> str:
    return next((meta.description for meta in getattr(kind, "__metadata__", ())), "text or nothing")


def _shown(value: object) -> str:
    text = str(value)
    return text if text.isprintable() else repr(text)


def _nearest(name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f"did you mean {_PREFIX}{near[0]}?" if near else f"there are {', '.join(_PREFIX + each for each in names)}"
