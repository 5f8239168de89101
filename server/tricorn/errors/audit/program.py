"""A program as source: its modules, and what the names in them refer to. Nothing of it is imported or run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tricorn.errors.audit.source import Annotated, Class, Function, Imported, Module, Scope, bound_by, read

INSTALLED = {"site-packages", "dist-packages"}  # there, what stands in the same directory is other people's


class External(NamedTuple):
    """Something of another program, by its dotted name; what a call made of it has `()` behind that."""

    name: str


class Instance(NamedTuple):
    """An object of a class."""

    of: Class


Origin = Module | Class | Instance | Function | External


class Program:
    """Files, and what they import from their own directory or package, all the way.

    Raises OSError, SyntaxError, or ValueError for a file that cannot be read.
    """

    def __init__(self, files: list[Path]) -> None:
        self._modules: dict[Path, Module] = {}
        self._resolving: set[ast.expr | tuple[Scope, str]] = set()  # names may refer to each other in a circle
        waiting = [path.resolve() for path in files]
        while waiting:
            path = waiting.pop()
            if path not in self._modules:
                self._modules[path] = module = read(path)
                waiting += self._imports(module)

    @property
    def modules(self) -> list[Module]:
        return [self._modules[path] for path in sorted(self._modules)]

    def _imports(self, module: Module) -> Iterator[Path]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for _, imported in bound_by(node, module):
                    for name in (imported.module, f"{imported.module}.{imported.name}"):
                        if path := _own_file(module, name):
                            yield path

    # What an expression refers to

    def origin(self, node: ast.expr, scope: Scope) -> Origin | None:
        """What `node`, evaluated in `scope`, refers to, as far as the source tells."""
        if node in self._resolving:
            return None
        self._resolving.add(node)
        try:
            return self._origin(node, scope)
        finally:
            self._resolving.remove(node)

    def _origin(self, node: ast.expr, scope: Scope) -> Origin | None:
        match node:
            case ast.Name(id=name):
                found = scope.find(name)
                return None if found is None else self._named(name, found)
            case ast.Attribute(value=value, attr=name):
                return self._member(self.origin(value, scope), name)
            case ast.Call(func=ast.Name(id="super")) if scope.owner is not None:
                return next((Instance(base) for base in self._bases(scope.owner)), None)
            case ast.Call(func=function):
                return self._result(self.origin(function, scope))
            case ast.BoolOp(values=choice):
                return self._first(choice, scope)
            case ast.IfExp(body=body, orelse=orelse):
                return self._first([body, orelse], scope)
            case ast.Await(value=value):
                return self.origin(value, scope)
        return None

    def _first(self, choice: list[ast.expr], scope: Scope) -> Origin | None:
        return next((found for node in choice if (found := self.origin(node, scope))), None)

    def _named(self, name: str, scope: Scope) -> Origin | None:
        if (scope, name) in self._resolving:
            return None
        self._resolving.add((scope, name))
        try:
            return self._bound(name, scope)
        finally:
            self._resolving.remove((scope, name))

    def _bound(self, name: str, scope: Scope) -> Origin | None:
        if scope.owner is not None and name in {"self", "cls"}:
            return Instance(scope.owner) if name == "self" else scope.owner
        for source in scope.names[name]:
            match source:
                case Function() | Class():
                    return source
                case Imported():
                    return self._imported(source, scope.module)
                case Annotated():
                    return self._declared(source.annotation, scope)
                case _:
                    origin = self.origin(source, scope)
            if origin is not None:
                return origin
        return None

    def _imported(self, imported: Imported, importer: Module) -> Origin | None:
        path = _own_file(importer, imported.module)
        module = None if path is None else self._modules.get(path)
        origin: Origin = External(imported.module) if module is None else module
        return origin if imported.name is None else self._member(origin, imported.name)

    def _declared(self, annotation: ast.expr, scope: Scope) -> Origin | None:
        match annotation:
            case ast.Constant(value=str(text)):
                try:
                    quoted = ast.parse(text, mode="eval").body
                except SyntaxError:
                    return None
                return self._declared(quoted, scope)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self._declared(left, scope) or self._declared(right, scope)
            case ast.Subscript():
                return None
        return self._result(self.origin(annotation, scope))

    def _result(self, origin: Origin | None) -> Origin | None:
        """What calling it returns."""
        match origin:
            case Class():
                return Instance(origin)
            case External(name):
                return External(f"{name}()")
            case Function() if origin.node.returns is not None:
                return self._declared(origin.node.returns, origin.scope)
        return None

    def _member(self, origin: Origin | None, name: str) -> Origin | None:
        match origin:
            case External():
                return External(f"{origin.name}.{name}")
            case Module():
                if name in origin.scope.names:
                    return self._named(name, origin.scope)
                path = _own_file(origin, f"{origin.name}.{name}")
                return self._modules.get(path) if path else None
            case Class() | Instance():
                cls = origin if isinstance(origin, Class) else origin.of
                return self._method(cls, name) or self._attribute(cls, name)
        return None

    # Classes

    def _bases(self, cls: Class) -> Iterator[Class]:
        for node in cls.node.bases:
            if isinstance(base := self.origin(node, cls.scope), Class):
                yield base

    def _line(self, cls: Class) -> list[Class]:
        """The class and all that it inherits from."""
        line = [cls]
        for each in line:
            line += [base for base in self._bases(each) if base not in line]
        return line

    def _method(self, cls: Class, name: str) -> Function | None:
        return next((each.methods[name] for each in self._line(cls) if name in each.methods), None)

    def _attribute(self, cls: Class, name: str) -> Origin | None:
        for each in self._line(cls):
            for node, scope in each.attributes.get(name, []):
                origin = (
                    self._declared(node.annotation, scope) if isinstance(node, Annotated) else self.origin(node, scope)
                )
                if origin is not None:
                    return origin
        return None

    def methods(self, cls: Class, *names: str) -> Iterator[Function]:
        """Those of the methods that the class has."""
        for name in names:
            if found := self._method(cls, name):
                yield found

    def implementations(self, function: Function) -> Iterator[Function]:
        """The function, and where it is a method, those that may stand in for it.

        These are methods of the classes that inherit from its own, or that have what its own asks for as a protocol.
        """
        yield function
        owner, name = function.scope.owner, function.node.name
        if owner is None:
            return
        protocol = any(self.origin(base, owner.scope) == External("typing.Protocol") for base in owner.node.bases)
        for module in self.modules:
            for cls in module.classes:
                if name not in cls.methods or cls is owner:
                    continue
                if owner in self._line(cls) or (protocol and all(self._method(cls, each) for each in owner.methods)):
                    yield cls.methods[name]


@cache
def is_module(name: str) -> bool:
    """Whether another program's dotted name is a module: one that is loaded, or that has a file."""
    return name in sys.modules or locate(name) is not None


def locate(name: str) -> Path | None:
    """The file of the module that importing `name` would run; None where there is none with source."""
    return next((path for directory in sys.path if (path := _file(Path(directory or "."), name))), None)


def defines(path: Path, name: str) -> bool:
    """Whether the module in this file binds a name, as far as its source tells."""
    names = read(path.resolve()).scope.names
    return name in names or "*" in names


def python_files(directory: Path) -> list[Path]:
    """The Python files in a directory, but for those in hidden directories and virtual environments."""
    found: list[Path] = []
    for path in directory.iterdir():
        if path.is_dir():
            if not path.name.startswith(".") and not (path / "pyvenv.cfg").exists():
                found += python_files(path)
        elif path.suffix == ".py":
            found.append(path)
    return found


def _file(directory: Path, name: str) -> Path | None:
    *packages, last = name.split(".")
    parent = directory.joinpath(*packages)
    return next((path for path in (parent / last / "__init__.py", parent / f"{last}.py") if path.is_file()), None)


def _own_file(module: Module, name: str) -> Path | None:
    """The file of a module, if it belongs to the same program as the module that imports it."""
    if INSTALLED.isdisjoint(module.root.parts) or name.split(".")[0] == module.name.split(".")[0]:
        return _file(module.root, name)
    return None
