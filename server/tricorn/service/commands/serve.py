"""`tricorn serve`: serve the chat."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from tricorn.chat.logs.base import Unavailable
from tricorn.errors.failures import leaves
from tricorn.errors.import_guard import import_at_once
from tricorn.errors.report import send_records
from tricorn.listening.binds import check_bind
from tricorn.service.auth import check_exposure
from tricorn.service.bind import show_bind
from tricorn.service.commands.audit import audit_targets
from tricorn.service.hypercorn_config import load_config
from tricorn.service.lifespan import AgentFailed
from tricorn.service.settings import DEMO, Secret, ServiceSettings
from tricorn.service.source_watch import SourceWatch
from tricorn.service.start_up import check_shared, make_agent, make_log, serve, supervise
from tricorn.service.systemd import ALL, expand
from tricorn.service.workers import Worker
from tricorn.settings import COUNT, SettingError

if TYPE_CHECKING:
    from hypercorn.config import Config


def command(arguments: Namespace) -> int:
    """Serve until SIGTERM or SIGINT. The agent is looked for in the current directory too."""
    send_records("stderr", "INFO")  # before the agent is imported, which may choose otherwise
    import_at_once()
    settings = _settings(arguments)
    if arguments.worker is None:  # else its supervisor has done this, and has the sockets
        settings = replace(settings, bind=expand(settings.bind, show_bind(settings.host, settings.port)))
        check_exposure(settings)
    log = make_log(settings)
    read_config = partial(_load_config, arguments.config)
    config = read_config()
    say = partial(print, flush=True, file=sys.stdout)  # which serving makes a stream of records
    if arguments.worker is None and (settings.workers > 1 or arguments.reload):
        if settings.workers > 1:
            check_shared(log, f"--workers {settings.workers}")
        workers = [sys.executable, "-P", "-m", "tricorn", *arguments.argv]
        watch = None
        if arguments.reload:  # each worker audits what it has loaded
            watch = SourceWatch(settings.answering)
            workers.insert(1, "-B")  # compiled files would hide a change in the same second
        else:
            _audit(settings.answering, arguments.audit)
            workers += ["--audit", "off"]
        return trio.run(
            partial(supervise, workers, settings, config=config, read_config=read_config, watch=watch, say=say)
        )
    agent = make_agent(settings)
    _audit(settings.answering, arguments.audit)
    worker = None if arguments.worker is None else Worker(arguments.worker)
    try:
        trio.run(partial(serve, agent, settings, log, config=config, worker=worker, say=say))
    except* (Unavailable, AgentFailed) as errors:
        problem = next(leaves(errors))
    else:
        return 0
    print(f"tricorn: {problem}", file=sys.stderr)
    return 1


def _load_config(name: str | None) -> Config | None:
    return None if name is None else load_config(name)


def _settings(arguments: Namespace) -> ServiceSettings:
    """Return what the environment says, unless an argument says another."""
    settings = ServiceSettings.from_environ()
    if arguments.agent is not None and arguments.model is not None:
        raise SettingError(f"--model {arguments.model}: there is an --agent as well; only one of them can answer")
    if arguments.agent is not None:
        settings = replace(settings, agent=arguments.agent, model=None)
    if arguments.model is not None:
        settings = replace(settings, agent=DEMO, model=arguments.model)
    for option in ("base_url", "system_prompt"):
        if getattr(arguments, option) is not None and settings.model is None:
            raise SettingError(f"--{option.replace('_', '-')}: needs a --model")
    if arguments.base_url is not None:
        settings = replace(settings, base_url=arguments.base_url)
    if arguments.system_prompt is not None:
        settings = replace(settings, system_prompt=arguments.system_prompt)
    if arguments.bind is not None:
        for each in arguments.bind:
            if each != ALL:
                check_bind(each, "--bind ")
        settings = replace(settings, bind=tuple(arguments.bind))
    if arguments.auth is not None:
        settings = replace(settings, auth=arguments.auth)
    if arguments.log is not None:
        settings = replace(settings, log=Secret(arguments.log))
    if arguments.workers is not None:
        settings = replace(settings, workers=COUNT.read("--workers ", arguments.workers))
    return settings


def _audit(agent: str, mode: str) -> None:
    """Print what the audit finds. Raises `SettingError` if it finds something and the mode is strict."""
    if mode == "off":
        return
    problem = f"--agent {agent}: breaks rules of the error path, and --audit is strict"
    strict = mode == "strict"
    try:
        lines = [str(finding) for finding in audit_targets([agent])]
    except SettingError as error:
        problem = str(error)
        lines = [] if strict else [problem]
    else:
        strict = strict and bool(lines)
    for line in lines:
        print(f"tricorn: {line}", file=sys.stderr)
    if strict:
        raise SettingError(problem)
