"""One module as source: its scopes, and what may have been bound to each name in them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from tokenize import COMMENT, DEDENT, ENCODING, INDENT, NEWLINE, NL, TokenError, TokenInfo, tokenize
from typing import NamedTuple, get_args
from warnings import catch_warnings, simplefilter

Definition = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
CLOSED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, *get_args(COMPREHENSIONS))
SPACE = {COMMENT, DEDENT, ENCODING, INDENT, NEWLINE, NL}


class Imported(NamedTuple):
    """What an import statement binds: a module, or a name in one."""

    module: str
    name: str | None


class Annotated(NamedTuple):
    """A name that is only declared."""

    annotation: ast.expr


class Given(NamedTuple):
    """What a call gives to a parameter."""

    node: ast.expr
    scope: Scope


@dataclass(eq=False)
class Scope:
    """The names of a module, a function, a lambda or a comprehension, each with what may have been bound to it."""

    module: Module
    parent: Scope | None
    owner: Class | None = None  # the class whose method this is
    names: dict[str, list[Source]] = field(default_factory=dict)

    def find(self, name: str) -> Scope | None:
        """The scope in which `name` is bound; None where it is in no scope, as builtins are."""
        scope: Scope | None = self
        while scope is not None and name not in scope.names:
            scope = scope.parent
        return scope


@dataclass(eq=False)
class Function:
    node: Definition
    scope: Scope

    @cached_property
    def is_generator(self) -> bool:
        return any(isinstance(each, ast.Yield | ast.YieldFrom) for each in own_nodes(self.node.body))


@dataclass(eq=False)
class Class:
    node: ast.ClassDef
    scope: Scope  # the one it stands in
    methods: dict[str, list[Function]] = field(default_factory=dict)  # several: a getter and a setter, two platforms
    # What is assigned to an attribute of the class or of its objects, each with the scope that it is evaluated in.
    attributes: dict[str, list[tuple[ast.expr | Annotated | Given, Scope]]] = field(default_factory=dict)


Source = ast.expr | Imported | Annotated | Given | Function | Class


@dataclass(eq=False)
class Module:
    path: Path
    name: str
    root: Path  # the directory that absolute imports of its own program start from
    tree: ast.Module
    scope: Scope = field(init=False)
    functions: list[Function] = field(default_factory=list)  # all, those inside others too
    classes: list[Class] = field(default_factory=list)


def read(path: Path) -> Module:
    parts = [] if path.name == "__init__.py" else [path.stem]
    root = path.parent
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    with catch_warnings():
        simplefilter("ignore")  # the author of a file should not hear about a backslash here
        module = Module(path, ".".join(parts), root, _parse(path.read_bytes(), str(path)))
    module.scope = Scope(module, None)
    _fill(module.scope, module.tree.body)
    return module


def _parse(text: bytes, file: str) -> ast.Module:
    """Return the tree that Python 3.15 makes of it: `is_lazy` of an import says that the word `lazy` precedes it."""
    try:
        return ast.parse(text, file)
    except SyntaxError:
        lines = text.splitlines(keepends=True)
        starts: set[tuple[int, int]] = set()
        for row, column, start in _lazy_imports(text):
            line, starts = lines[row - 1], {*starts, start}
            lines[row - 1] = line[:column] + b"pass;" + line[column + 4 :].removeprefix(b" ")
        if not starts:
            raise
    tree = ast.parse(b"".join(lines), file)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            vars(node)["is_lazy"] = (node.lineno, node.col_offset) in starts
    return tree


def _lazy_imports(text: bytes) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Find lazy imports (PEP 810): line and column, in bytes, of the word `lazy`, and of the import after it."""
    previous: list[TokenInfo] = []
    try:
        for token in tokenize(BytesIO(text).readline):
            match previous, token.string:
                case [before, lazy], "import" | "from" if before.type in SPACE or before.string in {";", ":"}:
                    if lazy.string == "lazy":
                        places = [(each.start[0], len(each.line[: each.start[1]].encode())) for each in (lazy, token)]
                        yield *places[0], places[1]
            previous = [*previous[-1:], token]
    except (TokenError, SyntaxError):
        return  # the parser tells what is wrong


def inner_scope(node: ast.Lambda | COMPREHENSIONS, parent: Scope) -> Scope:
    """The scope that an expression opens."""
    scope = Scope(parent.module, parent, parent.owner)
    if isinstance(node, ast.Lambda):
        _fill_parameters(scope, node.args)
    else:
        for generator in node.generators:
            for name in stored(generator.target):
                scope.names[name] = []
    return scope


def _fill(scope: Scope, body: list[ast.stmt], owner: Class | None = None) -> None:
    """Enter what statements bind, and the functions and classes that stand in them. `owner`: they are of its body."""
    module = scope.module
    elsewhere: set[str] = set()
    names: dict[str, list[Source]] = {}
    for node in own_nodes(body):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                inner = Scope(module, scope, owner or scope.owner)
                function = Function(node, inner)
                module.functions.append(function)
                names.setdefault(node.name, []).append(function)
                if owner is not None:
                    owner.methods.setdefault(node.name, []).append(function)
                _fill_parameters(inner, node.args)
                _fill(inner, node.body)
            case ast.ClassDef():
                cls = Class(node, scope)
                module.classes.append(cls)
                names.setdefault(node.name, []).append(cls)
                _fill(scope, node.body, cls)
                _fill_attributes(cls)
            case ast.Import() | ast.ImportFrom():
                for name, imported in bound_by(node, module):
                    names.setdefault(name, []).append(imported)
            case ast.Assign(targets=targets, value=value):
                for each, source in (pair for target in targets for pair in _pairs(target, value)):
                    if isinstance(each, ast.Name):
                        names.setdefault(each.id, []).append(source)
            case ast.ExceptHandler(name=str(name), type=ast.expr() as kind):
                names.setdefault(name, []).append(Annotated(kind))
            case ast.NamedExpr(target=ast.Name(id=name), value=value):
                names.setdefault(name, []).append(value)
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.setdefault(name, []).append(Annotated(node.annotation))
            case ast.withitem(context_expr=value, optional_vars=ast.Name(id=name)):
                names.setdefault(name, []).append(value)
            case ast.Global() | ast.Nonlocal():
                elsewhere.update(node.names)
            case _:
                for name in binds(node):
                    names.setdefault(name, [])
    if owner is None:  # the names of a class body are nobody's but its own
        for name in names.keys() - elsewhere:
            scope.names[name] = [*scope.names.get(name, ()), *names[name]]  # a parameter may be bound again


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What is assigned to what, as far as the source tells."""
    match target, value:
        case ast.Tuple(elts=targets) | ast.List(elts=targets), ast.Tuple(elts=values) | ast.List(elts=values) if len(
            targets
        ) == len(values):
            yield from (pair for each in zip(targets, values, strict=True) for pair in _pairs(*each))
        case ast.Name() | ast.Attribute(), _:
            yield target, value


def parameters(arguments: ast.arguments) -> list[ast.arg]:
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [argument for argument in every if argument]


def _fill_parameters(scope: Scope, arguments: ast.arguments) -> None:
    for argument in parameters(arguments):
        scope.names[argument.arg] = [Annotated(argument.annotation)] if argument.annotation else []


def own_nodes(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Everything in these nodes but what stands in functions, classes, lambdas and comprehensions of theirs."""
    waiting = [*reversed(nodes)]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, CLOSED):
            waiting += reversed([*ast.iter_child_nodes(node)])


def run_by(function: Function) -> Iterator[ast.AST]:
    """What calling a function evaluates, and the lambdas in it."""
    for node in own_nodes(function.node.body):
        yield node
        if isinstance(node, Definition):
            for each in [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]:
                yield from ast.walk(each)
        elif isinstance(node, ast.Lambda | COMPREHENSIONS):
            yield from (each for child in ast.iter_child_nodes(node) for each in ast.walk(child))


def code(module: Module) -> Iterator[tuple[Scope, Iterator[ast.AST]]]:
    """All that can run in a module, each with the scope in which it is evaluated."""
    yield module.scope, own_nodes(module.tree.body)
    for cls in module.classes:
        yield cls.scope, own_nodes(cls.node.body)
    for function in module.functions:
        yield function.scope, run_by(function)


def binds(node: ast.AST) -> list[str]:
    """The names that this node itself, without what is in it, binds in its scope."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()):
            return [name]
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            return [name]
        case ast.MatchMapping(rest=str(name)):
            return [name]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Import() | ast.ImportFrom():
            return [alias.asname or alias.name.split(".")[0] for alias in node.names]
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            inner = [each for each in ast.walk(node) if isinstance(each, ast.NamedExpr)]
            return [each.target.id for each in inner]  # `:=` binds around the comprehension
    return []


def stored(node: ast.AST) -> set[str]:
    """The names that this node, with what is in it, binds in its scope."""
    return {name for each in own_nodes([node]) for name in binds(each)}


def bound_by(node: ast.Import | ast.ImportFrom, module: Module) -> Iterator[tuple[str, Imported]]:
    for alias in node.names:
        if isinstance(node, ast.Import):
            top = alias.name.split(".")[0]
            yield alias.asname or top, Imported(alias.name if alias.asname else top, None)
            if not alias.asname and top != alias.name:
                yield top, Imported(alias.name, None)
        else:
            package: list[str] = []
            if node.level:
                package = module.name.split(".")
                package = package[: len(package) - node.level + (module.path.name == "__init__.py")]
            source = ".".join([*package, node.module] if node.module else package)
            yield alias.asname or alias.name, Imported(source, alias.name)


def _fill_attributes(cls: Class) -> None:
    for statement in cls.node.body:
        _fill_attribute(cls, statement, cls.scope)
    for method in (each for several in cls.methods.values() for each in several):
        for node in own_nodes(method.node.body):
            _fill_attribute(cls, node, method.scope)


def _fill_attribute(cls: Class, node: ast.AST, scope: Scope) -> None:
    pairs: list[tuple[ast.expr, ast.expr | Annotated]] = []
    match node:
        case ast.Assign(targets=targets, value=value):
            pairs = [pair for each in targets for pair in _pairs(each, value)]
        case ast.AnnAssign(target=target, annotation=annotation, value=value):
            pairs = [(target, Annotated(annotation)), *([(target, value)] if value else [])]
    for each, source in pairs:
        match each:
            case ast.Name(id=name) if scope is cls.scope:
                cls.attributes.setdefault(name, []).append((source, scope))
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if scope is not cls.scope:
                cls.attributes.setdefault(name, []).append((source, scope))
