"""The command line: reads what is asked for, and leaves it to a module of `tricorn.service.commands`.

Exit status 2 is for what was asked wrongly, 1 for what then went wrong. Both come with one line on stderr. A command's
module is imported when the command is chosen, so that each needs only what it uses to be installed.
"""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from secrets import token_hex
from signal import SIG_IGN, SIGHUP, SIGINT, signal
from typing import NoReturn

from tricorn.settings import SettingError

WHERE = (
    "listen on HOST:PORT, :PORT (every address), unix:PATH, fd:N, or fd:// (what systemd has passed); "
    "port 0 picks one; may be repeated (127.0.0.1:8080, or what systemd has passed)"
)
SERVERS = ("serve", "run")
INTERRUPTED = 128 + SIGINT  # the exit status that shells use for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's own) asks for, and return the exit status."""
    if sys.__stderr__ is None:
        _open_stderr()
    if argv is None:
        argv = sys.argv[1:]
    arguments = _parser().parse_args(argv, Namespace(argv=argv))
    if arguments.command == "audit" and not arguments.targets:
        arguments.command = "audit_served"
    if arguments.command in SERVERS:
        signal(SIGHUP, SIG_IGN)  # until it serves: what SIGHUP has read again is being read
    try:
        module = import_module(f"tricorn.service.commands.{arguments.command}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tricorn."):
            raise
        problem = f"{error.name.partition('.')[0]} is not installed; pip install 'tricorn[chat]'"
    else:
        command: Callable[[Namespace], int] = module.command
        try:
            return command(arguments)
        except SettingError as error:
            problem = str(error)
        except KeyboardInterrupt:
            return INTERRUPTED
    print(f"tricorn: {problem}", file=sys.stderr)
    return 2


def _open_stderr() -> None:
    """Have descriptor 2 be /dev/null: closed, it would become that of the next socket, which then got our reports.

    And have `print` write there: without a `sys.stderr` it writes to stdout.
    """
    while os.open(os.devnull, os.O_WRONLY) < 2:
        pass
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 (as long as the process)


class _Parser(ArgumentParser):
    """Says in one line what was asked wrongly, but nothing of a URL in the wrong place: that may have a password."""

    def error(self, message: str) -> NoReturn:
        head, is_url, _ = message.partition("://")
        self.exit(2, f"{self.prog}: {head}://…\n" if is_url else f"{self.prog}: {message}\n")


def _parser() -> ArgumentParser:
    parser = _Parser(prog="tricorn", description="Serve WebSockets, and chat with agents over them.")
    commands = parser.add_subparsers(required=True, metavar="run | serve | chat | check | token | log | audit | drill")

    run = commands.add_parser(
        "run",
        help="serve a handler or an ASGI application of your own",
        description="Serve WebSockets until SIGTERM or Ctrl-C.",
    )
    run.set_defaults(command="run")
    run.add_argument(
        "handler", metavar="MODULE:HANDLER", help="an async function that takes each WebSocket, or an ASGI application"
    )
    run.add_argument("--bind", metavar="WHERE", action="append", help=WHERE)

    serve = commands.add_parser("serve", help="serve the chat", description="Serve the chat until SIGTERM or Ctrl-C.")
    serve.set_defaults(command="serve")
    serve.add_argument("--bind", metavar="WHERE", action="append", help=WHERE)
    serve.add_argument(
        "--agent", metavar="MODULE:NAME", help="the agent that answers, or what makes it (the demo agent)"
    )
    serve.add_argument("--model", metavar="NAME", help="have this language model answer, in place of an agent")
    serve.add_argument("--base-url", metavar="URL", help="the model's endpoint (OpenAI's; its key is OPENAI_API_KEY)")
    serve.add_argument("--system-prompt", metavar="FILE", help="a file with the model's system prompt")
    serve.add_argument(
        "--audit",
        choices=["strict", "warn", "off"],
        default="warn",
        help="what to do if the agent breaks a rule of the error path; strict does not serve it (%(default)s)",
    )
    serve.add_argument(
        "--reload", action="store_true", help="restart when a Python file changes here or in the agent's package"
    )
    serve.add_argument("--workers", metavar="N", help="how many processes serve; several need a shared log (1)")
    serve.add_argument("--worker", metavar="DESCRIPTORS", help=SUPPRESS)  # what a supervisor starts
    serve.add_argument("--log", metavar="URL", help="where conversations are kept (sqlite:///tricorn.db)")
    serve.add_argument("--config", metavar="FILE", help="options of Hypercorn's, for TLS and HTTP: a TOML file")
    serve.add_argument("--auth", choices=["none"], help="none: let everybody in, without a token")

    client = commands.add_parser("chat", help="chat in this terminal", description="Chat in this terminal.")
    client.set_defaults(command="chat")
    client.add_argument(
        "url", metavar="URL", nargs="?", default="ws://127.0.0.1:8080/ws", help="where it is served (%(default)s)"
    )
    client.add_argument("--json", action="store_true", help="write the events as they come, one a line")
    client.add_argument("--message", metavar="TEXT", help="post this, wait for the run; exit 0 if it was a success")
    client.add_argument("--conversation", metavar="ID", default=token_hex(8), help="join this one (a new one)")

    checker = commands.add_parser(
        "check",
        help="check a server that is deployed",
        description="Check a deployed chat, as a pipeline does after a roll-out: exit 0 if all is well, else 1.",
    )
    checker.set_defaults(command="check")
    checker.add_argument("url", metavar="URL", help="where it is served, like https://chat.example.com")
    checker.add_argument("--timeout", metavar="SECONDS", default="30", help="for each check (%(default)s)")
    checker.add_argument("--json", action="store_true", help="write the results as JSON, one a line")

    token = commands.add_parser("token", help="make a token", description="Make a token with the key TRICORN_JWT_KEY.")
    token.set_defaults(command="token")
    token.add_argument("--user", metavar="NAME", required=True, help="whose it is")
    token.add_argument("--ttl", metavar="TIME", default="1h", help="how long it is good, like 90s, 15m, 1h, 7d (1h)")
    token.add_argument(
        "--share",
        metavar="PATTERN",
        action="append",
        default=[],
        help="opens the shared conversations like team-*, too",
    )

    log = commands.add_parser(
        "log",
        help="check a log, or have its clients start over",
        description="Look after the log that conversations are kept in.",
    )
    log.set_defaults(command="log")
    actions = log.add_subparsers(required=True, dest="action", metavar="check | epoch")
    for action, what in (
        ("check", "see whether every conversation has all its entries; exit 0 if so, else 1"),
        ("epoch", "after entries were lost, as in a restored backup: have every client start over"),
    ):
        acts = actions.add_parser(action, help=what, description=f"{what[0].upper()}{what[1:]}.")
        acts.add_argument("log", metavar="URL", nargs="?", help="where conversations are kept (sqlite:///tricorn.db)")

    auditor = commands.add_parser(
        "audit",
        help="audit the error path of an agent",
        description="Prove the rules of the error path on source, and exit with 1 if one is broken.",
    )
    auditor.set_defaults(command="audit")
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
    drill.set_defaults(command="drill")
    drill.add_argument("--agent", metavar="MODULE:FUNCTION", help="the agent to load (the demo agent)")
    return parser
