"""Rule E9 on our source: where an error may be in flight nothing raises, but for what is listed with its reason.

These places are `except` bodies, `finally` bodies and the methods that leave a block. What raises there is a `raise` of
something else, or an `await`, which may also be cancelled. A plain `raise` is always right.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import tricorn

PACKAGE = Path(tricorn.__file__).parent
ELSEWHERE = ("chat", "service", "asgi.py")  # for their own list
EXITS = ("__exit__", "__aexit__", "__del__")

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

# File and function: why it may raise there.
ALLOWED = {
    ("application.py", "_fail"): "the start has failed, and Hypercorn makes one line of SystemExit",
    ("connection.py", "Connection._tear_down"): "what was raised before is reported, and so is what this raises",
    ("connection.py", "Connection.run"): "the error in flight has been reported",
    ("errors/audit/rules.py", "audit"): "the caller prints why a file cannot be audited",
    ("listening/accept.py", "accept_forever"): "the error is a lack of descriptors, which is reported",
    ("listening/accept.py", "Acceptor._enter"): "the error in flight is Refuse, and this sends it",
    ("listening/asgi.py", "AsgiWebSockets.serve"): "the error in flight is Refuse, and this sends it",
    ("listening/site.py", "Site._ask"): "Refuse answers the client; the error has been reported",
    ("protocol/handshake.py", "Head.receive_data"): "what the peer sent is at fault, and Refuse says so",
    ("protocol/handshake.py", "offered_extensions"): "what the peer sent is at fault, and Refuse says so",
    ("server.py", "Server._serve"): "the program's drain cannot raise an Exception here, and the context is kept",
    ("listening/binds.py", "parse_bind"): "SettingError says what is wrong with the text",
    ("settings.py", "Rule.read"): "SettingError says what is wrong with the text",
    ("trio_websocket.py", "adapt.serve"): "the error in flight is Refuse, and this sends it",
}


def raising(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield function and line of whatever may raise something else where an error may be in flight."""
    pending: list[tuple[ast.AST, str, bool]] = [(tree, "", False)]
    while pending:
        node, name, in_flight = pending.pop()
        raises = isinstance(node, ast.Raise) and node.exc is not None
        if in_flight and (raises or isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith)):
            yield name, node.lineno  # type: ignore[attr-defined]
        if isinstance(node, ast.ClassDef):
            name = f"{name}.{node.name}".lstrip(".")
        if isinstance(node, Function):
            inner = getattr(node, "name", "<lambda>")
            name, in_flight = f"{name}.{inner}".lstrip("."), inner in EXITS
        for field, value in ast.iter_fields(node):
            inside = in_flight or field == "finalbody" or isinstance(node, ast.ExceptHandler)
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    pending.append((child, name, inside))


def test_each_statement_that_raises_over_an_error_has_its_reason() -> None:
    found: dict[tuple[str, str], list[int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        if not file.startswith(ELSEWHERE):
            for name, line in raising(ast.parse(path.read_text())):
                found.setdefault((file, name), []).append(line)
    assert {place: lines for place, lines in found.items() if place not in ALLOWED} == {}
    assert set(ALLOWED) - set(found) == set(), "they do not raise any more"


def test_the_checker_finds_each_kind_of_place() -> None:
    source = """
class Tool:
    async def __aexit__(self, *_):
        if self.log is None:
            raise Unavailable
        def later():
            raise ValueError
async def one():
    try:
        raise KeyError
    except KeyError as error:
        with scope:
            raise ValueError from error
    except Exception:
        raise
    except OSError:
        await two()
    else:
        raise OSError
    finally:
        if two:
            raise OSError
def two():
    try:
        pass
    except* KeyError:
        raise ValueError
    raise KeyError
"""
    assert sorted(raising(ast.parse(source)), key=lambda found: found[1]) == [
        ("Tool.__aexit__", 5),
        ("one", 13),
        ("one", 17),
        ("one", 22),
        ("two", 27),
    ]
