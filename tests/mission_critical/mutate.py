"""Plant one fault of the error path or of teardown at a time in a copy of the package, and see that each is caught.

    python tests/mission_critical/mutate.py

prints a table. Exit status 1: a fault survived, or what should catch it objects to the package as it is.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

from tricorn.errors.audit import audit, python_files

REPOSITORY = Path(__file__).parents[2]
PACKAGE = Path("server/tricorn")

FAILED_AGENT = "tests/unit/chat/test_run.py::test_an_agent_that_raises_has_failed"
CONTEXT = "tests/unit/errors/test_context.py::test_what_is_ours_stays_ours"
CHAINS = "tests/unit/errors/test_chain.py"
HIDDEN = "tests/integration/server/test_hidden_errors.py"
FAILED_HANDLER = "tests/mission_critical/test_first_error.py::test_a_handler_that_raises"

FIRST_OF_A_RUN = "tests/integration/chat/test_first_error_of_a_run.py"
MISBEHAVING = "tests/integration/chat/test_misbehaving_agents.py"

EVERY_STEP = "tests/mission_critical/test_every_checkpoint.py::test_at_every_step"
LEAVES = "tests/mission_critical/test_every_checkpoint_of_a_chat.py::test_at_every_step[chat with a tool-FIN]"
STALLS = f"{EVERY_STEP}[echo-peer stops reading]"
SLOW = f"{EVERY_STEP}[slow reader-close frame]"

RULES = ("E1", "E2", "E7")  # of the audit

Plant = Callable[[str], str]


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    catcher: str  # a rule of the audit, a program, or a test
    plants: Sequence[Plant]


# How to plant


def at_top(line: str) -> Plant:
    """Put a line behind the imports from __future__."""

    def plant(source: str) -> str:
        future = "from __future__ import annotations\n"
        assert future in source
        return source.replace(future, f"{future}{line}\n", 1)

    return plant


def at_end(code: str) -> Plant:
    return lambda source: f"{source}\n{code}\n"


def instead(line: str, other: str) -> Plant:
    """Put a line in place of another."""

    def plant(source: str) -> str:
        assert line in source
        return source.replace(line, other)

    return plant


def first_in(function: str, line: str) -> Plant:
    """Put a line where the body of a function begins, behind its docstring."""
    return partial(_before, line, lambda tree: _body(_function(tree, function)))


def handling_in(function: str, line: str) -> Plant:
    """Put a line where the first except body in a function begins."""
    return partial(_before, line, lambda tree: _try(_function(tree, function)).handlers[0].body)


def finally_in(function: str, line: str) -> Plant:
    return partial(_before, line, lambda tree: _try(_function(tree, function), lambda node: node.finalbody).finalbody)


def catching_in(function: str, kind: str) -> Plant:
    """Have the first except clause in a function catch something else, and do nothing about it."""

    def plant(source: str) -> str:
        handler = _try(_function(ast.parse(source), function)).handlers[0]
        lines = source.splitlines(keepends=True)
        indent = " " * handler.col_offset
        lines[handler.lineno - 1 : handler.end_lineno] = [f"{indent}except {kind}:\n{indent}    pass\n"]
        return "".join(lines)

    return plant


def _before(line: str, find: Callable[[ast.Module], list[ast.stmt]], source: str) -> str:
    statement = find(ast.parse(source))[0]
    lines = source.splitlines(keepends=True)
    lines.insert(statement.lineno - 1, f"{' ' * statement.col_offset}{line}\n")
    return "".join(lines)


def _function(tree: ast.Module, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """The function of this name: `function`, or `Class.method`."""
    *cls, name = name.split(".")
    inside = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls[0]) if cls else tree
    return next(
        node
        for node in ast.walk(inside)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    )


def _body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    return function.body[1:] if ast.get_docstring(function) else function.body


def _try(
    function: ast.FunctionDef | ast.AsyncFunctionDef,
    has: Callable[[ast.Try | ast.TryStar], object] = lambda node: node.handlers,
) -> ast.Try | ast.TryStar:
    return next(node for node in ast.walk(function) if isinstance(node, ast.Try | ast.TryStar) and has(node))


# What to plant: first of all what the incident was made of


def reporter(body: str) -> Plant:
    """Put another `report_error` in place of the real one, which is then called `real`."""
    return at_end(
        f"real = report_error\n\n\ndef report_error(error: BaseException, **context: object) -> str:\n    {body}"
    )


TIME = at_top("import time")
ON_ENVIRONMENT = "from os import environ\nif 'K_SERVICE' in environ:\n    import json"
ON_FAILURE = "try:\n    import ujson as json\nexcept ImportError:\n    import json"
SWALLOWED = "from contextlib import suppress\nwith suppress(ImportError):\n    import time"
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from time import time"
ONE_SIDE = "if __debug__ and print:\n    detected = print"
LOG = "from logging import getLogger\nlog = getLogger()"
LOCK = "from threading import Lock\nlock = Lock()"
LOCKED = "with lock:\n        return real(error, **context)"
LATER = "return real(OSError('later'), **context)"
UNBOUNDED = "self._close_timeout = inf"
FORGOTTEN = "self._unsent = b''"
SHOWN = "report_error = lambda error, **context: repr(error)"

FAULTS = [
    Fault(name, file, catcher, plants)
    for name, file, catcher, *plants in [
        ("a lazy import in a handler", "listening/accept.py", "E1", handling_in("Acceptor.serve", "import json")),
        ("a lazy import where a handler gets to", "connection.py", "E1", first_in("Connection._failed", "import json")),
        ("an import that depends on the environment", "connection.py", "E1", at_top(ON_ENVIRONMENT)),
        ("an import that depends on a failure", "transport/native.py", "E1", at_top(ON_FAILURE)),
        ("an import whose failure is swallowed", "chat/run.py", "E1", at_top(SWALLOWED)),
        (
            "a cycle of imports",
            "protocol/close.py",
            "lint-imports",
            at_top("from tricorn.connection import Disconnected"),
        ),
        ("time.time() in a handler", "listening/site.py", "E2", handling_in("run_drain", "time.time()"), TIME),
        ("time.time() in a finally", "chat/chat.py", "E2", finally_in("Chat.session", "time.time()"), TIME),
        (
            "time.time() where a finally gets to",
            "connection.py",
            "E2",
            first_in("Connection._tear_down", "time.time()"),
            TIME,
        ),
        (
            "time.time() behind an interface",
            "transport/native.py",
            "E2",
            first_in("NativeTransport.abort", "time.time()"),
            TIME,
        ),
        (
            "time.time() where a tool is left",
            "chat/run.py",
            "E2",
            first_in("RunningTool.__aexit__", "time.time()"),
            TIME,
        ),
        ("time.time() in the reporter", "errors/report.py", "E2", reporter("return real(error, at=time.time())"), TIME),
        ("a name that nobody imported", "listening/accept.py", "E2", handling_in("Acceptor.serve", "print(time())")),
        ("a name that was unbound again", "connection.py", "E2", at_end("del report_error")),
        (
            "a name for type checkers only",
            "transport/native.py",
            "E2",
            first_in("NativeTransport.abort", "time()"),
            at_top(FOR_TYPES),
        ),
        (
            "a name bound on one side of an if",
            "chat/session.py",
            "E2",
            handling_in("Session._serve", "detected()"),
            at_top(ONE_SIDE),
        ),
        ("a local not bound yet", "chat/session.py", "E2", handling_in("Session._serve", "print(seq); seq = 0")),
        (
            "import_module in a handler",
            "listening/site.py",
            "E2",
            handling_in("run_drain", "import_module('json')"),
            at_top("from importlib import import_module"),
        ),
        (
            "logging in a handler",
            "listening/http.py",
            "E2",
            handling_in("Hypercorn.answer", "log.error('failed')"),
            at_top(LOG),
        ),
        ("a lock in the reporter", "errors/report.py", "E2", reporter(LOCKED), at_top(LOCK)),
        (
            "the environment read at run time",
            "chat/chat.py",
            "E7",
            first_in("Chat.session", "os.environ.get('X')"),
            at_top("import os"),
        ),
        (
            "except BaseException: pass",
            "listening/accept.py",
            "flake8-async",
            catching_in("Acceptor.serve", "BaseException"),
        ),
        ("an error that is swallowed", "connection.py", FAILED_HANDLER, first_in("Connection._failed", "return None")),
        ("a clean-up that raises", "connection.py", FAILED_HANDLER, first_in("Connection._tear_down", "raise OSError")),
        ("a reporter that raises", "errors/report.py", FAILED_AGENT, reporter("raise OSError('no sink')")),
        ("a reporter that says nothing", "errors/report.py", FAILED_AGENT, reporter("return '00000000'")),
        ("a reporter that masks the error", "errors/report.py", FAILED_AGENT, reporter(LATER)),
        (
            "a reporter that tells another id",
            "errors/report.py",
            FAILED_AGENT,
            reporter("return real(error, **context)[1:]"),
        ),
        (
            "a context that replaces our fields",
            "errors/report.py",
            CONTEXT,
            first_in("_supplied", "return dict(context or {})"),
        ),
        (
            "the last error as the headline",
            "errors/chain.py",
            f"{CHAINS}::test_the_headline_is_the_first_error",
            first_in("first_of", "return order[-1]"),
        ),
        (
            "`from None` that hides what callers handle",
            "errors/chain.py",
            f"{CHAINS}::test_the_headline_is_the_first_error",
            first_in("_suppressed", "if _suppresses(error): return in_order(error)[:-1]"),
        ),
        (
            "a property that an exception is asked for",
            "errors/chain.py",
            f"{CHAINS}::test_any_graph_of_errors_is_reported",
            first_in("members", "return error.exceptions if is_group(error) else ()"),
        ),
        (
            "an exception that is compared",
            "errors/chain.py",
            f"{CHAINS}::test_any_graph_of_errors_is_reported",
            first_in("is_any", "return isinstance(error, kinds)"),
        ),
        (
            "a group that is split",
            "errors/text.py",
            f"{CHAINS}::test_any_graph_of_errors_is_reported",
            first_in(
                "_without_cancellations", "order = [each.split(Cancelled)[1] for each in order if is_group(each)]"
            ),
        ),
        (
            "one error that takes all the room",
            "errors/text.py",
            f"{CHAINS}::test_of_two_long_tracebacks_both_ends_of_both_are_shown",
            first_in("_fair", "return room"),
        ),
        (
            "a cancellation that hides an error",
            "errors/chain.py",
            f"{CHAINS}::test_a_cancellation_hides_what_was_not_being_handled_on_purpose",
            first_in("hides_an_error", "return False"),
        ),
        (
            "a disconnect that hides an error",
            "connection.py",
            f"{HIDDEN}::test_an_error_below_what_ends_a_handler_is_reported",
            instead("not hides_an_error(error)", "True"),
        ),
        (
            "a cancellation that is not looked below",
            "connection.py",
            f"{HIDDEN}::test_an_error_below_what_ends_a_handler_is_reported",
            first_in("Connection._hidden", "return None"),
        ),
        (
            "an ERROR for a clause that was interrupted",
            "errors/interrupted.py",
            f"{HIDDEN}::test_a_peer_that_goes_is_no_error",
            first_in("takes_over", "return False"),
        ),
        (
            "an ERROR for what another task handles",
            "errors/chain.py",
            f"{CHAINS}::test_a_cancellation_does_not_hide_what_the_task_that_cancels_is_handling",
            first_in("context_of", "return _context(error)"),
        ),
        (
            "an ERROR for a peer's mistake",
            "listening/http.py",
            "tests/integration/server/test_peers_mistakes.py::test_what_a_peer_sends_is_no_error",
            first_in("is_of_a_peer", "return False"),
        ),
        (
            "a finally that raises over an error",
            "listening/accept.py",
            "tests/unit/errors/test_nothing_raises_over_an_error.py",
            finally_in("Acceptor.serve", "raise OSError"),
        ),
        ("a client that is shown the error", "chat/execution.py", FAILED_AGENT, first_in("Execution._fail", SHOWN)),
        (
            "a log's refusal over a tool's error",
            "chat/execution.py",
            f"{FIRST_OF_A_RUN}::test_an_agent_that_fails_in_a_tool_while_the_log_refuses[memory-error0]",
            instead("if in_flight is None:", "if True:"),
        ),
        (
            "a log that waits, as the headline",
            "chat/execution.py",
            f"{FIRST_OF_A_RUN}::test_a_log_that_refuses_a_word_is_the_first_error[memory]",
            instead(
                "        if not self._append_at_once(append):\n            await self._log.append(append)\n",
                "        try:\n            self._log.append_nowait(append)\n"
                "        except NOT_AT_ONCE:\n            await self._log.append(append)\n",
            ),
        ),
        (
            "a cancellation of a run that hides an error",
            "chat/execution.py",
            f"{FIRST_OF_A_RUN}::test_a_cancellation_hides_no_error_of_an_agent[memory-handle_all-cancelled]",
            instead("if failed or hides_an_error(error):", "if failed:"),
        ),
        (
            "a failed agent that stays in memory",
            "chat/execution.py",
            f"{FIRST_OF_A_RUN}::test_nothing_of_a_failed_agent_is_alive_when_the_end_of_its_run_is_written[memory]",
            first_in("Execution._fail", "self.kept = error"),
        ),
        (
            "an agent's group that is asked for its members",
            "chat/tools.py",
            f"{FIRST_OF_A_RUN}::test_an_error_of_a_tool_that_cannot_be_shown[memory-exceptions]",
            first_in("shown", "getattr(error, 'exceptions', None)"),
        ),
        (
            "a success that was cancelled",
            "chat/execution.py",
            f"{MISBEHAVING}::test_an_agent_that_does_not_raise_its_cancellation[memory-swallows-cancelled]",
            instead('self._outcome = self._ending() or "success"', 'self._outcome = "success"'),
        ),
        (
            "a run that holds up its conversation",
            "chat/execution.py",
            f"{MISBEHAVING}::test_a_conversation_goes_on_without_a_run_that_does_not_end[memory-shield-cancelled]",
            instead("move_on_after(self._close_timeout, shield=True)", "move_on_after(inf, shield=True)"),
        ),
        (
            "a run that nobody ends in time",
            "chat/execution.py",
            f"{MISBEHAVING}::test_a_conversation_goes_on_without_a_run_that_does_not_end[memory-shield-timeout]",
            first_in("Execution.give_up", "return"),
        ),
        (
            "words behind the end of a run",
            "chat/execution.py",
            f"{MISBEHAVING}::test_a_conversation_goes_on_without_a_run_that_does_not_end[memory-shield-cancelled]",
            first_in("Execution._check_not_over", "return"),
        ),
        (
            "a context that the next run sees",
            "chat/chat.py",
            f"{MISBEHAVING}::test_a_run_sees_no_context_of_the_connection_that_came_first[memory]",
            instead("self._context.run(self._nursery.start_soon, ", "self._nursery.start_soon("),
        ),
        (
            "SystemExit that ends the chat",
            "chat/execution.py",
            f"{MISBEHAVING}::test_what_ends_other_programs_fails_only_the_run[memory-error0]",
            instead(
                "if is_any(leaf, (KeyboardInterrupt,))), None",
                "if is_any(leaf, (KeyboardInterrupt, SystemExit))), None",
            ),
        ),
        (
            "a driver's bug that ends the log",
            "chat/logs/sqlite.py",
            "tests/integration/log/test_imports_refused.py::test_whatever_a_driver_raises_is_unavailable_with_its_cause"
            "[sqlite-break_threads]",
            instead("except Exception as error:  # no thread", "except DatabaseError as error:  # no thread"),
        ),
        (
            "an attachment that is left",
            "chat/conversation/conversation.py",
            LEAVES,
            first_in("Conversation.detach", "return"),
        ),
        ("a run without an end", "chat/execution.py", LEAVES, first_in("Execution._seal", "return")),
        ("a shield without a deadline", "connection.py", STALLS, first_in("Connection._tear_down", UNBOUNDED)),
        ("a registration that is left", "transport/native.py", STALLS, first_in("NativeTransport.abort", "return")),
        (
            "half a frame, and more behind it",
            "transport/native.py",
            SLOW,
            first_in("NativeTransport.writable", FORGOTTEN),
        ),
    ]
]


# What catches it


class Copy:
    """A copy of the package, in which one file at a time can be another."""

    def __init__(self, directory: Path) -> None:
        self.package = directory / PACKAGE
        copytree(REPOSITORY / PACKAGE, self.package)

    def catches(self, catcher: str, file: str) -> str | None:
        """What the catcher says about the copy, if it objects to it; of the audit only what it says about the file."""
        if catcher in RULES:
            shown = str(self.package / file)
            for found in audit(python_files(self.package)):
                if (found.file, found.rule) == (shown, catcher):
                    return f"audit {catcher}, line {found.line}"
            return None
        if catcher == "flake8-async":
            return self._objects(["flake8_async", "--enable=ASYNC103,ASYNC104", str(self.package / file)], catcher)
        if catcher == "lint-imports":
            command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
            return self._objects(["-c", command], catcher)
        return self._objects(["pytest", "-q", "-x", "-p", "no:cacheprovider", catcher], catcher)

    def _objects(self, command: list[str], shown: str) -> str | None:
        arguments = command if command[0] == "-c" else ["-m", *command]
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(self.package.parent)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{shown} did not run: {done.stdout}{done.stderr}")
        return shown if done.returncode else None


def main() -> int:
    survived = 0
    with TemporaryDirectory() as directory:
        copy = Copy(Path(directory).resolve())
        if found := audit(python_files(copy.package)):
            print(f"the audit objects to the package as it is: {found}")
            return 1
        for catcher, file in sorted({(fault.catcher, fault.file) for fault in FAULTS if fault.catcher not in RULES}):
            if said := copy.catches(catcher, file):
                print(f"{said} objects to {file} as it is")
                return 1
        width = max(len(fault.name) for fault in FAULTS)
        for fault in FAULTS:
            path = copy.package / fault.file
            source = path.read_text()
            planted = source
            for plant in fault.plants:
                planted = plant(planted)
            path.write_text(planted)
            said = copy.catches(fault.catcher, fault.file)
            path.write_text(source)
            survived += said is None
            print(f"{fault.name:{width}}  {fault.file:16}  {said or f'SURVIVED {fault.catcher}'}", flush=True)
    print(f"\n{len(FAULTS) - survived} of {len(FAULTS)} faults were caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
