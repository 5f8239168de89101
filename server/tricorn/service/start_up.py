"""The composition root: what `tricorn serve`, its workers and `tricorn.asgi:app` are made of, and in which order.

The order is: address, keys, gate, log, drill, the agent's resources, import guard, chat. Under Hypercorn and in a
worker the address is there before this begins, so it comes first in the other case too.
"""

from __future__ import annotations

import gc
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING

import trio

from tricorn.chat import SUBPROTOCOLS, Chat, close_codes
from tricorn.chat.agents.model import OPENAI, Model
from tricorn.chat.identity import Everybody, ThisMachine
from tricorn.chat.logs import connect
from tricorn.chat.metrics import ChatMetrics
from tricorn.errors.import_guard import guarded
from tricorn.errors.last_resort import LastResort, exit_in_time
from tricorn.errors.report import report
from tricorn.errors.streams import recorded
from tricorn.listening.binds import BACKLOG, listen_on
from tricorn.listening.site import Site
from tricorn.metrics import Metrics, ProcessMetrics, ServerMetrics, total
from tricorn.server import Server, serve_until_signal
from tricorn.service.auth import Tokens
from tricorn.service.bind import bind_or_explain, show_address, show_bind, show_urls
from tricorn.service.chat_drill import drill_chat
from tricorn.service.jwt_keys import Keys, load
from tricorn.service.lifespan import living
from tricorn.service.loader import load_agent
from tricorn.service.metrics_page import metrics_page, no_websocket, of_this_process
from tricorn.service.pages import pages
from tricorn.service.systemd import notify
from tricorn.service.workers import Supervisor, reserve
from tricorn.settings import SettingError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
    from socket import socket as Socket

    from hypercorn.config import Config

    from tricorn.chat import Agent
    from tricorn.chat.identity import Gate
    from tricorn.chat.logs.base import Log
    from tricorn.listening.binds import Address
    from tricorn.listening.http import ASGIApp
    from tricorn.service.loader import AgentFactory
    from tricorn.service.settings import ServiceSettings
    from tricorn.service.source_watch import SourceWatch
    from tricorn.service.workers import Worker

    Say = Callable[[str], None]  # how to tell whoever started it, in a line

# For `gc.set_threshold`. What a connection is made of lives long: at Python's own threshold of 700 objects, looking at
# it again and again is a third of what very many connections cost.
COLLECT = 10_000, 20, 20


def make_log(settings: ServiceSettings) -> Log:
    """Make the log that the settings name, without opening it. Raises `SettingError` if there is none of that name."""
    return connect(settings.log.reveal() if settings.log else "memory:", settings)


def make_agent(settings: ServiceSettings) -> Agent | AgentFactory:
    """Make the agent that the settings name. Raises `SettingError` if it, its key or its prompt cannot be used."""
    if settings.model is None:
        return load_agent(settings.agent)
    if settings.api_key is None and settings.base_url == OPENAI:
        raise SettingError(f"OPENAI_API_KEY: must be set, because {OPENAI} asks for a key")
    system = _read_prompt(settings.system_prompt) if settings.system_prompt else ""
    try:
        return Model(
            settings.model,
            base_url=settings.base_url,
            api_key=settings.api_key.reveal() if settings.api_key else "",
            system=system,
            history_characters=settings.history_characters,
        )
    except ValueError as error:
        raise SettingError(f"OPENAI_API_KEY: {error}") from None


def _read_prompt(file: str) -> str:
    try:
        return Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise SettingError(f"system_prompt={file}: cannot be read: {problem}") from None


def check_shared(log: Log, processes: str) -> None:
    """Raise `SettingError` if the log cannot be shared by `processes`, as somebody asked for them.

    Each would have a log of its own, and a client that comes back may get another process.
    """
    if not log.shared:
        raise SettingError(
            f"{processes}: workers need a log that they can share, redis:// or postgresql://; "
            "without one there must be 1"
        )


@asynccontextmanager
async def start_chat(
    agent: Agent | AgentFactory, settings: ServiceSettings, log: Log, keys: Keys
) -> AsyncGenerator[Chat]:
    """Start all that a chat needs, in order, and the chat; `async with` ends it in the opposite order.

    Raises:
        Unavailable: the log cannot be opened; maybe in an ExceptionGroup.
        ExceptionGroup: the drill failed.
        AgentFailed: what the agent needs could not be opened.
        SettingError: what should make an agent does not.
    """
    gate = _make_gate(settings, keys)
    async with log:
        await drill_chat()
        async with living(agent, settings.close_timeout) as life:
            with guarded(settings.import_guard):
                async with trio.open_nursery() as support:
                    support.start_soon(keys.stay_fresh)
                    async with Chat(life.agent, settings=settings, log=log, gate=gate) as chat:
                        yield chat
                    support.cancel_scope.cancel()
            life.leave_by = chat.drain_by


async def serve(
    agent: Agent | AgentFactory,
    settings: ServiceSettings,
    log: Log,
    *,
    config: Config | None = None,
    worker: Worker | None = None,
    say: Say,
) -> None:
    """Serve the chat until SIGTERM or SIGINT, as the only process or as a worker. Either may come while it starts.

    Raises as `start_chat` does, and `SettingError` if an address cannot be listened on.
    """
    listeners = [] if worker is not None else await bind_or_explain(_listen, settings.binds)
    for_metrics = [] if worker is not None else await _listen_for_metrics(settings)
    keys = await read_keys(settings)
    async with (
        exit_in_time(settings.drain_timeout) as last_resort,
        _cancelled_by_signal(last_resort),
        start_chat(agent, settings, log, keys) as chat,
    ):
        settle()
        with recorded():
            await _serve_chat(chat, keys, settings, listeners, for_metrics, config, worker, say, last_resort)


@asynccontextmanager
async def _cancelled_by_signal(last_resort: LastResort) -> AsyncGenerator[None]:
    """Cancel the block at SIGTERM or SIGINT, but for what in it obeys them itself.

    An Exception that the block raises passes as it is, not in a group.
    """
    failure: Exception | None = None
    with trio.open_signal_receiver(SIGTERM, SIGINT) as signals:
        last_resort.watch_signals()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_at, signals, nursery.cancel_scope)
            try:
                yield
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _cancel_at(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


async def _serve_chat(
    chat: Chat,
    keys: Keys,
    settings: ServiceSettings,
    listeners: list[Socket],
    for_metrics: list[Socket],
    config: Config | None,
    worker: Worker | None,
    say: Say,
    last_resort: LastResort,
) -> None:
    async def drain() -> None:
        if worker is None:
            notify("STOPPING=1")
        await chat.drain()

    server = Server(
        Site({"/ws": chat.session}, settings, subprotocols=SUBPROTOCOLS),
        listeners if worker is None else worker.listen(),
        app=pages(chat.why_not_ready),
        drain=drain,
        config=config,
    )
    for code in close_codes.KNOWN:
        server.metrics.know_code(code)
    counted: list[Metrics] = [server.metrics, chat.metrics, ProcessMetrics()]
    async with trio.open_nursery() as support:
        await _show_metrics(support, for_metrics, metrics_page(counted, of_this_process(counted)), settings, say)
        async with trio.open_nursery() as serving:
            await serving.start(partial(serve_until_signal, server, last_resort, reload=keys.refresh))
            if worker is None:
                _announce(settings, config, say, server.addresses)
            else:
                support.start_soon(worker.obey, lambda: total(each.numbers() for each in counted))
        support.cancel_scope.cancel()


async def supervise(
    command: Sequence[str],
    settings: ServiceSettings,
    *,
    config: Config | None,
    read_config: Callable[[], object],
    watch: SourceWatch | None = None,
    say: Say,
) -> int:
    """Have workers serve, each of them started with `command`, and return the exit status: see `Supervisor.run`.

    At SIGHUP, and when something changes that `watch` sees, workers are replaced if `read_config` raises no
    `SettingError` and the keys can be read. With `watch`, clients that come while no worker serves wait for the next.

    Raises `SettingError` if an address cannot be listened on, and ExceptionGroup if the drill failed.
    """

    async def check() -> None:
        read_config()
        await read_keys(settings)

    reserved = await bind_or_explain(reserve, settings.binds)
    if watch is not None:
        for each in reserved:
            each.listen(BACKLOG)
    for_metrics = await _listen_for_metrics(settings)
    await drill_chat()
    with guarded(settings.import_guard):
        async with trio.open_nursery() as support:
            process = ProcessMetrics()
            supervisor = Supervisor(
                command,
                settings.workers,
                reserved,
                drain_timeout=settings.drain_timeout,
                counted=[process],
                ending=partial(notify, "STOPPING=1"),
                check=check,
                changed=None if watch is None else watch.changed,
            )
            described: list[Metrics] = [ServerMetrics(), ChatMetrics(), process, supervisor.metrics]
            page = metrics_page(described, supervisor.scrape)
            await _show_metrics(support, for_metrics, page, settings, say)
            status = await supervisor.run(partial(_announce, settings, config, say))
            support.cancel_scope.cancel()
    return status


def settle() -> None:
    """Have Python's garbage collector leave alone what start-up made, and look less often at what comes.

    For a process that does nothing but serve.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT)


async def read_keys(settings: ServiceSettings) -> Keys:
    """Read the keys that the settings name, if they do. Raises `SettingError` if they cannot be read or used."""
    if settings.jwt_key is None:
        return Keys(())
    return await load(settings.jwt_key.reveal(), settings.jwks_refresh)


def _make_gate(settings: ServiceSettings, keys: Keys) -> Gate:
    if settings.jwt_key is None:
        return ThisMachine() if settings.auth is None else Everybody()
    return Tokens(keys, settings)


async def _listen_for_metrics(settings: ServiceSettings) -> list[Socket]:
    binds = [] if settings.metrics is None else [show_bind(*settings.metrics)]
    return await bind_or_explain(_listen, binds, "TRICORN_METRICS=")


async def _listen(bind: str) -> list[Socket]:
    return await listen_on([bind])


async def _show_metrics(
    nursery: trio.Nursery, listeners: list[Socket], page: ASGIApp, settings: ServiceSettings, say: Say
) -> None:
    if listeners:
        site = Site(no_websocket, replace(settings, proxy_protocol=False))  # Prometheus comes by itself
        server = Server(site, listeners, app=page)
        await nursery.start(server.serve)
        say(f"Metrics are at http://{show_address(server.addresses[0])}/metrics")


def _announce(settings: ServiceSettings, config: Config | None, say: Say, addresses: Sequence[Address]) -> None:
    scheme = "http" if config is None or not config.ssl_enabled else "https"
    say(f"Tricorn is listening on {show_urls(scheme, addresses)}")
    notify("READY=1")
    if settings.service is not None:
        report(
            "INFO",
            "an instance has started",
            service=settings.service,
            revision=settings.revision,
            configuration=settings.configuration,
        )
