"""Through a function in the order in which it runs: which names are surely bound, and what only a failure gets to."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Protocol

from tricorn.errors.audit.source import stored

Bound = frozenset[str]
Reached = Bound | None  # None: nothing gets here

FACTS = {"TYPE_CHECKING", "__name__", "__debug__", "platform", "version_info", "os.name", "platform.system"}
FACTS |= {f"sys.{name}" for name in ("platform", "version_info", "implementation", "maxsize")}


class See(Protocol):
    def __call__(self, node: ast.AST, bound: Bound, failing: bool) -> None:
        """Look at an expression, or at a statement that has no others in it. `failing`: only a failure gets here."""


class Flow:
    """One walk. `failing`: all of it is part of the error path, not only what handles errors in it."""

    def __init__(self, see: See, failing: bool = False) -> None:
        self._see = see
        self._failing = failing
        self._breaks: list[list[Bound]] = []

    def block(self, statements: Sequence[ast.stmt], bound: Reached) -> Reached:
        """The names that are surely bound after these statements; None where nothing goes on behind them."""
        for statement in statements:
            if bound is None:
                return None
            bound = self._statement(statement, bound)
        return bound

    def _statement(self, node: ast.stmt, bound: Bound) -> Reached:
        match node:
            case ast.If():
                return self._branch(node, bound)
            case ast.Try() | ast.TryStar():
                return self._try(node, bound)
            case ast.With() | ast.AsyncWith():
                return self._with(node, bound)
            case ast.While():
                return self._loop(node, self._seen([node.test], bound), endless=constant(node.test) is True)
            case ast.For() | ast.AsyncFor():
                return self._loop(node, self._seen([node.iter], bound), endless=False)
            case ast.Match():
                return self._match(node, bound)
            case ast.Return() | ast.Raise():
                self._seen([node], bound)
                return None
            case ast.Break():
                self._breaks[-1].append(bound)
                return None
            case ast.Continue():
                return None
            case ast.Delete():
                return self._seen([node], bound) - {
                    target.id for target in node.targets if isinstance(target, ast.Name)
                }
            case ast.AnnAssign(target=ast.Name(), value=None):
                return bound  # declared, not bound
        return self._seen([node], bound)

    def _seen(self, nodes: Iterable[ast.AST], bound: Bound) -> Bound:
        for node in nodes:
            self._see(node, bound, self._failing)
            bound |= stored(node)
        return bound

    def _branch(self, node: ast.If, bound: Bound) -> Reached:
        bound = self._seen([node.test], bound)
        then, otherwise = self.block(node.body, bound), self.block(node.orelse, bound)
        if (known := constant(node.test)) is not None:
            return then if known else otherwise
        if is_fact(node.test):  # what the other platform would bind is not missed on this one
            return bound if then is None and otherwise is None else (then or bound) | (otherwise or bound)
        return _either(then, otherwise)

    def _try(self, node: ast.Try | ast.TryStar, bound: Bound) -> Reached:
        body = self.block(node.body, bound)
        ends = [self.block(node.orelse, body)]
        around, self._failing = self._failing, True
        for handler in node.handlers:
            self._see(handler, bound, True)
            named = {handler.name} if handler.name else set()
            end = self.block(handler.body, bound | named)
            ends.append(None if end is None else end - named)
        last = self.block(node.finalbody, bound)
        self._failing = around
        end = reduce(_either, ends)
        return None if end is None or last is None else end | last

    def _with(self, node: ast.With | ast.AsyncWith, bound: Bound) -> Reached:
        entered = self._seen(node.items, bound)
        end = self.block(node.body, entered)
        return _either(end, entered) if any(map(suppresses, node.items)) else end

    def _loop(self, node: ast.While | ast.For | ast.AsyncFor, bound: Bound, endless: bool) -> Reached:
        self._breaks.append([])
        target = frozenset() if isinstance(node, ast.While) else stored(node.target)
        self.block(node.body, bound | target)
        breaks = self._breaks.pop()
        return reduce(_either, breaks, None if endless else self.block(node.orelse, bound))

    def _match(self, node: ast.Match, bound: Bound) -> Reached:
        bound = self._seen([node.subject], bound)
        ends: list[Reached] = []
        for case in node.cases:
            entered = self._seen(filter(None, [case.pattern, case.guard]), bound)
            ends.append(self.block(case.body, entered))
        last = node.cases[-1]
        exhaustive = last.guard is None and isinstance(last.pattern, ast.MatchAs) and last.pattern.pattern is None
        return reduce(_either, ends, None if exhaustive else bound)


def _either(one: Reached, other: Reached) -> Reached:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def constant(test: ast.expr) -> bool | None:
    """What a condition always is at run time, where its text tells."""
    match test:
        case ast.Constant(value=value):
            return bool(value)
        case ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"):
            return False
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            known = constant(operand)
            return None if known is None else not known
    return None


def is_fact(test: ast.expr) -> bool:
    """Whether a condition is the same for as long as the program runs, whatever happens: it is about the platform."""
    match test:
        case ast.Name(id=name):
            return name in FACTS
        case ast.Attribute(value=value, attr=name):
            return name == "TYPE_CHECKING" or ast.unparse(test) in FACTS or is_fact(value)
    return all(is_fact(part) for part in ast.iter_child_nodes(test) if isinstance(part, ast.expr))


def suppresses(item: ast.withitem) -> bool:
    """Whether this is `contextlib.suppress`, behind which the program goes on as if nothing had happened."""
    match item.context_expr:
        case ast.Call(func=ast.Name(id="suppress") | ast.Attribute(attr="suppress")):
            return True
    return False


def surely_bound(tree: ast.Module) -> Bound:
    """The names that are bound once a module has been imported, whatever happened meanwhile."""
    bound = Flow(lambda node, bound, failing: None).block(tree.body, frozenset())
    return bound if bound is not None else frozenset(stored(tree))
