"""One module as source: its scopes, and what may have been bound to each name in them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from warnings import catch_warnings, simplefilter

Definition = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


class Imported(NamedTuple):
    """What an import statement binds: a module, or a name in one."""

    module: str
    name: str | None


class Annotated(NamedTuple):
    """A name that is only declared."""

    annotation: ast.expr


@dataclass(eq=False)
class Scope:
    """The names of a module, a function, a lambda or a comprehension, each with what may have been bound to it."""

    module: Module
    parent: Scope | None
    owner: Class | None = None  # the class whose method this is
    names: dict[str, list[ast.expr | Imported | Annotated | Function | Class]] = field(default_factory=dict)

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


@dataclass(eq=False)
class Class:
    node: ast.ClassDef
    scope: Scope  # the one it stands in
    methods: dict[str, Function] = field(default_factory=dict)
    # What is assigned to an attribute of the class or of its objects, each with the scope that it is evaluated in.
    attributes: dict[str, list[tuple[ast.expr | Annotated, Scope]]] = field(default_factory=dict)


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
        simplefilter("ignore")  # it is not here that a file's author wants to hear of a backslash
        tree = ast.parse(path.read_bytes(), str(path))
    module = Module(path, ".".join(parts), root, tree)
    module.scope = Scope(module, None)
    _fill(module.scope, module.tree.body)
    return module


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
    names: dict[str, list[ast.expr | Imported | Annotated | Function | Class]] = {}
    for node in own_nodes(body):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                inner = Scope(module, scope, owner or scope.owner)
                function = Function(node, inner)
                module.functions.append(function)
                names.setdefault(node.name, []).append(function)
                if owner is not None:
                    owner.methods[node.name] = function
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
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names.setdefault(name, []).append(value)
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
        scope.names.update((name, sources) for name, sources in names.items() if name not in elsewhere)


def _fill_parameters(scope: Scope, arguments: ast.arguments) -> None:
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for argument in filter(None, every):
        scope.names[argument.arg] = [Annotated(argument.annotation)] if argument.annotation else []


def own_nodes(nodes: list[ast.stmt] | list[ast.AST]) -> Iterator[ast.AST]:
    """Everything in these nodes but what stands in functions, classes, lambdas and comprehensions of theirs."""
    for node in nodes:
        yield node
        if not isinstance(node, Definition | ast.ClassDef | ast.Lambda | COMPREHENSIONS):
            yield from own_nodes(list(ast.iter_child_nodes(node)))


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
    for method in cls.methods.values():
        for node in own_nodes(method.node.body):
            _fill_attribute(cls, node, method.scope)


def _fill_attribute(cls: Class, node: ast.AST, scope: Scope) -> None:
    in_class = scope is cls.scope
    match node:
        case ast.Assign(targets=[target], value=value):
            sources: list[ast.expr | Annotated] = [value]
        case ast.AnnAssign(target=target, annotation=annotation, value=value):
            sources = [Annotated(annotation), *([value] if value else [])]
        case _:
            return
    match target:
        case ast.Name(id=name) if in_class:
            pass
        case ast.Attribute(value=ast.Name(id="self"), attr=name) if not in_class:
            pass
        case _:
            return
    cls.attributes.setdefault(name, []).extend((source, scope) for source in sources)
