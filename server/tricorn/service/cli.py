"""The command line: `tricorn serve`, `chat`, `token`, `audit` and `drill`.

Exit status 2 is for what was asked wrongly, 1 for what then went wrong. Both come with one line on stderr.
"""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from importlib import import_module
from inspect import iscoroutinefunction, signature
from os.path import basename
from pathlib import Path
from secrets import token_hex
from socket import socket as Socket
from time import perf_counter, process_time, time
from traceback import extract_tb
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import msgspec
import trio

from tricorn.chat import Agent, Chat
from tricorn.chat.client.connect import what_failed
from tricorn.chat.client.terminal import INTERRUPTED, chat, websocket_url
from tricorn.chat.identity import Everybody, Gate, ThisMachine
from tricorn.chat.logs import connect as connect_log
from tricorn.chat.logs.base import Log, Unavailable
from tricorn.chat.protocol import SUBPROTOCOLS, Id
from tricorn.errors.audit import Finding, audit, defines, locate, python_files
from tricorn.errors.import_guard import guarded
from tricorn.errors.report import report, send_records
from tricorn.listening.accept import Address, listen
from tricorn.server import Server, serve_until_signal, settle
from tricorn.service.auth import Tokens, check_exposure, make_token
from tricorn.service.drill import drill
from tricorn.service.hypercorn_config import load_config
from tricorn.service.jwt_keys import Keys, load, parse_for_signing
from tricorn.service.metrics_page import app as metrics_app
from tricorn.service.metrics_page import application, no_websocket
from tricorn.service.pages import pages
from tricorn.service.workers import Supervisor, Worker, reserve
from tricorn.settings import Secret, SettingError, Settings, parse_bind, parse_count

if TYPE_CHECKING:
    from hypercorn.config import Config

    from tricorn.listening.http import ASGIApp


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's own) asks for, and return the exit status."""
    if sys.__stderr__ is None:
        _open_stderr()
    if argv is None:
        argv = sys.argv[1:]
    arguments = _parser().parse_args(argv, Namespace(argv=argv))
    command: Callable[[Namespace], int] = arguments.command
    try:
        return command(arguments)
    except SettingError as error:
        problem = str(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    print(f"tricorn: {problem}", file=sys.stderr)
    return 2


def _open_stderr() -> None:
    """Have descriptor 2 be /dev/null: closed, it would become that of the next socket, which then got our reports."""
    while os.open(os.devnull, os.O_WRONLY) < 2:
        pass


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="tricorn", description="Chat with agents over WebSockets.")
    commands = parser.add_subparsers(required=True, metavar="serve | chat | token | audit | drill")

    serve = commands.add_parser("serve", help="serve the chat", description="Serve the chat until SIGTERM or Ctrl-C.")
    serve.set_defaults(command=_serve_command)
    serve.add_argument("--bind", metavar="HOST:PORT", help="where to listen; port 0 picks one (127.0.0.1:8080)")
    serve.add_argument("--agent", metavar="MODULE:FUNCTION", help="the agent that answers (the demo agent)")
    serve.add_argument(
        "--audit",
        choices=["strict", "warn", "off"],
        default="warn",
        help="what to do where the agent breaks a rule of the error path; strict does not serve it (%(default)s)",
    )
    serve.add_argument("--workers", metavar="N", help="how many processes serve; several need a shared log (1)")
    serve.add_argument("--worker", metavar="DESCRIPTORS", help=SUPPRESS)  # what a supervisor starts
    serve.add_argument("--log", metavar="URL", help="where conversations are kept (sqlite:///tricorn.db)")
    serve.add_argument("--config", metavar="FILE", help="options of Hypercorn's, for TLS and HTTP: a TOML file")
    serve.add_argument("--auth", choices=["none"], help="none: let everybody in, without a token")

    client = commands.add_parser("chat", help="chat in this terminal", description="Chat in this terminal.")
    client.set_defaults(command=_chat_command)
    client.add_argument(
        "url", metavar="URL", nargs="?", default="ws://127.0.0.1:8080/ws", help="where it is served (%(default)s)"
    )
    client.add_argument("--json", action="store_true", help="write the events as they come, one a line")
    client.add_argument("--message", metavar="TEXT", help="post this, wait for the run; exit 0 if it was a success")
    client.add_argument("--conversation", metavar="ID", default=token_hex(8), help="join this one (a new one)")

    token = commands.add_parser("token", help="make a token", description="Make a token with the key TRICORN_JWT_KEY.")
    token.set_defaults(command=_token_command)
    token.add_argument("--user", metavar="NAME", required=True, help="whose it is")
    token.add_argument("--ttl", metavar="TIME", default="1h", help="how long it is good, like 90s, 15m, 1h, 7d (1h)")
    token.add_argument(
        "--share",
        metavar="PATTERN",
        action="append",
        default=[],
        help="opens the shared conversations like team-*, too",
    )

    auditor = commands.add_parser(
        "audit",
        help="audit the error path of an agent",
        description="Prove the rules of the error path on source, and exit with 1 where one is broken.",
    )
    auditor.set_defaults(command=_audit_command)
    auditor.add_argument(
        "targets",
        metavar="MODULE:FUNCTION | PATH",
        nargs="*",
        help="an agent, a file or a directory (the agent that would be served)",
    )
    auditor.add_argument("--json", action="store_true", help="write the findings as JSON, one a line")

    drill = commands.add_parser(
        "drill",
        help="rehearse what serving needs",
        description="Start up as serve does, serve nobody, say what that loads and how long it takes (imports: CPU).",
    )
    drill.set_defaults(command=_drill_command)
    drill.add_argument("--agent", metavar="MODULE:FUNCTION", help="the agent to load (the demo agent)")
    return parser


def _chat_command(arguments: Namespace) -> int:
    url = websocket_url(arguments.url)
    try:
        conversation = msgspec.convert(arguments.conversation, Id)
    except msgspec.ValidationError:
        raise SettingError("--conversation: must be 1 to 128 letters, digits, or any of . _ : ~ -") from None
    token = Settings.from_environ().token
    if token is not None and not (token.reveal().isascii() and token.reveal().isprintable()):
        raise SettingError("TRICORN_TOKEN: must be a token, as `tricorn token` makes it")
    return trio.run(
        partial(chat, url, conversation=conversation, message=arguments.message, raw=arguments.json, token=token)
    )


def _token_command(arguments: Namespace) -> int:
    settings = Settings.from_environ()
    ttl = _seconds(arguments.ttl)
    if settings.jwt_key is None:
        raise SettingError("TRICORN_JWT_KEY: must be set, as the server has it or with the private key to the server's")
    try:
        key = parse_for_signing(settings.jwt_key.reveal())
    except ValueError as error:
        raise SettingError(f"TRICORN_JWT_KEY: {error}") from None
    print(make_token(key, arguments.user, time(), ttl, settings, tuple(arguments.share)))
    return 0


def _seconds(text: str) -> int:
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdecimal() and len(number) < 9 and int(number) and unit in SECONDS):
        raise SettingError(f"--ttl {text}: must be a time like 90s, 15m, 1h or 7d")
    return int(number) * SECONDS[unit]


SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _serve_command(arguments: Namespace) -> int:
    send_records("stderr", "INFO")  # before the agent is imported, which may choose otherwise
    settings = _settings(arguments)
    if arguments.bind is not None:
        host, port = parse_bind(arguments.bind, "--bind ")
        settings = msgspec.structs.replace(settings, host=host, port=port)
    if arguments.auth is not None:
        settings = msgspec.structs.replace(settings, auth=arguments.auth)
    if arguments.log is not None:
        settings = msgspec.structs.replace(settings, log=Secret(arguments.log))
    if arguments.workers is not None:
        settings = msgspec.structs.replace(settings, workers=parse_count(arguments.workers, "--workers "))
    check_exposure(settings)
    log = open_log(settings)
    config = None if arguments.config is None else load_config(arguments.config)
    if arguments.worker is None and settings.workers > 1:
        check_shared(log, settings.workers, "--workers")
        if arguments.audit != "off":
            _audit_agent(settings.agent, strict=arguments.audit == "strict")
        command = [sys.executable, "-m", "tricorn", *arguments.argv, "--audit", "off"]
        return trio.run(_supervise, command, settings, config)
    agent = load_agent(settings.agent)
    if arguments.audit != "off":
        _audit_agent(settings.agent, strict=arguments.audit == "strict")
    worker = None if arguments.worker is None else Worker(arguments.worker)
    return trio.run(_serve, agent, settings, log, config, worker)


def open_log(settings: Settings) -> Log:
    """The log that the settings name, not entered yet. Raises `SettingError` where there is none of that name."""
    return connect_log(settings.log.reveal() if settings.log else "memory:", settings)


def check_shared(log: Log, workers: int, option: str) -> None:
    """Raise `SettingError` where so many workers would have a log each, and clients no way back to their own."""
    if workers > 1 and not log.shared:
        raise SettingError(
            f"{option} {workers}: workers need a log that they can share, redis:// or postgresql://; "
            "without one there must be 1"
        )


def _audit_agent(name: str, strict: bool) -> None:
    problem = f"--agent {name}: breaks rules of the error path, and --audit is strict"
    try:
        lines = [str(finding) for finding in _audit([name])]
    except SettingError as error:
        problem = str(error)
        lines = [] if strict else [problem]
    else:
        strict = strict and bool(lines)
    for line in lines:
        print(f"tricorn: {line}", file=sys.stderr)
    if strict:
        raise SettingError(problem)


def _audit_command(arguments: Namespace) -> int:
    sys.path.insert(0, os.getcwd())
    findings = _audit(arguments.targets or [Settings.from_environ().agent])
    for finding in findings:
        print(msgspec.json.encode(finding._asdict()).decode() if arguments.json else finding)
    return 1 if findings else 0


def _audit(targets: Sequence[str]) -> list[Finding]:
    try:
        return audit([file for target in targets for file in _sources(target)])
    except SettingError:
        raise
    except (SyntaxError, ValueError, OSError, RecursionError) as error:
        raise SettingError(f"cannot audit: {' '.join(str(error).split())}") from None


def _sources(target: str) -> list[Path]:
    """The files that a target of the audit names."""
    path = Path(target)
    if path.is_file():
        return [path]
    if path.is_dir():
        if files := python_files(path):
            return files
        raise SettingError(f"audit {target}: there is no Python file in this directory")
    if ":" not in target:
        raise SettingError(f"audit {target}: there is no such file or directory")
    module_name, function = _agent_name(target)
    file = locate(module_name)
    if file is None:
        raise _agent_error(target, f"there is no source of {module_name} in this directory or installed")
    if not defines(file, function.partition(".")[0]):
        raise _agent_error(target, f"there is no {function} in {module_name}")
    return [file]


def _settings(arguments: Namespace) -> Settings:
    """What the environment and `--agent` say. The agent is looked for in the current directory too."""
    sys.path.insert(0, os.getcwd())
    settings = Settings.from_environ()
    return settings if arguments.agent is None else msgspec.structs.replace(settings, agent=arguments.agent)


async def _serve(agent: Agent, settings: Settings, log: Log, config: Config | None, worker: Worker | None) -> int:
    try:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(log)
            return await _serve_chat(agent, settings, log, config, worker)
    except* Unavailable as errors:
        problem = errors.exceptions[0]
    print(f"tricorn: {problem}", file=sys.stderr)
    return 1


async def _serve_chat(agent: Agent, settings: Settings, log: Log, config: Config | None, worker: Worker | None) -> int:
    keys, gate = await make_gate(settings)
    listeners = [] if worker is not None else await _bound(listen, settings.host, settings.port, "--bind ")
    metrics = await _listen_for_metrics(settings) if worker is None else []
    await drill()
    settle()
    with guarded(settings.import_guard):
        async with trio.open_nursery() as support:
            support.start_soon(keys.stay_fresh)
            await _show_metrics(support, metrics, metrics_app, settings)
            async with Chat(agent, settings=settings, log=log, gate=gate) as chats, trio.open_nursery() as nursery:
                serve = partial(
                    serve_until_signal,
                    chats.session,
                    listeners if worker is None else worker.listen(),
                    settings=settings,
                    subprotocols=SUBPROTOCOLS,
                    path="/ws",
                    app=pages(chats.why_not_ready),
                    drain=chats.drain,
                    config=config,
                )
                addresses = await nursery.start(serve)
                if worker is None:
                    _say_where(settings, config, addresses)
                else:
                    support.start_soon(worker.obey)
            support.cancel_scope.cancel()
    return 0


async def _supervise(command: Sequence[str], settings: Settings, config: Config | None) -> int:
    reserved = await _bound(reserve, settings.host, settings.port, "--bind ")
    metrics = await _listen_for_metrics(settings)
    await drill()
    with guarded(settings.import_guard):
        async with trio.open_nursery() as support:
            supervisor = Supervisor(command, settings.workers, reserved, drain_timeout=settings.drain_timeout)
            await _show_metrics(support, metrics, application(supervisor.scrape), settings)
            status = await supervisor.run(partial(_say_where, settings, config))
            support.cancel_scope.cancel()
    return status


def _say_where(settings: Settings, config: Config | None, addresses: Sequence[Address]) -> None:
    scheme = "http" if config is None or not config.ssl_enabled else "https"
    print(f"Tricorn is listening on {scheme}://{_address(*addresses[0])}", flush=True)
    if settings.service is not None:
        report(
            "INFO",
            "an instance has started",
            service=settings.service,
            revision=settings.revision,
            configuration=settings.configuration,
        )


async def _listen_for_metrics(settings: Settings) -> list[Socket]:
    return [] if settings.metrics is None else await _bound(listen, *settings.metrics, "TRICORN_METRICS=")


async def _show_metrics(nursery: trio.Nursery, listeners: list[Socket], show: ASGIApp, settings: Settings) -> None:
    if listeners:
        exposing = Server(no_websocket, settings=settings, app=show)
        addresses = await nursery.start(exposing.serve, listeners)
        print(f"Metrics are at http://{_address(*addresses[0])}/metrics", flush=True)


async def _bound(bind: Callable[[int, str], Awaitable[list[Socket]]], host: str, port: int, label: str) -> list[Socket]:
    try:
        return await bind(port, host)
    except OSError as error:
        raise SettingError(f"{label}{_address(host, port)}: {what_failed(error)}") from None


async def make_gate(settings: Settings) -> tuple[Keys, Gate]:
    if settings.jwt_key is None:
        return Keys(()), ThisMachine() if settings.auth is None else Everybody()
    keys = await load(settings.jwt_key.reveal(), settings.jwks_refresh)
    return keys, Tokens(keys, settings)


def _drill_command(arguments: Namespace) -> int:
    settings = _settings(arguments)
    _print_step("imports", process_time(), sys.modules)  # in CPU time: who began to import had no clock yet
    with _timed_step("agent"):
        load_agent(settings.agent)
    with _timed_step("drill"):
        trio.run(drill)
    return 0


@contextmanager
def _timed_step(name: str) -> Iterator[None]:
    began, known = perf_counter(), set(sys.modules)
    yield
    seconds, loaded = perf_counter() - began, sorted(set(sys.modules) - known)
    _print_step(name, seconds, loaded)
    for module in loaded:
        print(f"  {module}")


def _print_step(name: str, seconds: float, modules: Collection[str]) -> None:
    print(f"{name:7} {seconds:6.3f} s {len(modules):4} module{'' if len(modules) == 1 else 's'}")


def load_agent(name: str) -> Agent:
    """Import the agent that `name` (module:function) names. Raises `SettingError` that says what is wrong with it.

    An agent is anything async that can be called with one argument: a function, a partial one, an object.
    """
    module_name, path = _agent_name(name)
    agent: Any = _import(name, module_name)
    for part in path.split("."):
        agent = getattr(agent, part, None)
    takes = f"must be an async function of one parameter, like: async def {path}(run)"
    if agent is None:
        raise _agent_error(name, f"there is no {path} in {module_name}")
    if not callable(agent):
        raise _agent_error(name, f"is of type {type(agent).__name__}; {takes}")
    if not iscoroutinefunction(agent) and not iscoroutinefunction(type(agent).__call__):
        raise _agent_error(name, f"is not async; {takes}")
    try:
        signature(agent).bind(None)
    except TypeError:
        raise _agent_error(name, f"takes {signature(agent)}; {takes}") from None
    return cast(Agent, agent)


def _agent_name(name: str) -> tuple[str, str]:
    module_name, _, path = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")]):
        raise _agent_error(name, "must be module:function, for example tricorn.chat.agents.demo:demo")
    return module_name, path


def _import(name: str, module_name: str) -> ModuleType:
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        # What is missing may be the module itself, a package it should be in, or something that it imports.
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise _agent_error(name, f"there is no module {error.name} in this directory or installed") from None
        raise _agent_error(name, _what_it_raised(module_name, error)) from None
    except (Exception, SystemExit) as error:
        raise _agent_error(name, _what_it_raised(module_name, error)) from None


def _what_it_raised(module_name: str, error: BaseException) -> str:
    shown = " ".join(f"{type(error).__name__}: {error}".split())
    if not isinstance(error, SyntaxError):  # which says itself where it is
        place = extract_tb(error.__traceback__)[-1]
        shown += f" ({basename(place.filename)}, line {place.lineno})"
    return f"importing {module_name} raised {shown}"


def _agent_error(name: str, problem: str) -> SettingError:
    return SettingError(f"--agent {name}: {problem}")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
