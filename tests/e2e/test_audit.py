from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

TRICORN = [sys.executable, "-m", "tricorn"]
TIMEOUT = 60  # seconds; for what takes one or two
CLEAN = """
from tricorn.chat import Run

async def works(run: Run) -> None:
    await run.say(run.message)
"""
BROKEN = """
import time

from tools import look_up

async def works(run):
    try:
        await look_up(run.message)
    except OSError:
        await run.say(f"failed at {time.time()}")
"""
TOOLS = """
async def look_up(text):
    import json
    return json.loads(text)
"""
FINDINGS = [
    "broken.py:10 E2: time.time is looked up on a module, on the error path; "
    "bind it at module level: from time import time",
    "tools.py:3 E1: `import json` stands in look_up(); import it always, at the top of the module",
]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "clean.py").write_text(CLEAN)
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "tools.py").write_text(TOOLS)
    (tmp_path / "no_python.py").write_text("def")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def run(*arguments: str) -> tuple[int, list[str], list[str]]:
    """Run a command to its end: exit status, and the lines of stdout and stderr."""
    with trio.fail_after(TIMEOUT):
        done = await trio.run_process([*TRICORN, *arguments], capture_stdout=True, capture_stderr=True, check=False)
    return done.returncode, done.stdout.decode().splitlines(), done.stderr.decode().splitlines()


async def serve(*arguments: str) -> tuple[int, list[str]]:
    """Serve until it listens, then end it: exit status, and the lines of stderr."""
    command = [*TRICORN, "serve", "--bind", "127.0.0.1:0", *arguments]
    with trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as nursery:
            start = partial(trio.run_process, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
            process: trio.Process = await nursery.start(start)
            assert process.stdout is not None
            assert process.stderr is not None
            assert (await process.stdout.receive_some()).startswith(b"Tricorn is listening on ")
            process.send_signal(signal.SIGTERM)
            said = b"".join([chunk async for chunk in process.stderr])
            status = await process.wait()
    return status, said.decode().splitlines()


@pytest.mark.parametrize("target", ["clean:works", "clean.py", "tricorn.chat.agents.demo:demo"])
async def test_a_clean_agent(target: str) -> None:
    assert await run("audit", target) == (0, [], [])


async def test_without_a_target_it_is_the_agent_that_would_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await run("audit") == (0, [], [])
    monkeypatch.setenv("TRICORN_AGENT", "broken:works")
    assert await run("audit") == (1, FINDINGS, [])


@pytest.mark.parametrize("target", ["broken:works", "broken.py"])
async def test_an_agent_that_breaks_the_rules(target: str) -> None:
    assert await run("audit", target) == (1, FINDINGS, [])


async def test_several_targets(directory: Path) -> None:
    (directory / "no_python.py").unlink()
    assert await run("audit", "clean.py", "tools.py") == (1, FINDINGS[1:], [])
    assert await run("audit", ".", "broken:works") == (1, FINDINGS, [])


async def test_as_json() -> None:
    status, out, err = await run("audit", "--json", "tools.py")
    message = FINDINGS[1].partition("E1: ")[2]
    assert (status, err) == (1, [])
    assert [json.loads(line) for line in out] == [{"file": "tools.py", "line": 3, "rule": "E1", "message": message}]


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("nothing.py", "audit nothing.py: there is no such file or directory"),
        ("empty", "audit empty: there is no Python file in this directory"),
        ("no_such:agent", "--agent no_such:agent: there is no source of no_such in this directory or installed"),
        ("clean:wroks", "--agent clean:wroks: there is no wroks in clean"),
        ("clean:", "--agent clean:: must be module:function, for example tricorn.chat.agents.demo:demo"),
        ("no_python.py", "cannot audit: invalid syntax (no_python.py, line 1)"),
    ],
)
async def test_what_cannot_be_audited(target: str, error: str) -> None:
    assert await run("audit", target) == (2, [], [f"tricorn: {error}"])


async def test_serve_warns_of_what_the_audit_finds() -> None:
    status, said = await serve("--agent", "broken:works")
    assert (status, said) == (0, [f"tricorn: {finding}" for finding in FINDINGS])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--agent", "broken:works", "--audit", "off"],
        ["--agent", "clean:works", "--audit", "strict"],
        ["--audit", "strict"],
    ],
)
async def test_serve_without_a_word(arguments: list[str]) -> None:
    assert await serve(*arguments) == (0, [])


SHADOWS = [
    "secrets.py:1 shadow: hides the module secrets of the standard library; give it another name",
    "time.py:1 shadow: hides the module time of the standard library; give it another name",
]


@pytest.fixture
def shadows(directory: Path) -> None:
    for name in ("secrets.py", "time.py"):
        (directory / name).write_text("print('imported', __name__)")


@pytest.mark.usefixtures("shadows")
async def test_an_agent_beside_modules_that_hide_others() -> None:
    assert await run("audit", "clean:works") == (1, SHADOWS, [])
    status, said = await serve("--agent", "clean:works")
    assert (status, said) == (0, [f"tricorn: {finding}" for finding in SHADOWS])
    status, out, err = await run("serve", "--bind", "127.0.0.1:0", "--agent", "clean:works", "--audit", "strict")
    assert (status, out) == (2, [])
    assert err[:2] == [f"tricorn: {finding}" for finding in SHADOWS]


@pytest.mark.usefixtures("shadows")
async def test_a_package_that_hides_an_installed_one(directory: Path) -> None:
    (directory / "trio").mkdir()
    (directory / "trio" / "__init__.py").touch()
    status, [*_, said], _ = await run("audit", "clean:works")
    assert status == 1
    assert said == f"trio/__init__.py:1 shadow: hides the module trio in {trio.__file__}; give it another name"


@pytest.mark.usefixtures("shadows")
async def test_without_an_agent_there_nothing_is_imported_from_the_directory() -> None:
    assert await run("audit", "tricorn.chat.agents.demo:demo") == (0, [], [])
    assert await serve("--audit", "strict") == (0, [])


@pytest.mark.usefixtures("shadows")
@pytest.mark.parametrize("command", [TRICORN, [str(Path(sys.executable).with_name("tricorn"))]], ids=["-m", "script"])
@pytest.mark.parametrize(("agent", "is_first"), [("tricorn.chat.agents.demo:demo", False), ("tells:agent", True)])
async def test_the_directory_is_on_the_path_only_for_its_agent(
    directory: Path, command: list[str], agent: str, is_first: bool
) -> None:
    (directory / "tells.py").write_text(CLEAN.replace("works", "agent"))
    site = directory / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import atexit, os, sys\natexit.register(lambda: print([os.getcwd() in sys.path, sys.path[0] == os.getcwd()]))"
    )
    done = await trio.run_process(
        [*command, "drill", "--agent", agent],
        capture_stdout=True,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert done.stdout.decode().splitlines()[-1] == f"[{is_first}, {is_first}]"
    assert b"imported" not in done.stdout


async def test_strict_does_not_serve() -> None:
    status, out, err = await run("serve", "--bind", "127.0.0.1:0", "--agent", "broken:works", "--audit", "strict")
    problem = "--agent broken:works: breaks rules of the error path, and --audit is strict"
    assert (status, out, err) == (2, [], [f"tricorn: {line}" for line in [*FINDINGS, problem]])


async def test_an_agent_that_cannot_be_audited(directory: Path) -> None:
    (directory / "clean.py").write_text(
        f"try:\n    import no_python\nexcept SyntaxError:\n    raise_it = False\n{CLEAN}"
    )
    problem = "tricorn: cannot audit: invalid syntax (no_python.py, line 1)"
    assert await serve("--agent", "clean:works") == (0, [problem])
    assert await run("serve", "--agent", "clean:works", "--audit", "strict") == (2, [], [problem])
