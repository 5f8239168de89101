from __future__ import annotations

import re
from pathlib import Path
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
    ],
)  # fmt: skip
def test_what_the_error_path_can_reach(source: str) -> None:
    assert len(reached(f"import time\nfrom m import g, run\n{source}")) == 1


def test_what_the_error_path_cannot_reach() -> None:
    assert reached("import time\ndef slow(): time.time()\ndef f():\n  try: slow()\n  except OSError: pass") == []


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
