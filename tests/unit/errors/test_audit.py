from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from shutil import which
from subprocess import run as run_command
from textwrap import dedent

import pytest

from tricorn.errors.audit import Finding, audit, python_files

TOP = "import it always, at the top of the module"
SWALLOWED = f"may fail, and the program goes on; {TOP}"
IMPORTS = "on the error path; do it at module level"
LOCKS = "takes a lock, on the error path; let the error go on, or report it with tricorn.errors.report"
NOWHERE = "`report` is bound nowhere, on the error path; import or define it at module level"
SOMETIMES = "`report` is bound under a condition only, on the error path; bind it at module level, always"


@pytest.fixture(autouse=True)
def in_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def found(source: str, name: str = "agent.py", bound: str = "", **others: str) -> list[str]:
    """The findings in a file, each as `line rule: message`, and the file first where it is another.

    `bound`: names that a line before the first one imports.
    """
    for other, text in others.items():
        Path(f"{other}.py").write_text(dedent(text))
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"from m import {bound}\n" * bool(bound) + dedent(source))
    findings = [finding._replace(line=finding.line - bool(bound)) for finding in audit([path])]
    return [str(finding).removeprefix(f"{path}:") for finding in findings]


def in_handler(statement: str, before: str = "") -> list[str]:
    """The findings where `statement` is line 100, in an except body."""
    lines = ["from m import TYPE_CHECKING, error, g, x", *before.splitlines()]
    lines += [""] * (96 - len(lines))
    return found(
        "\n".join(
            [
                *lines,
                "async def agent(run):",
                "    try: await run.say('')",
                "    except OSError as error:",
                f"        {statement}",
            ]
        )
    )


def looked_up(name: str, instead: str, where: str = "on the error path") -> str:
    return f"{name} is looked up on a module, {where}; bind it at module level: {instead}"


# E1


@pytest.mark.parametrize(
    ("source", "findings"),
    [
        ("def f():\n    import json", [f"2 E1: `import json` stands in f(); {TOP}"]),
        ("class C:\n  async def f(self):\n    if 1:\n      import b", [f"4 E1: `import b` stands in f(); {TOP}"]),
        ("try:\n    import a\nexcept ImportError:\n    a = None", [f"2 E1: `import a` {SWALLOWED}"]),
        (
            "try:\n    import a\nexcept ImportError:\n    import b as a",
            [f"2 E1: `import a` {SWALLOWED}", f"4 E1: `import b as a` depends on a failure; {TOP}"],
        ),
        ("with suppress(ImportError):\n    import a", [f"2 E1: `import a` {SWALLOWED}"]),
        ("import os\nif os.environ.get('STAGING'):\n    import a", [f"3 E1: `import a` depends on a condition; {TOP}"]),
        ("if name:\n    import a", [f"2 E1: `import a` depends on a condition; {TOP}"]),
        ("if detect():\n    import a", [f"2 E1: `import a` depends on a condition; {TOP}"]),
        ("for x in y:\n    import a", [f"2 E1: `import a` depends on a condition; {TOP}"]),
        ("match x:\n    case 1:\n        import a", [f"3 E1: `import a` depends on a condition; {TOP}"]),
    ],
)  # fmt: skip
def test_an_import_in_the_wrong_place(source: str, findings: list[str]) -> None:
    assert found(source, bound="detect, name, suppress, x, y") == findings


@pytest.mark.parametrize(
    "source",
    [
        "import a",
        "class C:\n    import a",
        "with quiet():\n    import a",
        "if TYPE_CHECKING:\n    import a",
        "if typing.TYPE_CHECKING:\n    import a\nelse:\n    import b",
        "if sys.platform == 'linux':\n    from select import epoll\nelse:\n    import a",
        "if sys.version_info >= (3, 12):\n    import a",
        "if sys.implementation.name == 'cpython' and not platform.system() == 'Windows':\n    import a",
        "if __name__ == '__main__':\n    import a",
        "try:\n    import a\nexcept ImportError:\n    raise SystemExit('pip install a')",
        "try:\n    import a\nfinally:\n    pass",
    ],
)
def test_an_import_in_a_place_that_is_right(source: str) -> None:
    assert found(source, bound="TYPE_CHECKING, platform, quiet, sys, typing") == []


# E1: lazy imports (PEP 810)


LAZILY = "is lazy: it runs where a name is first used"


@pytest.mark.parametrize(
    ("source", "findings"),
    [
        ("lazy import json", [f"1 E1: `lazy import json` {LAZILY}; {TOP}"]),
        ("import a\nlazy from . import b, c", [f"2 E1: `lazy from . import b, c` {LAZILY}; {TOP}"]),
        ("'text'\n# lazy import\nlazy from a.b import (\n  c,\n)", [f"3 E1: `lazy from a.b import c` {LAZILY}; {TOP}"]),
        ("é = 1; lazy import a; import b", [f"1 E1: `lazy import a` {LAZILY}; {TOP}"]),
        ("lazy \\\n import a", [f"2 E1: `lazy import a` {LAZILY}; {TOP}"]),
        ("if TYPE_CHECKING:\n  lazy import a", [f"2 E1: `lazy import a` {LAZILY}; {TOP}"]),
        ("if TYPE_CHECKING: lazy import a\nelse: lazy import b",
         [f"1 E1: `lazy import a` {LAZILY}; {TOP}", f"2 E1: `lazy import b` {LAZILY}; {TOP}"]),
        ("def f():\n  lazy import a", [f"2 E1: `lazy import a` stands in f(); {TOP}"]),
        ("lazy = 1\nprint(lazy)\nlazy\nimport a", []),
        ("def lazy(lazy): return lazy", []),
    ],
)  # fmt: skip
def test_a_lazy_import(source: str, findings: list[str]) -> None:
    assert found(source, bound="TYPE_CHECKING") == findings


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("__lazy_modules__ = {'traceback'}", "__lazy_modules__"),
        ("__lazy_modules__: list[str] = ['traceback']", "__lazy_modules__"),
        ("def f():\n  global __lazy_modules__; __lazy_modules__ = []", "__lazy_modules__"),
        ("import other\nother.__lazy_modules__ = ['json']", "other.__lazy_modules__"),
        ("import sys\nsys.set_lazy_imports('all')", "sys.set_lazy_imports"),
        ("import sys\ndef f(mode): sys.set_lazy_imports(mode)", "sys.set_lazy_imports"),
        ("from sys import set_lazy_imports as s\ns('all')", "s"),
        ("import sys\nsys.set_lazy_imports_filter(None)", "sys.set_lazy_imports_filter"),
        ("import sys\nsys.set_lazy_imports_filter(lambda *a: True)", "sys.set_lazy_imports_filter"),
        ("from importlib.util import LazyLoader\nLazyLoader(1)", "LazyLoader"),
        ("import os\nos.environ['PYTHON_LAZY_IMPORTS'] = 'all'", "PYTHON_LAZY_IMPORTS"),
        ("import os\nos.environ.setdefault('PYTHON_LAZY_IMPORTS', 'all')", "PYTHON_LAZY_IMPORTS"),
        ("import subprocess\nsubprocess.run(['python', '-X', 'lazy_imports=all'])", "lazy_imports=all"),
        ("import subprocess\nsubprocess.run(['x'], env={'PYTHON_LAZY_IMPORTS': 'all'})", "PYTHON_LAZY_IMPORTS"),
    ],
)
def test_what_makes_other_imports_lazy(source: str, what: str) -> None:
    line = source.count("\n") + 1
    message = f"{what} makes imports lazy: they run where a name is first used; remove it"
    assert [each for each in found(source) if " E7" not in each] == [f"{line} E1: {message}"]


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.set_lazy_imports('normal')\nsys.set_lazy_imports_filter(lambda *names: False)",
        "import os\nprint(os.environ)\nos.environ['PATH'] = 'lazy_imports'",
        "import sys\nprint(sys.get_lazy_imports())",
        "print('PYTHON_LAZY_IMPORTS')",
    ],
)
def test_what_makes_no_import_lazy(source: str) -> None:
    assert found(source) == []


# E2: what is called


@pytest.mark.parametrize(
    ("before", "statement", "what"),
    [
        ("import time", "time.time()", looked_up("time.time", "from time import time")),
        ("import os as o", "o.path.join()", looked_up("o.path.join", "from os.path import join")),
        ("from os import path", "path.join()", looked_up("path.join", "from os.path import join")),
        ("import os.path", "x = os.path.join", looked_up("os.path.join", "from os.path import join")),
        ("import time\nclock = time", "clock.time()", looked_up("clock.time", "from time import time")),
        ("import other", "other.f()", looked_up("other.f", "from other import f")),
        ("from importlib import import_module", "import_module('x')", f"import_module imports, {IMPORTS}"),
        ("", "__import__('x')", f"__import__() may import, {IMPORTS}"),
        ("", "exec('import x')", f"exec() may import, {IMPORTS}"),
        ("import logging\nlog = logging.getLogger()", "log.error(error)", f"log.error {LOCKS}"),
        ("import logging", "logging.error(error)", f"logging.error {LOCKS}"),
        ("from threading import Lock\nlock = Lock()", "with lock: pass", f"lock {LOCKS}"),
        ("from threading import Lock\nlock = Lock()", "lock.acquire()", f"lock.acquire {LOCKS}"),
        ("import time", "x = [time.time() for _ in ()]", looked_up("time.time", "from time import time")),
        ("import time", "x = lambda: time.time()", looked_up("time.time", "from time import time")),
        ("import time", "raise time.Broken from error", looked_up("time.Broken", "from time import Broken")),
    ],
)  # fmt: skip
def test_what_an_except_body_may_not_call(before: str, statement: str, what: str) -> None:
    Path("other.py").write_text("def f(): ...")
    assert in_handler(statement, before) == [f"100 E2: {what}"]


@pytest.mark.parametrize(
    ("before", "statement"),
    [
        ("from time import time", "time()"),
        ("from time import time as now", "run.failed_at = now()"),
        ("def note(text): ...", "note(f'{error!r}')"),
        ("from x import thing", "thing.method(error)"),
        ("from datetime import datetime", "datetime.now().isoformat()"),
        ("from threading import get_ident", "get_ident()"),
        ("from trio import Lock\nlock = Lock()", "async with lock: pass"),
        ("import time\nclock = time.time", "clock()"),
        ("import time", "time = run.time; time.time()"),
        ("import time", "x = [time.x for time in run]"),
        ("import time", "x = lambda time: time.x"),
        ("import trio", "x: trio.Event"),
        ("import os\nHOME = os.environ['HOME']", "print(HOME, __name__, __file__)"),
        ("from x import *", "anything()"),
        ("", "global later; later = 1; print(later)"),
    ],
)
def test_what_an_except_body_may_call(before: str, statement: str) -> None:
    assert [line for line in in_handler(statement, before) if "`later`" not in line] == []


def test_only_what_handles_an_error_is_held_to_it() -> None:
    assert (
        found("""
        import time

        def f():
            time.time()
            try:
                time.time()
            except time.Error:
                pass
            else:
                time.time()
        """)
        == []
    )


@pytest.mark.parametrize(
    "source",
    [
        "try: g()\nfinally: time.time()",
        "try: g()\nexcept* OSError: time.time()",
        "try: g()\nexcept OSError:\n if 1: time.time()",
        "try: g()\nexcept OSError:\n for x in y: time.time()",
        "try: g()\nexcept OSError:\n while x: time.time()",
        "try: g()\nexcept OSError:\n match x:\n  case 1: time.time()",
        "try: g()\nexcept OSError:\n with x: time.time()",
        "try: g()\nexcept OSError:\n try: g()\n finally: time.time()",
        "try: g()\nexcept OSError:\n def inner(): time.time()\n inner()",
        "while True:\n try: g()\n except OSError: continue\n finally: time.time()",
        "if x:\n try: g()\n except OSError: time.time()",
        "async def inner():\n try: g()\n except OSError: time.time()",
        "class C:\n  def m(self):\n   try: g()\n   except OSError: time.time()",
    ],
)
def test_wherever_an_error_is_handled(source: str) -> None:
    body = "\n".join(f"    {line}" for line in source.splitlines())
    findings = found(f"import time\nfrom x import *\nasync def f(x, y):\n{body}")
    assert len(findings) == 1
    assert "time.time is looked up on a module" in findings[0]


@pytest.mark.parametrize("method", ["__exit__", "__aexit__"])
def test_leaving_a_context_is_part_of_the_error_path(method: str) -> None:
    source = f"import time\nclass C:\n  def {method}(self, *error):\n    time.time()"
    assert len(found(source)) == 1


def test_all_of_the_reporter_is_part_of_the_error_path() -> None:
    Path("tricorn/errors").mkdir(parents=True)
    Path("tricorn/__init__.py").touch()
    Path("tricorn/errors/__init__.py").touch()
    source = "import time\ndef report():\n    time.time()"
    assert len(found(source, "tricorn/errors/report.py")) == 1
    assert found(source, "report.py") == []


# E2: whether names are bound


@pytest.mark.parametrize(
    ("before", "statement", "what"),
    [
        ("", "report(error)", NOWHERE),
        ("if error: report = print", "report(error)", SOMETIMES),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from x import report", "report(error)", SOMETIMES),
        ("report = print\ndel report", "report(error)", SOMETIMES),
        ("for report in (): pass", "report(error)", SOMETIMES),
        ("try: report = g()\nexcept OSError: pass", "report(error)", SOMETIMES),
        ("def f():\n    global report\n    report = print", "report(error)", NOWHERE),
        ("class C:\n    report = print", "report(error)", NOWHERE),
        ("", "print(late); late = 1", "`late` may not be bound yet, on the error path; bind it before the try"),
    ],
)  # fmt: skip
def test_a_name_that_may_not_be_bound(before: str, statement: str, what: str) -> None:
    assert in_handler(statement, before) == [f"100 E2: {what}"]


@pytest.mark.parametrize(
    "before",
    [
        "if error: report = print\nelse: report = str",
        "if error: report = print\nelse: raise SystemExit",
        "import sys\nif sys.platform == 'linux': report = print",
        "if not TYPE_CHECKING: report = print",
        "try: report = g()\nexcept OSError: report = print",
        "try: report = g()\nexcept OSError: raise",
        "try: pass\nfinally: report = print",
        "with x: report = print",
        "while True:\n    report = print\n    break",
        "match x:\n    case 1: report = print\n    case _: report = str",
        "class report: ...",
        "if (report := print): pass",
        "with x as report: pass",
    ],
)
def test_a_name_that_is_bound_on_every_way(before: str) -> None:
    assert in_handler("report(error)", before) == []


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ("try: x = g()\nexcept OSError: print(x)", [4]),
        ("x = 1\ntry: x = g()\nexcept OSError: print(x)", []),
        ("try: x = g()\nfinally: print(x)", [4]),
        ("try: g()\nexcept OSError as x: pass\ntry: g()\nexcept OSError: print(x)", [6]),
        ("if a: x = 1\ntry: g()\nexcept OSError: print(x)", [5]),
        ("if a: return\nelse: x = 1\ntry: g()\nexcept OSError: print(x)", []),
        ("while a: x = 1\ntry: g()\nexcept OSError: print(x)", [5]),
        ("try: return g()\nexcept OSError as x: pass\ntry: g()\nexcept OSError: print(x)", [6]),
        ("while True:\n if a: break\n x = 1\ntry: g()\nexcept OSError: print(x)", [7]),
        ("with suppress(OSError): x = g()\ntry: g()\nexcept OSError: print(x)", [5]),
        ("with a: x = g()\ntry: g()\nexcept OSError: print(x)", []),
        ("while True:\n x = 1\n if x: break\ntry: g()\nexcept OSError: print(x)", []),
        ("for x in a:\n try: g()\n except OSError: print(x)", []),
        ("for x in a:\n continue\nelse:\n y = 1\ntry: g()\nexcept OSError: print(y)", []),
        ("match a:\n case [x, *rest]:\n  try: g()\n  except OSError: print(x, rest)", []),
        ("match a:\n case {'x': 1, **rest}:\n  try: g()\n  except OSError: print(rest)", []),
        ("try: g()\nexcept OSError:\n class C: x = later\n later = 1", [5]),
        ("try: g()\nexcept OSError:\n def h(): return a\n h()", []),
        ("import x\ntry: g()\nexcept OSError: x(1)", []),
    ],
)
def test_a_local_name_that_may_not_be_bound(body: str, lines: list[int]) -> None:
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    findings = found(f"from m import g, suppress\ndef f(a):\n{indented}")
    assert [int(line.split()[0]) for line in findings if "E2" in line] == lines


# E2: names that are bound nowhere

NEVER_BOUND = {
    "callback": "def late(): return time.time()\nasync def agent(run):\n  try: await run.say('')\n"
    "  except OSError: run.later(late)",
    "decorator": "def timed(f):\n  def wrapper():\n    return f(time.time())\n  return wrapper\n@timed\n"
    "def clean(now): ...\nasync def agent(run):\n  try: await run.say('')\n  finally: clean()",
    "generator": "def times():\n  while True: yield time.time()\nasync def agent(run):\n  now = times()\n"
    "  try: await run.say('')\n  finally: next(now)",
    "exit stack": "from contextlib import ExitStack\nasync def agent(run):\n  with ExitStack() as stack:\n"
    "    stack.callback(lambda: time.time())\n    await run.say('')",
    "repr in an f-string": "class Thing:\n  def __repr__(self): return str(time.time())\nasync def agent(run):\n"
    "  try: await run.say('')\n  except OSError: run.note(f'{Thing()!r}')",
    "del": "class Thing:\n  def __del__(self): print(time.time())\nasync def agent(run):\n  thing = Thing()\n"
    "  await run.say(str(thing))",
    "property of an exception": "class Broken(Exception):\n  @property\n  def when(self): return time.time()\n"
    "async def agent(run):\n  try: await run.say('')\n  except Broken as error: run.note(error.when)",
    "str of a tool's error": "from tricorn.chat import ToolError\nclass Broken(ToolError):\n"
    "  def __str__(self): return f'at {time.time()}'\nasync def agent(run):\n  raise Broken",
    "derive": "class Several(ExceptionGroup):\n  def derive(self, errors): return Several(str(time.time()), errors)\n"
    "async def agent(run):\n  raise Several('', [OSError()])",
    "operator": "class Thing:\n  def __add__(self, other): return time.time()\nasync def agent(run):\n"
    "  try: await run.say('')\n  except OSError: return Thing() + 1",
}
UNBOUND = {
    "module": "print(x)",
    "before it is bound": "print(x)\nx = 1",
    "class body": "class C:\n  y = x",
    "class name in a method": "class C:\n  x = 1\n  def m(self): return x",
    "class name in a comprehension": "class C:\n  x = 1\n  y = [x for _ in ()]",
    "lambda": "f = lambda: x",
    "default": "def f(a=x): ...",
    "decorator of a function": "@x\ndef f(): ...",
    "decorator of a class": "@x\nclass C: ...",
    "base": "class C(x): ...",
    "keyword of a class": "class C(metaclass=x): ...",
    "annotation": "def f(a: x): ...",
    "annotation of a result": "def f() -> x: ...",
    "annotation in a class": "class C:\n  a: x",
    "declared only": "x: int\nprint(x)",
    "comprehension": "[x for y in ()]",
    "outside of a comprehension": "[x for x in ()]\nprint(x)",
    "generator expression": "any(y for y in x)",
    "deleted": "x = 1\ndel x\ndef f(): return x",
    "deleted in a function": "def f():\n  x = 1\n  del x\n  return x",
    "del of an unbound name": "def f():\n  del x",
    "del of another scope's name": "def f():\n  x = 1\n  class C:\n    del x",
    "after an except": "try: pass\nexcept OSError as x: pass\nprint(x)",
    "after an except in a loop": "for _ in ():\n  try: pass\n  except OSError as x: pass\n  print(x)",
    "augmented": "x += 1",
    "local of another function": "def f():\n  x = 1\ndef g(): return x",
    "local before it is bound": "def f():\n  print(x)\n  x = 1",
    "subject of a match": "match x:\n  case 1: ...",
    "guard of a match": "match 1:\n  case 1 if x: ...",
    "class pattern": "match 1:\n  case x(): ...",
    "type of an except": "try: pass\nexcept x: pass",
    "module __getattr__": "def __getattr__(name): return 1\ndef f(): return x",
    "f-string": "f'{x!r:>{8}}'",
    "bare except": "try: x\nexcept: pass",
    "star import later": "print(x)\nfrom m import *",
    "local, after a star import": "from m import *\ndef f():\n  x = 1\n  del x\n  return x",
}
NOT_UNBOUND = {
    "used by a function before it is bound": "def f(): return x\nx = 1",
    "global in a function": "def f():\n  global x\n  x = 1\ndef g(): return x",
    "global and deleted in functions": "def f():\n  global x\n  x = 1\ndef g():\n"
    "  global x\n  del x\ndef h(): return x",
    "nonlocal in a function": "def f():\n  x: int\n  def g():\n    nonlocal x\n    x = 1\n  g()\n  return x",
    "closure that runs before": "def f():\n  x = 1\n  def g(): return x\n  g()\n  del x",
    "closure": "def f():\n  def g(): return x\n  x = 1\n  return g",
    "conditional": "from m import g\nif g(): x = 1\ndef f(): return x",
    "try": "try: import x\nexcept ImportError: raise\nprint(x)",
    "deleted on a condition": "x = 1\nif x: del x\nprint(x)",
    "bound before the except": "x = None\ntry: pass\nexcept OSError as x: pass\nprint(x)",
    "in an earlier round": "for y in ():\n  if y: print(x)\n  else: x = y",
    "caught": "try: x\nexcept NameError: x = 1",
    "walrus": "if (x := 1): pass\nprint(x)",
    "walrus in a comprehension": "[x := y for y in ()]\nprint(x)",
    "walrus in a comprehension of a handler": "def f():\n  try: f()\n  except OSError:\n"
    "    [x := y for y in ()]\n    print(x)",
    "match": "match 1:\n  case [x, *y] | {'a': x, **y}: print(x, y)\n  case object() as z: print(z)",
    "with": "with open('') as (x, y): print(x, y)",
    "for": "for x, (y, *z) in (): print(x, y, z)",
    "star": "from m import *\nprint(x)",
    "class": "class C:\n  x = 1\n  y = x, __qualname__, __module__\n  def m(self): return __class__",
    "names of the module": "print(__name__, __file__, __doc__, __builtins__)",
    "recursion": "def f(): return f",
    "annotations that are text": "from __future__ import annotations\ndef f(a: x) -> y:\n  b: z = 1",
    "local annotation": "def f():\n  a: x = 1",
    "quoted": "def f(a: 'x'): ...",
    "only for type checkers": "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
    "if TYPE_CHECKING:\n  from m import x\ndef f(a: x): ...",
    "dead": "while 0: print(x)",
}  # fmt: skip


@pytest.mark.parametrize("source", NEVER_BOUND.values(), ids=NEVER_BOUND)
def test_a_file_that_never_binds_time(source: str) -> None:
    (finding,) = found(source)
    assert re.match(r"\d+ E2: `time` is bound nowhere", finding)
    assert ruff_finds(source) in (None, {int(finding.split()[0])})


@pytest.mark.parametrize("source", UNBOUND.values(), ids=UNBOUND)
def test_a_name_that_nothing_binds_before_it_is_used(source: str) -> None:
    findings = found(source)
    assert findings
    assert all("E2: `x` is" in finding for finding in findings)
    assert ruff_finds(source) in (None, {int(finding.split()[0]) for finding in findings})


@pytest.mark.parametrize("source", NOT_UNBOUND.values(), ids=NOT_UNBOUND)
def test_a_name_that_something_may_have_bound(source: str) -> None:
    assert found(source) == []


def test_names_for_type_checkers_only_are_not_bound_when_a_program_runs() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from m import x\ndef f(): return x()"
    assert found(source) == ["4 E2: `x` is not bound when this runs; import or define it at module level"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="PEP 695")
@pytest.mark.parametrize(
    ("source", "findings"),
    [
        ("def f[T: int](a: T) -> T:\n  return T", 0),
        ("class C[T]:\n  a: T\n  def m(self) -> T: return T", 0),
        ("class C:\n  K = int\n  def m[T](self, a: K, b: T): ...", 0),
        ("type A[T] = list[T] | B\ntype B = A", 0),
        ("def f[T: x](a: T): ...", 1),
        ("type A = x", 1),
        ("def f[T](): ...\nprint(T)", 1),
    ],
)
def test_type_parameters(source: str, findings: int) -> None:
    assert len(found(source)) == findings


def ruff_finds(source: str) -> set[int] | None:
    """The lines of undefined names; None if ruff is not installed."""
    if (ruff := which("ruff")) is None:
        return None
    command = [
        ruff,
        "check",
        "--isolated",
        "--no-cache",
        "--select=F821,F823",
        "--output-format=json",
        "--exit-zero",
        "-",
    ]
    done = run_command([*command, "--target-version=py311"], input=source, capture_output=True, text=True, check=True)
    return {each["location"]["row"] for each in json.loads(done.stdout)}


# E2: what can be reached


SLOW = "def slow(self): time.time()"


def reached(source: str, **others: str) -> list[str]:
    """The places that the error path gets to, of those that call `time.time()`. After FAILED is what a failure does."""
    source = re.sub(r"^( *)FAILED (.*)", r"\1try: g()\n\1except OSError: \2", source, flags=re.MULTILINE)
    return [line.split(" E2")[0] for line in found(source, **others) if "time.time is looked up" in line]


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n  FAILED slow()\ndef slow(): time.time()",
        "def f():\n  FAILED on()\ndef on(): slow()\ndef slow(): time.time()",
        "async def f():\n  FAILED run.start_soon(slow)\ndef slow(): time.time()",
        "def f():\n  FAILED h()\nh = slow = lambda: 0\ndef h(): time.time()",
        f"class C:\n  def f(self):\n    FAILED self.slow()\n  {SLOW}",
        f"class B:\n  {SLOW}\nclass C(B):\n  def f(self):\n    FAILED self.slow()",
        f"class B:\n  {SLOW}\nclass C(B):\n  def slow(self):\n    FAILED super().slow()",
        f"class B:\n  def f(self):\n    FAILED self.slow()\n  def slow(self): ...\nclass C(B):\n  {SLOW}",
        "class C:\n  @classmethod\n  def f(cls):\n    FAILED cls.slow()\n  @classmethod\n  def slow(cls): time.time()",
        f"class C:\n  {SLOW}\n  @classmethod\n  def f(cls):\n    FAILED cls().slow()",
        f"class C:\n  {SLOW}\ndef f(c: C):\n  FAILED c.slow()",
        f"class C:\n  {SLOW}\ndef f(c=None):\n  c = c or C()\n  FAILED c.slow()",
        f"class C:\n  {SLOW}\ndef f(a):\n  c = C() if a else None\n  FAILED c.slow()",
        f"class C:\n  {SLOW}\ndef f(c: 'C | None'):\n  FAILED c.slow()",
        f"class C:\n  {SLOW}\ndef f(a: 'no type', c: 'C'):\n  FAILED a.x(c.slow())",
        f"class C:\n  {SLOW}\ndef f():\n  c = C()\n  FAILED c.slow()",
        f"class C:\n  {SLOW}\ndef make() -> C: ...\ndef f():\n  c = make()\n  FAILED c.slow()",
        f"class C:\n  {SLOW}\nclass D:\n  def __init__(self, c: C): self.c = c\n"
        "  def f(self):\n    FAILED self.c.slow()",
        f"class C:\n  {SLOW}\nclass D:\n  c: C\n  def f(self):\n    FAILED self.c.slow()",
        "class C:\n  def __init__(self): time.time()\ndef f():\n  FAILED C()",
        "class C:\n  def __enter__(self): time.time()\ndef f():\n  try: g()\n  except OSError:\n    with C(): pass",
        f"from typing import Protocol\nclass P(Protocol):\n  def slow(self): ...\nclass C:\n  {SLOW}\n"
        f"def f(p: P):\n  FAILED p.slow()",
        # values
        "if g: slow = print\nelse:\n  def slow(): time.time()\ndef f():\n  FAILED slow()",
        "slow = lambda: time.time()\ndef f():\n  FAILED slow()",
        "a = b = lambda: time.time()\ndef f():\n  FAILED b()",
        "a, b = 1, lambda: time.time()\ndef f():\n  FAILED b()",
        "def slow(): time.time()\nHANDLERS = {1: slow}\ndef f():\n  FAILED HANDLERS[g]()",
        "def slow(): time.time()\ndef f():\n  steps = [slow]\n  FAILED [step() for step in steps]",
        f"class B:\n  {SLOW}\nclass C: ...\ndef f(c: C | B):\n  FAILED c.slow()",
        f"from typing import Optional\nclass C:\n  {SLOW}\ndef f(c: Optional[C]):\n  FAILED c.slow()",
        f"class C:\n  {SLOW}\ndef f(c: type[C]):\n  FAILED c.slow(g)",
        f"class C:\n  {SLOW}\n  def __enter__(self) -> 'Self': return self\n"
        f"def f(c: C):\n  FAILED c.__enter__().slow()",
        f"class E(OSError):\n  {SLOW}\ndef f():\n  try: g()\n  except (ValueError, E) as error: error.slow()",
        "from functools import partial\ndef slow(a): time.time()\nlater = partial(slow, 1)\ndef f():\n  FAILED later()",
        "def slow(a): time.time()\nclass C:\n  a = property(slow)\ndef f(c: C):\n  FAILED print(c.a)",
        # what a function or an object was given
        "def slow(): time.time()\ndef f(then):\n  FAILED then()\nf(slow)",
        "def f(*, then):\n  FAILED then()\nf(then=lambda: time.time())",
        "def slow(): time.time()\ndef f(then):\n  FAILED then()\ndef h(a): f(a)\nh(slow)",
        "def slow(): time.time()\nclass C:\n  def __init__(self, then): self.then = then\n"
        "  def f(self):\n    FAILED self.then()\nC(slow)",
        "def slow(): time.time()\nclass C:\n  def f(self, then):\n    FAILED then()\nC().f(slow)",
        "from typing import Any\ndef slow(): time.time()\nclass C:\n  a: int\n  then: Any\n"
        "  def f(self):\n    FAILED self.then()\nC(1, slow)",
        "from typing import Any\ndef slow(): time.time()\nclass C:\n  then: Any\n"
        "  def f(self):\n    FAILED self.then()\nC(then=slow)",
        "from dataclasses import field\nclass C:\n  at: float = field(default_factory=lambda: time.time())\n"
        "def f():\n  FAILED C()",
        # what runs later
        "def slow(): yield time.time()\ndef f():\n  steps = slow()\n  FAILED print(*steps)",
        "async def slow(): time.time()\nasync def f():\n  last = slow()\n  FAILED await last",
        "async def slow(): yield time.time()\nasync def f():\n  s = slow()\n  FAILED await anext(s)",
        "def f():\n  steps = (time.time() for _ in g)\n  FAILED print(*steps)",
        "from contextlib import ExitStack\ndef f():\n  with ExitStack() as s:\n"
        "    s.callback(slow)\ndef slow(): time.time()",
        "def slow(*error): time.time()\ndef f(stack):\n  stack.push(slow)",
        "async def slow(): time.time()\ndef f(stack):\n  stack.push_async_callback(slow)",
        "async def slow(*error): time.time()\ndef f(stack):\n  stack.push_async_exit(slow)",
        "def f(stack):\n  @stack.callback\n  def slow(): time.time()",
        "from functools import partial\ndef slow(a): time.time()\ndef f(stack):\n  stack.callback(partial(slow, 1))",
        "class C:\n  def __call__(self): time.time()\ndef f(stack):\n  stack.callback(C())",
        "import atexit\ndef slow(): time.time()\natexit.register(slow)",
        "from atexit import register\n@register\ndef slow(): time.time()",
        "from weakref import finalize\ndef slow(): time.time()\ndef f(a):\n  finalize(a, slow)",
        "from weakref import ref\ndef f(a):\n  return ref(a, lambda _: time.time())",
        "from signal import SIGTERM, signal\ndef slow(*a): time.time()\nsignal(SIGTERM, slow)",
        "def slow(*a): time.time()\ndef f(loop):\n  loop.add_signal_handler(15, slow)",
        "def slow(task): time.time()\ndef f(task):\n  task.add_done_callback(slow)",
        "import sys\ndef slow(*a): time.time()\nsys.excepthook = slow",
        "async def f(nursery):\n  FAILED nursery.start_soon(lambda: time.time())",
        # what Python calls by itself
        "class C:\n  def __del__(self): time.time()",
        "class C:\n  def __str__(self): time.time()",
        "class E(Exception):\n  def derive(self, errors): time.time()",
        "class E(Exception):\n  def __init__(self): self.at = time.time()",
        "from trio import BrokenResourceError\nclass E(BrokenResourceError):\n  def split(self, kind): time.time()",
        "class E(Exception): ...\nclass D(E):\n  @property\n  def at(self): time.time()",
        "class C:\n  def __add__(self, a): time.time()\ndef f(c: C):\n  FAILED print(c + 1)",
        "class C:\n  def __radd__(self, a): time.time()\ndef f(c: C):\n  FAILED print(1 + c)",
        "class C:\n  def __iadd__(self, a): time.time()\ndef f(c: C):\n  FAILED c += 1",
        "class C:\n  def __eq__(self, a): time.time()\ndef f(c: C):\n  FAILED print(c == 1)",
        "class C:\n  def __bool__(self): time.time()\ndef f(c: C):\n  try: g()\n  finally:\n    if c: pass",
        "class C:\n  def __len__(self): time.time()\ndef f(c: C):\n  FAILED print(not c)",
        "class C:\n  def __contains__(self, a): time.time()\ndef f(c: C):\n  FAILED print(1 in c)",
        "class C:\n  def __getitem__(self, a): time.time()\ndef f(c: C):\n  FAILED print(c[1])",
        "class C:\n  def __setitem__(self, *a): time.time()\ndef f(c: C):\n  FAILED c[1] = 1",
        "class C:\n  def __iter__(self): time.time()\ndef f(c: C):\n  try: g()\n  finally:\n    for a in c: pass",
        "class C:\n  def __iter__(self): time.time()\ndef f(c: C):\n  FAILED print([a for a in c])",
        "class C:\n  async def __anext__(self): time.time()\nasync def f(c: C):\n"
        "  try: g()\n  finally:\n    async for a in c: pass",
        "class C:\n  def __iter__(self): time.time()\ndef f(c: C):\n  try: g()\n  finally: a, b = c",
        "class C:\n  def __bool__(self): time.time()\ndef f(c: C):\n  try: g()\n  finally: assert c",
        "from contextlib import closing\nclass C:\n  def close(self): time.time()\ndef f():\n  with closing(C()): g()",
        "class C:\n  def __await__(self): time.time()\nasync def f(c: C):\n  FAILED await c",
        "class C:\n  def __len__(self): time.time()\ndef f(c: C):\n  FAILED len(c)",
        "class C:\n  def __hash__(self): time.time()\ndef f(c: C, seen):\n  FAILED seen.add(c)",
        "class C:\n  def __call__(self): time.time()\ndef f(c: C):\n  FAILED c()",
        "class C:\n  @property\n  def a(self): time.time()\ndef f(c: C):\n  FAILED print(c.a)",
        "class C:\n  @property\n  def a(self): time.time()\n  @a.setter\n"
        "  def a(self, b): ...\ndef f(c: C):\n  FAILED print(c.a)",
        f"class B:\n  {SLOW}\nclass C:\n  @property\n  def a(self) -> B: ...\ndef f(c: C):\n  FAILED c.a.slow()",
        "class C:\n  def __getattr__(self, name): time.time()\ndef f(c: C):\n  FAILED print(c.a)",
        "class C:\n  def __setattr__(self, name, a): time.time()\ndef f(c: C):\n  FAILED c.a = 1",
        "class D:\n  def __get__(self, *a): time.time()\nclass C:\n  a = D()\ndef f(c: C):\n  FAILED print(c.a)",
        "def deco(h):\n  def inner(): time.time()\n  return inner\n@deco\ndef a(): ...\ndef f():\n  FAILED a()",
        "def deco(x):\n  def d(h):\n    return lambda: time.time()\n"
        "  return d\n@deco(1)\ndef a(): ...\ndef f():\n  FAILED a()",
        "def other(): time.time()\ndef deco(h):\n  return other\n@deco\ndef a(): ...\ndef f():\n  FAILED a()",
        "class D:\n  def __init__(self, h): ...\n  def __call__(self): time.time()\n"
        "@D\ndef a(): ...\ndef f():\n  FAILED a()",
        "def f():\n  try: g()\n  finally:\n    class C: a = time.time()",
        "def f():\n  try: g()\n  finally:\n    def h(a=time.time()): ...",
    ],
)  # fmt: skip
def test_what_the_error_path_can_reach(source: str) -> None:
    assert len(reached(f"import time\nfrom m import g, run\n{source}")) == 1


def test_what_the_error_path_cannot_reach() -> None:
    assert reached("import time\ndef slow(): time.time()\ndef f():\n  try: slow()\n  except OSError: pass") == []


@pytest.mark.parametrize(
    "source",
    [
        "def slow(): yield time.time()\ndef f():\n  steps = slow()\n  FAILED steps.close()",
        "async def slow(): time.time()\nasync def f():\n  a = await slow()\n  FAILED print(a)",
        "from contextlib import contextmanager\n@contextmanager\ndef slow():\n  yield time.time()\n"
        "def f():\n  with slow() as a:\n    FAILED print(a)",
        "class C:\n  def __init__(self): time.time()\n"
        "  def __len__(self): time.time()\ndef f(c: C):\n  FAILED c.close()",
        "def slow(): time.time()\ndef f(stack):\n  stack.append(slow)",
        "import os\ndef f(stack, fd):\n  stack.callback(os.close, fd)",
        "class Stack:\n  def push(self, a): ...\ndef slow(): time.time()\ndef f(stack: Stack):\n  stack.push(slow)",
    ],
)
def test_what_runs_before_the_failure_is_not_on_the_error_path(source: str) -> None:
    assert reached(f"import time\nfrom m import g\n{source}") == []


CLEAN_UP = "def clean_up(*a): return time.time()\n"


@pytest.mark.parametrize(
    "source",
    [
        f"{CLEAN_UP}steps = []\nsteps.append(clean_up)\ndef f():\n  FAILED [step() for step in steps]",
        f"{CLEAN_UP}def f(run):\n  run.on_error = clean_up\n  FAILED run.on_error()",
        "class C:\n  def on_x(self): time.time()\n  def f(self, kind):\n    FAILED getattr(self, 'on_' + kind)()",
        f"{CLEAN_UP}def f():\n  FAILED globals()['clean_up']()",
        "from tools import *\ndef f():\n  FAILED clean_up()",
        "from other import Group\nclass Batch(Group):\n  def derive(self, errors): time.time()",
        "class M(type):\n  def __instancecheck__(cls, e): time.time()\nclass Known(metaclass=M): ...\n"
        "def f():\n  FAILED isinstance(g, Known)",
        f"{CLEAN_UP}Broken = type('Broken', (Exception,), {{'__str__': clean_up}})",
        f"{CLEAN_UP}class Broken(Exception): ...\nBroken.__str__ = clean_up",
        f"from other import retry\n{CLEAN_UP}@retry(on_failure=clean_up)\ndef f(): ...",
        "try: g()\nexcept OSError: time.time()",
        "from importlib import import_module\ndef f(): import_module('plugin')",
    ],
)
def test_what_the_documentation_says_that_the_audit_cannot_see(source: str) -> None:
    assert reached(f"import time\nfrom m import g\n{source}") == []


def test_across_the_modules_of_one_directory() -> None:
    source = "import other\nfrom other import on\ndef f():\n  try: other.slow()\n  except OSError: on()"
    where = "where the error path of agent.py:5 comes"
    others = {"other": "import third\ndef on(): third.slow()", "third": "import time\ndef slow(): time.time()"}
    assert found(source, **others) == [
        f"other.py:2 E2: {looked_up('third.slow', 'from third import slow', where)}",
        f"third.py:2 E2: {looked_up('time.time', 'from time import time', where)}",
    ]


def test_across_a_package_with_relative_imports() -> None:
    for name, text in {
        "__init__": "from .a import f",
        "a": "from . import b\nfrom .b import on\nfrom .deep.c import slow\n"
        "def f():\n  try: f()\n  except OSError:\n    on()\n    slow()",
        "b": "import time\ndef on(): time.time()",
        "deep/__init__": "",
        "deep/c": "from ..d import on\nimport time\ndef slow():\n  on(time.time())",
        "d": "import time\ndef on(text): time.time()",
    }.items():  # fmt: skip
        path = Path("package", f"{name}.py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    files = [(finding.file, finding.line) for finding in audit([Path("package/a.py")])]
    assert files == [("package/b.py", 2), ("package/d.py", 2), ("package/deep/c.py", 4)]


def test_imports_that_go_in_a_circle() -> None:
    source = "from other import slow\nfrom other import x as y\ndef f():\n  try: f()\n  except OSError: slow(y)\nx = y"
    assert found(source, other="from agent import y as x\nfrom agent import slow") == []


def test_what_is_installed_beside_an_agent_is_not_its_own() -> None:
    Path("site-packages/mine").mkdir(parents=True)
    Path("site-packages/others.py").write_text("def f():\n    import x")
    Path("site-packages/mine/more.py").write_text("def f():\n    import x")
    Path("site-packages/mine/__init__.py").touch()
    source = "import others\nimport mine.more"
    assert [line[:12] for line in found(source, "site-packages/mine/agent.py")] == ["site-package"]


# E7


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("import os\ndef f():\n    os.environ['X']", 3),
        ("import os\ndef f():\n    os.getenv('X')", 3),
        ("from os import environ\nasync def f():\n    return environ.get('X')", 3),
        (
            "import os\nvariables = os.environ\ndef f():\n    return lambda: variables['X']",
            4,
        ),
        ("import os\ndef f():\n    def g(x=os.environ): ...", 3),
    ],
)
def test_the_environment_read_at_run_time(source: str, line: int) -> None:
    assert [each.split(": ")[0] for each in found(source)] == [f"{line} E7"]


@pytest.mark.parametrize(
    "source",
    [
        "import os\nHOME = os.environ['HOME']\ndef f():\n    return HOME",
        "import os\ndef f(environ=os.environ):\n    return environ['X']",
        "def f(os):\n    return os.environ",
    ],
)
def test_the_environment_read_once(source: str) -> None:
    assert found(source) == []


def test_settings_may_read_the_environment() -> None:
    assert found("import os\ndef f():\n    return os.environ['X']", "settings.py") == []


# The whole


def test_findings_are_in_order_and_none_comes_twice() -> None:
    source = """\
        import time
        def f():
            try: f()
            except OSError: time.time(); time.time(); b()
            try: f()
            except ValueError: b()
        def b():
            import json
            missing(time.time())
        """
    assert [line.split(";")[0] for line in found(source)] == [
        "4 E2: time.time is looked up on a module, on the error path",
        "8 E1: `import json` stands in b()",
        "9 E2: `missing` is bound nowhere, where the error path of agent.py:4 comes",
        "9 E2: time.time is looked up on a module, where the error path of agent.py:4 comes",
    ]


def test_a_finding_is_one_line() -> None:
    finding = Finding("a.py", 3, "E1", "what; and what to do instead")
    assert str(finding) == "a.py:3 E1: what; and what to do instead"


@pytest.mark.parametrize(
    ("content", "error"), [(b"def", SyntaxError), (b"\xff", SyntaxError), (b"x = '\0'", (SyntaxError, ValueError))]
)
def test_a_file_that_is_no_python(content: bytes, error: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_bytes(content)
    with pytest.raises(error):
        audit([tmp_path / "agent.py"])


def test_an_expression_that_is_nested_too_deeply() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        found("x = 1\ny = " + " + ".join(["x"] * 2_000))


def test_what_the_compiler_warns_of_is_not_the_audits() -> None:
    assert found("x = '\\d'") == []


def test_the_python_files_of_a_directory() -> None:
    for name in ("a.py", "b.txt", "deep/c.py", ".hidden/d.py", "env/pyvenv.cfg", "env/e.py"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert sorted(map(str, python_files(Path()))) == ["a.py", "deep/c.py"]


def test_tricorn_is_clean() -> None:
    package = Path(str(audit.__code__.co_filename)).parents[2]
    assert (package / "errors/report.py").is_file()
    assert audit(python_files(package)) == []
