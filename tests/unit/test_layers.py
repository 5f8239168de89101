"""The server stands alone: what importing it loads, what installing it brings, what works without the chat."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

OF_THE_CHAT = [
    "tricorn.chat",
    "tricorn.service",
    "msgspec",
    "jwt",
    "cryptography",
    "prometheus_client",
    "rich",
    "trio_websocket",
    "coredis",
    "psycopg",
]
# As a finder of modules that finds none of these, as if only `tricorn` was installed.
ONLY_THE_SERVER = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OF_THE_CHAT[2:]}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from tricorn.service.cli import main
sys.exit(main(sys.argv[1:]))
"""
HANDLER = """
async def handler(ws):
    async for message in ws:
        await ws.send(message)
"""


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The modules that are there after `import tricorn`."""
    command = [sys.executable, "-c", "import sys, tricorn; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("module", OF_THE_CHAT)
def test_importing_the_server_loads_nothing_of_the_chat(loaded: set[str], module: str) -> None:
    assert "tricorn.server" in loaded
    assert module not in loaded


def test_installing_the_server_brings_what_it_needs_and_nothing_else() -> None:
    """From pyproject.toml on, since what is installed for these tests may be of another day."""
    assert distributions(PROJECT["dependencies"]) == {
        *("trio", "attrs", "idna", "outcome", "sniffio", "sortedcontainers"),
        *("hypercorn", "h11", "h2", "hpack", "hyperframe", "priority", "wsproto"),
        "websockets",
    }


def test_what_the_package_imports_is_declared() -> None:
    """By name, or by what brings it and whose types it is about."""
    brought = {
        "outcome": "trio",
        "h2": "hypercorn",
        "cryptography": "pyjwt",
        **dict.fromkeys(("anyio", "jsonschema", "referencing", "mcp-types"), "mcp"),
        "typing-extensions": "mypy",
        "pytest": "pytest",  # for the type checker; the plugin, which pytest loads
    }
    extras = PROJECT["optional-dependencies"]
    declared = [*PROJECT["dependencies"], *(each for extra in extras.values() for each in extra)]
    names = {canonicalize_name(Requirement(each).name) for each in declared}
    providers = packages_distributions()
    for module in imported():
        [provider] = {canonicalize_name(each) for each in providers[module]}
        assert brought.get(provider, provider) in names, f"{module} comes with {provider}, which nothing declares"


def imported() -> set[str]:
    """The top-level modules of others that the package imports anywhere."""
    found: set[str] = set()
    for path in (ROOT / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import():
                    found |= {each.name.partition(".")[0] for each in node.names}
                case ast.ImportFrom(module=str(module), level=0):
                    found.add(module.partition(".")[0])
    return found - sys.stdlib_module_names - {"tricorn"}


def distributions(requirements: list[str]) -> set[str]:
    """What these bring on this Python, and what that brings, but for what only an extra needs."""
    found: set[str] = set()
    wanted = [Requirement(each) for each in requirements]
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            wanted += [Requirement(each) for each in requires(name) or ()]
    return found


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `tricorn` as if the chat's packages were not installed."""
    command = [sys.executable, "-c", ONLY_THE_SERVER, *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    "command", [["serve"], ["chat"], ["token", "--user", "ada"], ["drill"], ["audit"], ["log", "check"]]
)
def test_a_command_of_the_chat_says_what_to_install(tmp_path: Path, command: list[str]) -> None:
    done = run(tmp_path, *command)
    missing = "jwt" if command[0] == "token" else "msgspec"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"tricorn: {missing} is not installed; pip install 'tricorn[chat]'\n"


def test_the_audit_works_without_the_chat(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HANDLER)
    done = run(tmp_path, "audit", "mine.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_run_works_without_the_chat_and_refuses_what_is_no_handler(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def handler(ws): ...")
    done = run(tmp_path, "run", "mine:handler")
    takes = "must be an ASGI application, or an async function of one parameter, like: async def handler(ws)"
    problem = f"is not async; {takes} (mine.py, line 1)"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"tricorn: run mine:handler: {problem}\n")
