"""The rules of the error path that source can prove, and what breaks them.

E1: imports stand at module level, none depends on a failure, and none is lazy.
E2: while an error is handled nothing is looked up on a module or imported, no lock is taken, and every name is bound.
A name that is bound nowhere breaks it wherever it is used.
E7: the environment is read at module level or in a file settings.py, so that it is read once.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tricorn.errors.audit.flow import Bound, Flow, is_fact, suppresses, surely_bound
from tricorn.errors.audit.names import BUILTINS, unbound
from tricorn.errors.audit.program import External, Instance, Program, is_module
from tricorn.errors.audit.source import (
    Class,
    Function,
    Module,
    Scope,
    binds,
    code,
    inner_scope,
    parameters,
    run_by,
    stored,
)

# Methods that run while an error is handled: what leaves a context, shows an object, or runs whenever one is freed.
HANDLING = {"__exit__", "__aexit__", "__del__", "__str__", "__repr__", "__format__"}
# What is given a function to call when something ends or fails. The methods are those of exit stacks, loops, futures.
REGISTERS = {
    "atexit.register",
    "signal.signal",
    "weakref.WeakMethod",
    "weakref.finalize",
    "weakref.proxy",
    "weakref.ref",
}
REGISTERING = {
    *("callback", "push", "push_async_callback", "push_async_exit"),
    *("add_done_callback", "add_signal_handler", "set_exception_handler"),
}
HOOKS = {"sys.excepthook", "sys.unraisablehook", "threading.excepthook"}
# Expressions that call special methods of what is in them.
USING = (
    *(
        ast.Assert,
        ast.AugAssign,
        ast.Await,
        ast.BinOp,
        ast.BoolOp,
        ast.Compare,
        ast.FormattedValue,
        ast.IfExp,
        ast.Starred,
    ),
    *(ast.Subscript, ast.UnaryOp, ast.YieldFrom, ast.comprehension),
)
LAZY = {"sys.set_lazy_imports", "sys.set_lazy_imports_filter", "importlib.util.LazyLoader"}
EAGER = {"none", "normal"}  # "none" was removed before Python 3.15 was released
IMPORTING = {"__import__", "__lazy_import__", "exec", "eval"}
ENTERED = ("__enter__", "__exit__", "__aenter__", "__aexit__")
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
    try:
        program = Program(list(files))
        found = set(_ErrorPath(program).findings())
        for module in program.modules:
            found.update(_imports(module), _lazy(module, program), _environment(module, program))
    except RecursionError as error:
        raise ValueError("an expression is nested too deeply to be audited") from error
    return sorted(found)


# E1


def _imports(module: Module) -> Iterator[Finding]:
    for node, where in _imports_in(module.tree.body, None):
        if where is not None:
            name = "lazy " * is_lazy(node) + ast.unparse(node).removeprefix("lazy ")
            message = f"`{name}` {where}; import it always, at the top of the module"
            yield Finding(_shown(module), node.lineno, "E1", message)


def _imports_in(
    statements: Sequence[ast.stmt], where: str | None
) -> Iterator[tuple[ast.Import | ast.ImportFrom, str | None]]:
    """Every import, with what is wrong about the place where it stands."""
    for node in statements:
        match node:
            case ast.Import() | ast.ImportFrom():
                yield node, where or ("is lazy: it runs where a name is first used" if is_lazy(node) else None)
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


def is_lazy(node: ast.Import | ast.ImportFrom) -> bool:
    return bool(getattr(node, "is_lazy", False))


def _lazy(module: Module, program: Program) -> Iterator[Finding]:
    """What makes imports lazy that do not say so (PEP 810)."""
    for scope, nodes in code(module):
        for node in nodes:
            what = ""
            match node:
                case ast.Name(id="__lazy_modules__") | ast.Attribute(attr="__lazy_modules__"):
                    what = ast.unparse(node)
                case ast.Call(args=arguments, keywords=keywords):
                    called = {each.name for each in program.origins(node.func, scope) if isinstance(each, External)}
                    if called & LAZY and not (arguments and _is_eager(arguments[0])):
                        what = ast.unparse(node.func)
                    elif called:
                        given = [*arguments, *(each.value for each in keywords)]
                        what = next((text for each in given for text in _switches(each)), "")
                case ast.Assign(targets=[ast.Subscript(slice=key)]):
                    what = next(_switches(key), "")
            if what:
                message = f"{what} makes imports lazy: they run where a name is first used; remove it"
                yield Finding(_shown(module), getattr(node, "lineno", 0), "E1", message)


def _is_eager(argument: ast.expr) -> bool:
    """Whether this mode, or this filter, makes all imports run at once that do not say that they are lazy."""
    match argument:
        case ast.Constant(value=mode):
            return mode in EAGER
        case ast.Lambda(body=ast.Constant(value=False)):
            return True
    return False


def _switches(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        match each:
            case ast.Constant(value=str(text)) if text == "PYTHON_LAZY_IMPORTS" or text.endswith("lazy_imports=all"):
                yield text


# E7


def _environment(module: Module, program: Program) -> Iterator[Finding]:
    if module.path.name == "settings.py":
        return
    for function in module.functions:
        for node in run_by(function):
            if isinstance(node, ast.Name | ast.Attribute):
                for origin in program.origins(node, function.scope):
                    if isinstance(origin, External) and origin.name in ENVIRONMENT:
                        instead = "read it once, in settings.py or at module level"
                        message = f"{origin.name} is used in {function.node.name}(), whenever that runs; {instead}"
                        yield Finding(_shown(module), node.lineno, "E7", message)


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
        functions = [function for module in self._program.modules for function in module.functions]
        self._reached.extend(_Step(function, "") for function in functions if self._handles(function))
        for module in self._program.modules:
            self._find_registered(module)
        for function in functions:
            self._walk(_Step(function, ""), failing=False)
        walked: set[Function] = set()
        while self._reached:
            step = self._reached.popleft()
            if step.function not in walked:
                walked.add(step.function)
                self._walk(step, failing=True)
                self._reach(step, step.function.node, self._program.wrappers(step.function))
        for module in self._program.modules:
            somewhere = {name for node in ast.walk(module.tree) for name in binds(node)}
            for node in unbound(module):
                what = "is not bound when this runs" if node.id in somewhere else "is bound nowhere"
                message = f"`{node.id}` {what}; import or define it at module level"
                finding = Finding(_shown(module), node.lineno, "E2", message)
                self._findings.setdefault((module.path, node.lineno, node.id), finding)
        return list(self._findings.values())

    def _handles(self, function: Function) -> bool:
        """Whether it is part of the error path by itself: of the reporter, a method of an exception, or so named."""
        owner = function.scope.owner
        if function.scope.module.name == "tricorn.errors.report":
            return True
        return owner is not None and (function.node.name in HANDLING or self._program.is_exception(owner))

    def _find_registered(self, module: Module) -> None:
        """Look for functions that are handed to something that calls them when something ends or fails."""
        for scope, nodes in code(module):
            for node in nodes:
                given: list[ast.expr] = []
                match node:
                    case ast.Call(func=ast.Name(id="closing" | "aclosing" as name), args=[value]):
                        method = "close" if name == "closing" else "aclose"
                        given = [ast.copy_location(ast.Attribute(value, method, ast.Load()), node)]
                    case ast.Call(func=func, args=args, keywords=keywords) if self._registers(func, scope):
                        given = [*args, *(keyword.value for keyword in keywords)]
                    case ast.Assign(targets=[ast.Attribute() as hook], value=value):
                        if any(External(each) in self._program.origins(hook, scope) for each in HOOKS):
                            given = [value]
                    case ast.FunctionDef(decorator_list=decorators) | ast.AsyncFunctionDef(decorator_list=decorators):
                        called = [each.func if isinstance(each, ast.Call) else each for each in decorators]
                        if any(self._registers(each, scope) for each in called):
                            given = [ast.copy_location(ast.Name(node.name, ast.Load()), node)]
                for each in (part for value in given for part in ast.walk(value) if isinstance(part, ast.expr)):
                    for function in self._callable(each, scope):
                        self._reached.append(_Step(function, f"{_shown(module)}:{each.lineno}"))

    def _registers(self, function: ast.expr, scope: Scope) -> bool:
        origins = self._program.origins(function, scope)
        if isinstance(function, ast.Attribute) and function.attr in REGISTERING:
            return not any(isinstance(each, Function) for each in origins)
        return any(External(each) in origins for each in REGISTERS)

    def _callable(self, node: ast.expr, scope: Scope) -> Iterator[Function]:
        """The functions that calling this value can run."""
        for origin in self._program.origins(node, scope):
            match origin:
                case Function():
                    yield from self._program.implementations(origin)
                case Class():
                    yield from self._program.makers(origin)
                case Instance(cls):
                    yield from self._program.methods(cls, "__call__")

    def _walk(self, step: _Step, failing: bool) -> None:
        function = step.function
        flow = Flow(partial(self._see_first, step, function.scope), failing)
        flow.block(function.node.body, frozenset(each.arg for each in parameters(function.node.args)))

    def _see_first(self, step: _Step, scope: Scope, node: ast.AST, bound: Bound, failing: bool) -> None:
        if failing:
            if isinstance(node, ast.expr):  # what is tested or iterated over
                self._see_special(step, scope, node)
            self._see(step, scope, node, bound)

    def _see(self, step: _Step, scope: Scope, node: ast.AST, bound: Bound) -> None:
        match node:
            case ast.ExceptHandler():
                for each in ast.walk(node.type) if node.type else ():
                    if isinstance(each, ast.Name):
                        self._see_name(step, scope, each, bound)
                return
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._reach(step, node, [each for each in scope.module.functions if each.node is node])
                children: list[ast.AST] = [
                    *node.decorator_list,
                    *node.args.defaults,
                    *filter(None, node.args.kw_defaults),
                ]
            case ast.ClassDef():
                children = [*node.decorator_list, *node.bases, *node.keywords]
                inner = Scope(scope.module, scope, names={name: [] for each in node.body for name in stored(each)})
                for each in node.body:
                    self._see(step, inner, each, bound)
            case ast.Lambda() | ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                scope, children = inner_scope(node, scope), list(ast.iter_child_nodes(node))
            case ast.AnnAssign():
                children = [node.target, *([node.value] if node.value else [])]
            case _:
                children = list(ast.iter_child_nodes(node))
        match node:
            case ast.Name(ctx=ast.Load()):
                self._see_name(step, scope, node, bound)
                self._see_reference(step, scope, node)
            case ast.Attribute():
                self._see_reference(step, scope, node)
                self._reach_any(step, node, self._program.run_by(node, scope))
                if self._see_module(step, scope, node):
                    return
                if node.attr in {"close", "aclose"} and isinstance(node.value, ast.Name):
                    self._see_name(step, scope, node.value, bound)  # of a generator this runs what handles failures
                    return
            case ast.Call(func=used) | ast.withitem(context_expr=used):
                if self._see_use(step, scope, node, used):
                    children.remove(used)
        unpacks = isinstance(node, ast.Assign) and any(isinstance(each, ast.Tuple | ast.List) for each in node.targets)
        if unpacks or isinstance(node, USING):
            for child in children:
                self._see_special(step, scope, child)
        for child in children:
            self._see(step, scope, child, bound)

    def _see_special(self, step: _Step, scope: Scope, node: ast.AST) -> None:
        """Look at what Python calls by itself for this object: operators, its truth, its text, an iteration."""
        for origin in self._program.origins(node, scope) if isinstance(node, ast.expr) else ():
            if isinstance(origin, Instance):
                self._reach_any(step, node, self._program.special_methods(origin.of))

    def _see_name(self, step: _Step, scope: Scope, node: ast.Name, bound: Bound) -> None:
        name, module = node.id, scope.module
        found = scope.find(name)
        if found is module.scope:
            if name not in self._bound[module.path]:
                what = f"`{name}` is bound under a condition only"
                self._add(step, node, what, "bind it at module level, always", name)
        elif found is step.function.scope:
            if name not in bound:
                self._add(step, node, f"`{name}` may not be bound yet", "bind it before the try", name)
        elif found is None and name not in BUILTINS and not _imports_star(module):
            self._add(step, node, f"`{name}` is bound nowhere", "import or define it at module level", name)

    def _see_reference(self, step: _Step, scope: Scope, node: ast.expr) -> None:
        functions = [each for each in self._program.origins(node, scope) if isinstance(each, Function)]
        self._reach_any(step, node, functions)

    def _see_module(self, step: _Step, scope: Scope, node: ast.Attribute) -> bool:
        """Look at a whole `a.b.c`; say whether somewhere in it a name is looked up on a module."""
        base = node.value
        while isinstance(base, ast.Attribute) and not self._modules(base, scope):
            base = base.value
        if not (modules := self._modules(base, scope)):
            return False
        shown = ast.unparse(node)
        name = shown.removeprefix(f"{ast.unparse(base)}.").split(".")[0]
        instead = f"bind it at module level: from {modules[0].name} import {name}"
        self._add(step, node, f"{shown} is looked up on a module", instead)
        return True

    def _modules(self, node: ast.expr, scope: Scope) -> list[Module | External]:
        found = self._program.origins(node, scope)
        return [
            each for each in found if isinstance(each, Module) or (isinstance(each, External) and is_module(each.name))
        ]

    def _see_use(self, step: _Step, scope: Scope, node: ast.AST, used: ast.expr) -> bool:
        """Look at what is called or entered; say whether that is a finding of its own."""
        shown = ast.unparse(used)
        if isinstance(used, ast.Name) and used.id in IMPORTING and scope.find(used.id) is None:
            self._add(step, used, f"{shown}() may import", "do it at module level")
            return True
        origins = self._program.origins(used, scope)
        for origin in origins:
            match origin:
                case External(name):
                    if _belongs(name, IMPORT):
                        self._add(step, used, f"{shown} imports", "do it at module level")
                        return True
                    if _belongs(name, LOCK):
                        instead = "let the error go on, or report it with tricorn.errors.report"
                        self._add(step, used, f"{shown} takes a lock", instead)
                        return True
                case Instance(cls) if isinstance(node, ast.withitem):
                    self._reach(step, used, self._program.methods(cls, *ENTERED))
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            for each in (used, *arguments):
                self._reach(step, used, self._callable(each, scope))
            if not any(isinstance(origin, Function | Class) for origin in origins):  # a builtin, or unknown
                for each in arguments:
                    self._see_special(step, scope, each)
        return False

    def _reach_any(self, step: _Step, node: ast.AST, functions: Iterable[Function]) -> None:
        for function in functions:
            self._reach(step, node, self._program.implementations(function))

    def _reach(self, step: _Step, node: ast.AST, functions: Iterable[Function]) -> None:
        for function in functions:
            origin = step.origin or f"{_shown(step.function.scope.module)}:{getattr(node, 'lineno', 0)}"
            self._reached.append(_Step(function, origin))

    def _add(self, step: _Step, node: ast.AST, what: str, instead: str, name: str = "") -> None:
        module = step.function.scope.module
        line = getattr(node, "lineno", 0)
        where = f"where the error path of {step.origin} comes" if step.origin else "on the error path"
        finding = Finding(_shown(module), line, "E2", f"{what}, {where}; {instead}")
        self._findings.setdefault((module.path, line, name or what), finding)


def _belongs(name: str, families: Sequence[str]) -> bool:
    return any(name == each or name.startswith((f"{each}.", f"{each}(")) for each in families)


def _imports_star(module: Module) -> bool:
    return "*" in module.scope.names


def _shown(module: Module) -> str:
    here = Path.cwd()
    return str(module.path.relative_to(here) if module.path.is_relative_to(here) else module.path)
