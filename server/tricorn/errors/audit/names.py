"""Names that are bound nowhere, in every scope of a module: a module is walked in the order in which it runs."""

from __future__ import annotations

import ast
import builtins
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tricorn.errors.audit.flow import constant
from tricorn.errors.audit.source import COMPREHENSIONS, Definition, Module, binds, own_nodes, parameters, stored

# What a module has that nothing in it binds. `WindowsError` is a builtin on Windows only.
BUILTINS = {*dir(builtins), "__file__", "__builtins__", "__annotations__", "__class__", "WindowsError"}
IN_CLASSES = {"__module__", "__qualname__", "__firstlineno__"}


@dataclass(eq=False)
class _Names:
    """The names of a scope, as far as it has run."""

    parent: _Names | None
    bound: set[str]
    local: set[str] = field(default_factory=set)  # a function's: looked up nowhere else, bound or not
    elsewhere: dict[str, _Names] = field(default_factory=dict)  # by `global` and `nonlocal`
    kind: type[ast.AST] = ast.FunctionDef

    def has(self, name: str) -> bool:
        scope: _Names | None = self.elsewhere.get(name, self)
        while scope is not None:
            if name in scope.bound or ("*" in scope.bound and name not in scope.local):
                return True
            if name in scope.local:
                return scope is not self  # a function inside another may run while the name is bound
            scope = scope.parent
            while scope is not None and scope.kind is ast.ClassDef:
                scope = scope.parent
        return name in BUILTINS


def unbound(module: Module) -> list[ast.Name]:
    """The names that are looked up where nothing can have bound them.

    Functions run after the module has: they see what is bound at its end. In a loop, what its body binds counts as
    bound, since a round may have come before. Annotations count only if Python evaluates them. After
    `from … import *` any name of the module counts as bound.
    """
    return _Walk(module).unbound


class _Walk(ast.NodeVisitor):
    def __init__(self, module: Module) -> None:
        self.unbound: list[ast.Name] = []
        self._module = self._names = _Names(None, {"__path__"} if module.path.name == "__init__.py" else set())
        self._nonlocal: set[str] = set()
        self._later: deque[Callable[[], None]] = deque()
        self._in_branch = False
        self._name_error_handled = False
        self._annotations_are_text = False
        for node in ast.walk(module.tree):
            if isinstance(node, Definition | ast.ClassDef):  # it may bind names of other scopes, whenever it runs
                own = list(own_nodes(node.body))
                names = {name for each in own for name in binds(each)}
                for each in own:
                    if isinstance(each, ast.Global | ast.Nonlocal):
                        seen = self._module.bound if isinstance(each, ast.Global) else self._nonlocal
                        seen.update(names.intersection(each.names))
        self.visit(module.tree)
        while self._later:
            self._later.popleft()()

    def _all(self, nodes: Sequence[ast.AST | None]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    # Names

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._bind(node.id)
            return
        known = self._names.has(node.id)
        if isinstance(node.ctx, ast.Del):  # only what is bound in this very scope can be deleted
            known = not self._names.elsewhere.get(node.id, self._names).bound.isdisjoint({node.id, "*"})
        if not known and not self._name_error_handled:
            self.unbound.append(node)
        if isinstance(node.ctx, ast.Del) and not self._in_branch:
            self._unbind(node.id)

    def _bind(self, name: str | None) -> None:
        if name is not None:
            self._names.elsewhere.get(name, self._names).bound.add(name)

    def _unbind(self, name: str) -> None:
        if name not in self._names.elsewhere:
            self._names.bound.discard(name)

    def visit_Global(self, node: ast.Global) -> None:
        self._names.elsewhere |= dict.fromkeys(node.names, self._module)
        self._names.local -= set(node.names)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> None:
        for name in node.names:
            scope = self._names.parent
            while scope is not None and (scope.kind is ast.ClassDef or name not in scope.local | scope.bound):
                scope = scope.parent
            self._names.elsewhere[name] = scope or self._module
        self._names.local -= set(node.names)

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            self._bind(alias.asname or alias.name.split(".")[0])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "__future__" and any(alias.name == "annotations" for alias in node.names):
            self._annotations_are_text = True
        self.visit_Import(node)

    def visit_MatchAs(self, node: ast.MatchAs | ast.MatchStar) -> None:
        self.generic_visit(node)
        self._bind(node.name)

    visit_MatchStar = visit_MatchAs

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        self.generic_visit(node)
        self._bind(node.rest)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        scope = self._names
        while scope.kind is ast.comprehension and scope.parent is not None:
            scope = scope.parent
        scope.elsewhere.get(node.target.id, scope).bound.add(node.target.id)

    # Statements that evaluate in another order than they are written in, or not all of what is written

    def visit_Assign(self, node: ast.Assign) -> None:
        self._all([node.value, *node.targets])

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.visit(ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target))
        self._all([node.value, node.target])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if self._names.kind is not ast.FunctionDef:
            self._annotation(node.annotation)
        self.visit(node.value) if node.value else None
        if node.value or not isinstance(node.target, ast.Name):
            self.visit(node.target)

    def _annotation(self, node: ast.expr | None) -> None:
        if node is None or self._annotations_are_text:
            return
        if sys.version_info >= (3, 14):  # PEP 649
            self._defer(self._names, [node])
        else:
            self.visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        known = constant(node.test)
        with self._set(_in_branch=True):
            self._all([] if known is False else node.body)
            self._all([] if known is True else node.orelse)

    def visit_Match(self, node: ast.Match) -> None:
        self.visit(node.subject)
        with self._set(_in_branch=True):
            self._all(node.cases)

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self._all([node.iter, node.target])
        self._loop(node.body)
        self._all(node.orelse)

    visit_AsyncFor = visit_For

    def visit_While(self, node: ast.While) -> None:
        if constant(node.test) is not False:
            self._loop([node.test, *node.body])
        self._all(node.orelse)

    def _loop(self, nodes: Sequence[ast.AST]) -> None:
        for each in own_nodes(nodes):
            for name in () if isinstance(each, ast.ExceptHandler) else binds(each):
                self._bind(name)
        self._all(nodes)

    def visit_Try(self, node: ast.Try | ast.TryStar) -> None:
        caught = [each for handler in node.handlers if handler.type for each in ast.walk(handler.type)]
        handled = any(isinstance(each, ast.Name) and each.id == "NameError" for each in caught)
        with self._set(_name_error_handled=handled or self._name_error_handled):
            self._all(node.body)
        self._all([*node.handlers, *node.orelse, *node.finalbody])

    visit_TryStar = visit_Try

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        before = node.name is not None and node.name in self._names.elsewhere.get(node.name, self._names).bound
        self._all([node.type])
        self._bind(node.name)
        self._all(node.body)
        if node.name and not before:
            self._unbind(node.name)

    @contextmanager
    def _set(self, **values: object) -> Iterator[None]:
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        yield
        vars(self).update(before)

    # Scopes

    def _defer(self, names: _Names, nodes: Sequence[ast.AST | None]) -> None:
        """Walk these nodes in this scope after what is being walked: they run when a function is called."""

        def later() -> None:
            with self._set(_names=names, _in_branch=False, _name_error_handled=False):
                self._all(nodes)

        self._later.append(later)

    def _typed(self, node: ast.AST) -> _Names:
        """The scope of what has type parameters (PEP 695), which sees the names of the class that it stands in."""
        parameters = getattr(node, "type_params", [])
        if not parameters:
            return self._names
        seen = self._names.bound if self._names.kind is ast.ClassDef else set()
        names = _Names(self._names, {*seen, *(each.name for each in parameters)})
        self._defer(names, parameters)
        return names

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._all([*node.decorator_list, *node.args.defaults, *node.args.kw_defaults])
        with self._set(_names=self._typed(node)):
            every = parameters(node.args)
            for annotation in (*(each.annotation for each in every), node.returns):
                self._annotation(annotation)
            names = _Names(self._names, {each.arg for each in every})
        names.local = {name for each in node.body for name in stored(each)}
        if from_inside := names.local & self._nonlocal:
            inside = [each for each in ast.walk(node) if isinstance(each, ast.Nonlocal)]
            names.bound |= from_inside.intersection(name for each in inside for name in each.names)
        self._defer(names, node.body)
        self._bind(node.name)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._all([*node.args.defaults, *node.args.kw_defaults])
        self._defer(_Names(self._names, {each.arg for each in parameters(node.args)}), [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._all(node.decorator_list)
        with self._set(_names=self._typed(node)):
            self._all([*node.bases, *node.keywords])
            with self._set(_names=_Names(self._names, set(IN_CLASSES), kind=ast.ClassDef), _in_branch=False):
                self._all(node.body)
        self._bind(node.name)

    def visit_TypeAlias(self, node: ast.AST) -> None:
        name, value = (child for field, child in ast.iter_fields(node) if field in {"name", "value"})
        self.visit(name)
        self._defer(self._typed(node), [value])

    def visit_ListComp(self, node: COMPREHENSIONS) -> None:
        self.visit(node.generators[0].iter)
        with self._set(_names=_Names(self._names, set(), kind=ast.comprehension)):
            for generator in node.generators:
                self._all([] if generator is node.generators[0] else [generator.iter])
                self._all([generator.target, *generator.ifs])
            self._all([child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.comprehension)])

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp
