"""A program as source: its modules, and what the names in them refer to. Nothing of it is imported or run."""

from __future__ import annotations

import ast
import builtins
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from tricorn.errors.audit.source import (
    Annotated,
    Class,
    Function,
    Given,
    Imported,
    Module,
    Scope,
    bound_by,
    code,
    inner_scope,
    own_nodes,
    parameters,
    read,
)

FAILURES = ("Error", "Exception", "ExceptionGroup", "Warning", "Exit", "Interrupt")  # how exceptions are named
TRANSPARENT = {"Annotated", "ClassVar", "Final", "NotRequired", "Optional", "Required", "Union"}
WRAPPING = {
    "cache",
    "cached_property",
    "classmethod",
    "lru_cache",
    "partial",
    "partialmethod",
    "property",
    "staticmethod",
}
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
        self._files: dict[tuple[Path, str], Path | None] = {}
        self._known: dict[ast.expr, tuple[Origin, ...]] = {}
        self._resolving: set[ast.expr | tuple[Scope, str]] = set()  # names may refer to each other in a circle
        self._anonymous: dict[ast.expr, Function] = {}
        self._lines: dict[Class, list[Class]] = {}
        waiting = [path.resolve() for path in files]
        while waiting:
            path = waiting.pop()
            if path not in self._modules:
                self._modules[path] = module = read(path)
                waiting += self._imports(module)
        self._having: defaultdict[str, list[Class]] = defaultdict(list)  # by the name of a method
        for module in self.modules:
            for cls in module.classes:
                for name in cls.methods:
                    self._having[name].append(cls)
        for module in self.modules:
            for scope, nodes in code(module):
                for node in nodes:
                    if isinstance(node, ast.Call) and (node.args or node.keywords):
                        self._give(node, scope)
        self._known.clear()  # more is known now

    @property
    def modules(self) -> list[Module]:
        return [self._modules[path] for path in sorted(self._modules)]

    def _imports(self, module: Module) -> Iterator[Path]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for _, imported in bound_by(node, module):
                    for name in (imported.module, f"{imported.module}.{imported.name}"):
                        if path := self._own_file(module, name):
                            yield path

    def _give(self, call: ast.Call, scope: Scope) -> None:
        """Let the parameters of what is called know what they are given: it may be a function."""
        for origin in self.origins(call.func, scope):
            functions = [origin] if isinstance(origin, Function) else []
            fields: list[str] = []
            if isinstance(origin, Class):
                functions = list(self.methods(origin, "__init__"))
                fields = [name for each in reversed(self._line(origin)) for name in each.attributes]
            for function in functions:
                names = [each.arg for each in parameters(function.node.args)]
                for name, node in _given(call, names[names[:1] in (["self"], ["cls"]) :]):
                    function.scope.names[name].append(Given(node, scope))
            if isinstance(origin, Class) and not functions:  # a dataclass, or the like
                for name, node in _given(call, fields):
                    origin.attributes.setdefault(name, []).append((Given(node, scope), scope))

    def _own_file(self, module: Module, name: str) -> Path | None:
        """The file of a module, if it belongs to the same program as the module that imports it."""
        if INSTALLED.isdisjoint(module.root.parts) or name.split(".")[0] == module.name.split(".")[0]:
            if (module.root, name) not in self._files:
                self._files[module.root, name] = _file(module.root, name)
            return self._files[module.root, name]
        return None

    # What an expression refers to

    def origins(self, node: ast.expr, scope: Scope) -> tuple[Origin, ...]:
        """All that `node`, evaluated in `scope`, may refer to, as far as the source tells."""
        if node not in self._known:
            if node in self._resolving:
                return ()
            self._resolving.add(node)
            try:
                found = tuple(dict.fromkeys(self._origins(node, scope)))
            finally:
                self._resolving.remove(node)
            if self._resolving:  # in a circle this may not be all
                return found
            self._known[node] = found
        return self._known[node]

    def _origins(self, node: ast.expr, scope: Scope) -> Iterable[Origin]:
        match node:
            case ast.Name(id=name):
                found = scope.find(name)
                return () if found is None else self._named(name, found)
            case ast.Attribute(value=value, attr=name):
                members = [each for origin in self.origins(value, scope) for each in self._members(origin, name)]
                return [
                    origin
                    for each in members
                    for origin in (self._results(each, True) if is_property(each) else [each])
                ]
            case ast.Call(func=ast.Name(id="super")) if scope.owner is not None:
                return map(Instance, self._bases(scope.owner))
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[*given]) if name in WRAPPING:
                return self._functions(given, scope)
            case ast.Call(func=function) | ast.Await(value=ast.Call(func=function)):
                awaited = isinstance(node, ast.Await)
                return [each for made in self.origins(function, scope) for each in self._results(made, awaited)]
            case ast.BoolOp(values=choice):
                return self._any(choice, scope)
            case ast.IfExp(body=body, orelse=orelse):
                return self._any([body, orelse], scope)
            case ast.Await(value=value):
                return [each for each in self.origins(value, scope) if not isinstance(each, Function)]
            case ast.NamedExpr(value=value):
                return self.origins(value, scope)
            case ast.Lambda() | ast.GeneratorExp():
                return [self._anonymous.setdefault(node, _as_function(node, scope))]
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts) | ast.Dict(values=parts):
                return self._functions(parts, scope)  # those who have the container can call what is in it
            case ast.Subscript(value=value) | ast.Starred(value=value):
                return self._functions([value], scope)
        return ()

    def _any(self, nodes: list[ast.expr], scope: Scope) -> list[Origin]:
        return [each for node in nodes for each in self.origins(node, scope)]

    def _functions(self, nodes: list[ast.expr], scope: Scope) -> list[Origin]:
        return [each for each in self._any(nodes, scope) if isinstance(each, Function)]

    def _named(self, name: str, scope: Scope) -> list[Origin]:
        if (scope, name) in self._resolving:
            return []
        self._resolving.add((scope, name))
        try:
            return list(self._bound(name, scope))
        finally:
            self._resolving.remove((scope, name))

    def _bound(self, name: str, scope: Scope) -> Iterator[Origin]:
        if scope.owner is not None and name in {"self", "cls"}:
            yield Instance(scope.owner) if name == "self" else scope.owner
            return
        for source in scope.names[name]:
            match source:
                case Function() | Class():
                    yield source
                case Imported():
                    yield from self._imported(source, scope.module)
                case _:
                    yield from self._valued(source, scope)

    def _valued(self, source: ast.expr | Annotated | Given, scope: Scope) -> Iterable[Origin]:
        match source:
            case Annotated():
                return self._declared(source.annotation, scope)
            case Given():
                return self._functions([source.node], source.scope)
        return self.origins(source, scope)

    def _imported(self, imported: Imported, importer: Module) -> Iterable[Origin]:
        path = self._own_file(importer, imported.module)
        module = None if path is None else self._modules.get(path)
        origin: Origin = External(imported.module) if module is None else module
        return [origin] if imported.name is None else self._members(origin, imported.name)

    def _declared(self, annotation: ast.expr, scope: Scope) -> Iterator[Origin]:
        """What a value with this annotation is, or one that this `except` clause catches."""
        match annotation:
            case ast.Constant(value=str(text)):
                try:
                    yield from self._declared(ast.parse(text, mode="eval").body, scope)
                except SyntaxError:
                    return
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                yield from [*self._declared(left, scope), *self._declared(right, scope)]
            case ast.Tuple(elts=parts):
                yield from (each for part in parts for each in self._declared(part, scope))
            case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=part) if name in TRANSPARENT:
                yield from self._declared(part, scope)
            case ast.Subscript(value=ast.Name(id="type" | "Type"), slice=part):
                yield from self.origins(part, scope)
            case ast.Subscript(value=value):
                yield from self._declared(value, scope)
            case ast.Name(id="Self") | ast.Attribute(attr="Self") if scope.owner is not None:
                yield Instance(scope.owner)
            case _:
                for origin in self.origins(annotation, scope):
                    yield from self._results(origin, awaited=True)

    def _results(self, origin: Origin, awaited: bool) -> Iterator[Origin]:
        """What calling it returns. What runs a function is that function: its generator, or its coroutine."""
        match origin:
            case Class():
                yield Instance(origin)
            case External(name):
                yield External(f"{name}()")
            case Instance(cls):
                for function in self.methods(cls, "__call__"):
                    yield from self._results(function, awaited)
            case Function(node=node):
                if node.returns is not None:
                    yield from self._declared(node.returns, origin.scope)
                runs_later = isinstance(node, ast.AsyncFunctionDef) and not awaited
                if not node.decorator_list and (runs_later or origin.is_generator):
                    yield origin

    def _members(self, origin: Origin, name: str) -> Iterable[Origin]:
        match origin:
            case External():
                return [External(f"{origin.name}.{name}")]
            case Module():
                if name in origin.scope.names:
                    return self._named(name, origin.scope)
                path = self._own_file(origin, f"{origin.name}.{name}")
                return [self._modules[path]] if path in self._modules else []
            case Class() | Instance():
                cls = origin if isinstance(origin, Class) else origin.of
                return [*self.methods(cls, name), *self._attributes(cls, name)]
        return ()

    # Classes

    def _bases(self, cls: Class) -> Iterator[Class]:
        for node in cls.node.bases:
            yield from (base for base in self.origins(node, cls.scope) if isinstance(base, Class))

    def _line(self, cls: Class) -> list[Class]:
        """The class and all that it inherits from."""
        if cls not in self._lines:
            line = [cls]
            for each in line:
                line += [base for base in self._bases(each) if base not in line]
            self._lines[cls] = line
        return self._lines[cls]

    def _attributes(self, cls: Class, name: str) -> Iterator[Origin]:
        for each in self._line(cls):
            for node, scope in each.attributes.get(name, []):
                yield from self._valued(node, scope)

    def methods(self, cls: Class, *names: str) -> Iterator[Function]:
        """Those of the methods that the class has."""
        for name in names:
            yield from next((each.methods[name] for each in self._line(cls) if name in each.methods), ())

    def makers(self, cls: Class) -> Iterator[Function]:
        """What making an object runs, and what makes the values of its fields."""
        yield from self.methods(cls, "__new__", "__init__", "__post_init__")
        for each in self._line(cls):
            for node, scope in (pair for several in each.attributes.values() for pair in several):
                if isinstance(node, ast.Call):
                    factories = [keyword.value for keyword in node.keywords if (keyword.arg or "").endswith("factory")]
                    yield from (made for made in self._functions(factories, scope) if isinstance(made, Function))

    def special_methods(self, cls: Class) -> Iterator[Function]:
        """The methods that Python calls for an object by itself, but for those of making, entering and calling it."""
        names = {name for each in self._line(cls) for name in each.methods if name[:2] == name[-2:] == "__"}
        yield from self.methods(cls, *sorted(names - NOT_IN_USE))

    def run_by(self, node: ast.Attribute, scope: Scope) -> Iterator[Function]:
        """What looking an attribute up runs, or setting it: properties, descriptors, `__getattr__` and the like."""
        for origin in self.origins(node.value, scope):
            if isinstance(origin, Class | Instance):
                cls = origin if isinstance(origin, Class) else origin.of
                members = list(self._members(origin, node.attr))
                for each in members:
                    if is_property(each) and isinstance(each, Function):
                        yield each
                    elif isinstance(each, Instance):
                        yield from self.methods(each.of, "__get__", "__set__", "__delete__")
                if isinstance(node.ctx, ast.Load):
                    yield from self.methods(cls, "__getattribute__", *([] if members else ["__getattr__"]))
                else:
                    yield from self.methods(cls, "__setattr__" if isinstance(node.ctx, ast.Store) else "__delattr__")

    def is_exception(self, cls: Class) -> bool:
        """Whether its objects can be raised. Classes of other programs are told by how they are named."""
        for each in self._line(cls):
            for node in each.node.bases:
                origins = self.origins(node, each.scope)
                if any(isinstance(origin, External) and origin.name.endswith(FAILURES) for origin in origins):
                    return True
                kind = getattr(builtins, node.id, None) if isinstance(node, ast.Name) and not origins else None
                if isinstance(kind, type) and issubclass(kind, BaseException):
                    return True
        return False

    def implementations(self, function: Function) -> Iterator[Function]:
        """The function, and where it is a method, those that may stand in for it.

        These are methods of the classes that inherit from its own, or that have what its own asks for as a protocol.
        """
        yield function
        owner, name = function.scope.owner, function.node.name
        if owner is None or function not in owner.methods.get(name, ()):
            return
        protocol = any(External("typing.Protocol") in self.origins(base, owner.scope) for base in owner.node.bases)
        for cls in self._having[name]:
            if owner in self._line(cls) or (protocol and all(any(self.methods(cls, each)) for each in owner.methods)):
                yield from cls.methods[name]

    def wrappers(self, function: Function) -> Iterator[Function]:
        """What its decorators may have put in its place: what is defined in them, or what they return."""
        outside = function.scope.parent or function.scope
        for node in function.node.decorator_list:
            for origin in self.origins(node.func if isinstance(node, ast.Call) else node, outside):
                match origin:
                    case Class():
                        yield from self.methods(origin, "__call__", "__get__", "__set__", "__delete__")
                    case Function():
                        yield from (each for each in origin.scope.module.functions if is_in(each.scope, origin.scope))
                        for each in own_nodes(origin.node.body):
                            if isinstance(each, ast.Return) and each.value:
                                found = self.origins(each.value, origin.scope)
                                yield from (made for made in found if isinstance(made, Function))


NOT_IN_USE = {
    *("__new__", "__init__", "__post_init__", "__init_subclass__", "__set_name__", "__call__", "__del__"),
    *("__enter__", "__exit__", "__aenter__", "__aexit__", "__get__", "__set__", "__delete__"),
    *("__getattr__", "__getattribute__", "__setattr__", "__delattr__"),
}


def _given(call: ast.Call, names: list[str]) -> Iterator[tuple[str, ast.expr]]:
    """What a call gives to these parameters, but for what it unpacks."""
    yield from zip(names, takewhile(lambda each: not isinstance(each, ast.Starred), call.args), strict=False)
    yield from ((each.arg, each.value) for each in call.keywords if each.arg in names)


def is_in(scope: Scope | None, around: Scope) -> bool:
    while scope is not None and scope is not around:
        scope = scope.parent
    return scope is not None


def is_property(origin: Origin) -> bool:
    """Whether looking it up calls it, and so does setting it."""
    if not isinstance(origin, Function):
        return False
    names = [ast.unparse(node).split(".")[-1] for node in origin.node.decorator_list]
    return any(name in {"setter", "getter", "deleter"} or name.endswith("property") for name in names)


def _as_function(node: ast.Lambda | ast.GeneratorExp, scope: Scope) -> Function:
    """What runs when a lambda is called, or when a generator expression is asked for more."""
    if isinstance(node, ast.Lambda):
        arguments, body, inner = node.args, node.body, inner_scope(node, scope)
    else:
        arguments, body, inner = ast.arguments([], [], None, [], [], None, []), node, Scope(scope.module, scope)
    definition = ast.FunctionDef("<lambda>", arguments, [ast.copy_location(ast.Expr(body), node)], [])
    return Function(ast.copy_location(definition, node), inner)


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
