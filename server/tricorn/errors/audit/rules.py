"""The rules of the error path that source can prove, and what breaks them.

E1: imports stand at module level, and none depends on a failure.
E2: while an error is handled nothing is looked up on a module or imported, no lock is taken, and every name is bound.
E7: the environment is read at module level or in a file settings.py, so that it is read once.
"""

from __future__ import annotations

import ast
import builtins
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tricorn.errors.audit.flow import Bound, Flow, is_fact, suppresses, surely_bound
from tricorn.errors.audit.program import External, Instance, Program, is_module
from tricorn.errors.audit.source import (
    COMPREHENSIONS,
    Class,
    Definition,
    Function,
    Module,
    Scope,
    inner_scope,
    own_nodes,
)

BUILTINS = {*dir(builtins), "__file__", "__path__", "__annotations__", "__class__"}
EXITS = {"__exit__", "__aexit__"}
ENTERED = ("__enter__", "__exit__", "__aenter__", "__aexit__")
MADE = ("__new__", "__init__", "__post_init__")
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}
IMPORT = ("importlib", "pkgutil", "runpy", "warnings")
LOCK = (
    "logging",
    "multiprocessing",
    "queue",
    "concurrent.futures",
    *(
        f"threading.{kind}"
        for kind in ("Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore", "Event", "Barrier")
    ),
)


class Finding(NamedTuple):
    """A rule that is broken. `message` says what is wrong and what to do instead."""

    file: str
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.rule}: {self.message}"


def audit(files: Sequence[Path]) -> list[Finding]:
    """Audit Python files and what they import from their own directory or package; no finding twice, in a fixed order.

    Raises OSError, SyntaxError, or ValueError for a file that cannot be read.
    """
    program = Program(list(files))
    found = {
        finding: None for module in program.modules for finding in [*_imports(module), *_environment(module, program)]
    }
    return sorted({*found, *_ErrorPath(program).findings()})


# E1


def _imports(module: Module) -> Iterator[Finding]:
    for node, where in _imports_in(module.tree.body, None):
        if where is not None:
            name = ast.unparse(node)
            yield Finding(
                _shown(module), node.lineno, "E1", f"`{name}` {where}; import it always, at the top of the module"
            )


def _imports_in(
    statements: Sequence[ast.stmt], where: str | None
) -> Iterator[tuple[ast.Import | ast.ImportFrom, str | None]]:
    """Every import, with what is wrong about the place where it stands."""
    for node in statements:
        match node:
            case ast.Import() | ast.ImportFrom():
                yield node, where
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from _imports_in(node.body, f"stands in {node.name}()")
            case ast.If():
                branch = where if is_fact(node.test) else where or "depends on a condition"
                yield from _imports_in([*node.body, *node.orelse], branch)
            case ast.Try() | ast.TryStar():
                raises = all(isinstance(handler.body[-1], ast.Raise) for handler in node.handlers)
                yield from _imports_in(node.body, where if raises else where or "may fail, and the program goes on")
                for handler in node.handlers:
                    yield from _imports_in(handler.body, where or "depends on a failure")
                yield from _imports_in([*node.orelse, *node.finalbody], where)
            case ast.With() | ast.AsyncWith():
                lenient = any(map(suppresses, node.items))
                yield from _imports_in(node.body, where or "may fail, and the program goes on" if lenient else where)
            case ast.For() | ast.AsyncFor() | ast.While():
                yield from _imports_in([*node.body, *node.orelse], where or "depends on a condition")
            case ast.Match():
                for case in node.cases:
                    yield from _imports_in(case.body, where or "depends on a condition")
            case ast.ClassDef():
                yield from _imports_in(node.body, where)


# E7


def _environment(module: Module, program: Program) -> Iterator[Finding]:
    if module.path.name == "settings.py":
        return
    for function in module.functions:
        for node in _run_by(function):
            if isinstance(node, ast.Name | ast.Attribute):
                origin = program.origin(node, function.scope)
                if isinstance(origin, External) and origin.name in ENVIRONMENT:
                    instead = "read it once, in settings.py or at module level"
                    message = f"{origin.name} is used in {function.node.name}(), whenever that runs; {instead}"
                    yield Finding(_shown(module), node.lineno, "E7", message)


def _run_by(function: Function) -> Iterator[ast.AST]:
    """What calling a function evaluates, and the lambdas in it."""
    for node in own_nodes(function.node.body):
        yield node
        if isinstance(node, Definition):
            for each in [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]:
                yield from ast.walk(each)
        elif isinstance(node, ast.Lambda | COMPREHENSIONS):
            yield from (each for child in ast.iter_child_nodes(node) for each in ast.walk(child))


# E2


class _Step(NamedTuple):
    function: Function
    origin: str  # where the error path comes from; empty in what is part of it by itself


class _ErrorPath:
    """All that a failure gets to: what handles errors, and every function that it can reach."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._bound = {module.path: surely_bound(module.tree) for module in program.modules}
        self._findings: dict[tuple[Path, int, str], Finding] = {}
        self._reached: deque[_Step] = deque()

    def findings(self) -> list[Finding]:
        for module in self._program.modules:
            reporter = module.name == "tricorn.errors.report"
            for function in module.functions:
                method_of_exit = function.scope.owner is not None and function.node.name in EXITS
                self._walk(_Step(function, ""), failing=reporter or method_of_exit)
        walked: set[Function] = set()
        while self._reached:
            step = self._reached.popleft()
            if step.function not in walked:
                walked.add(step.function)
                self._walk(step, failing=True)
        return list(self._findings.values())

    def _walk(self, step: _Step, failing: bool) -> None:
        function = step.function
        flow = Flow(partial(self._see, step, function.scope), failing)
        arguments = function.node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        flow.block(function.node.body, frozenset(each.arg for each in every if each))

    def _see(self, step: _Step, scope: Scope, node: ast.AST, bound: Bound, failing: bool) -> None:
        if not failing:
            return
        match node:
            case ast.ExceptHandler():
                for each in ast.walk(node.type) if node.type else ():
                    if isinstance(each, ast.Name):
                        self._see_name(step, scope, each, bound)
                return
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                inside = [each for each in scope.module.functions if each.node is node]
                self._reach(step, node, inside)
                return
            case ast.ClassDef():
                return
            case ast.Lambda() | ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                inner = inner_scope(node, scope)
                for child in ast.iter_child_nodes(node):
                    self._see(step, inner, child, bound, failing)
                return
            case ast.AnnAssign():
                children: list[ast.AST] = [node.target, *([node.value] if node.value else [])]
            case _:
                children = list(ast.iter_child_nodes(node))
        match node:
            case ast.Name(ctx=ast.Load()):
                self._see_name(step, scope, node, bound)
                self._see_reference(step, scope, node)
            case ast.Attribute():
                self._see_reference(step, scope, node)
                if self._see_module(step, scope, node):
                    return
            case ast.Call(func=used) | ast.withitem(context_expr=used):
                if self._see_use(step, scope, node, used):
                    children.remove(used)
        for child in children:
            self._see(step, scope, child, bound, failing)

    def _see_name(self, step: _Step, scope: Scope, node: ast.Name, bound: Bound) -> None:
        name, module = node.id, scope.module
        found = scope.find(name)
        if found is module.scope:
            if name not in self._bound[module.path]:
                self._add(step, node, f"`{name}` is bound under a condition only", "bind it at module level, always")
        elif found is step.function.scope:
            if name not in bound:
                self._add(step, node, f"`{name}` may not be bound yet", "bind it before the try")
        elif found is None and name not in BUILTINS and not _imports_star(module):
            self._add(step, node, f"`{name}` is bound nowhere", "import or define it at module level")

    def _see_reference(self, step: _Step, scope: Scope, node: ast.expr) -> None:
        origin = self._program.origin(node, scope)
        if isinstance(origin, Function):
            self._reach(step, node, self._program.implementations(origin))

    def _see_module(self, step: _Step, scope: Scope, node: ast.Attribute) -> bool:
        """Look at a whole `a.b.c`; say whether somewhere in it a name is looked up on a module."""
        base = node.value
        while isinstance(base, ast.Attribute):
            if self._is_module(base, scope):
                break
            base = base.value
        if not self._is_module(base, scope):
            return False
        shown, module = ast.unparse(node), ast.unparse(base)
        origin = self._program.origin(base, scope)
        source = origin.name if isinstance(origin, External | Module) else module
        name = shown.removeprefix(f"{module}.").split(".")[0]
        instead = f"bind it at module level: from {source} import {name}"
        self._add(step, node, f"{shown} is looked up on a module", instead)
        return True

    def _is_module(self, node: ast.expr, scope: Scope) -> bool:
        match self._program.origin(node, scope):
            case Module():
                return True
            case External(name):
                return is_module(name)
        return False

    def _see_use(self, step: _Step, scope: Scope, node: ast.AST, used: ast.expr) -> bool:
        """Look at what is called or entered; say whether that is a finding of its own."""
        shown = ast.unparse(used)
        if isinstance(used, ast.Name) and used.id in {"__import__", "exec", "eval"} and scope.find(used.id) is None:
            self._add(step, used, f"{shown}() may import", "do it at module level")
            return True
        origin = self._program.origin(used, scope)
        match origin:
            case External(name):
                if _belongs(name, IMPORT):
                    self._add(step, used, f"{shown} imports", "do it at module level")
                    return True
                if _belongs(name, LOCK):
                    instead = "let the error go on, or report it with tricorn.errors.report"
                    self._add(step, used, f"{shown} takes a lock", instead)
                    return True
            case Class():
                self._reach(step, used, self._program.methods(origin, *MADE))
            case Instance(cls) if isinstance(node, ast.withitem):
                self._reach(step, used, self._program.methods(cls, *ENTERED))
        return False

    def _reach(self, step: _Step, node: ast.AST, functions: Sequence[Function] | Iterator[Function]) -> None:
        line = getattr(node, "lineno", 0)
        origin = step.origin or f"{_shown(step.function.scope.module)}:{line}"
        self._reached.extend(_Step(function, origin) for function in functions)

    def _add(self, step: _Step, node: ast.AST, what: str, instead: str) -> None:
        module = step.function.scope.module
        line = getattr(node, "lineno", 0)
        where = f"where the error path of {step.origin} comes" if step.origin else "on the error path"
        finding = Finding(_shown(module), line, "E2", f"{what}, {where}; {instead}")
        self._findings.setdefault((module.path, line, what), finding)


def _belongs(name: str, families: Sequence[str]) -> bool:
    return any(name == each or name.startswith((f"{each}.", f"{each}(")) for each in families)


def _imports_star(module: Module) -> bool:
    return "*" in module.scope.names


def _shown(module: Module) -> str:
    here = Path.cwd()
    return str(module.path.relative_to(here) if module.path.is_relative_to(here) else module.path)
