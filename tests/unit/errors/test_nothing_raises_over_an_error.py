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
EXITS = ("__exit__", "__aexit__", "__del__")

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

# File and function: why it may raise there.
ALLOWED = {
    ("application.py", "_fail"): "the start has failed, and Hypercorn makes one line of SystemExit",
    ("asgi.py", "_Service.app"): "the start has failed and is reported, and this tells Hypercorn",
    ("asgi.py", "_load"): "SettingError becomes the one line of SystemExit",
    ("chat/agents/arithmetic.py", "evaluate"): "ToolError says what is wrong with the question",
    ("chat/agents/completion.py", "Completion.take"): "ModelError says what the server sent; its error is the cause",
    ("chat/agents/demo.py", "demo"): "the error in flight is ToolError, and this is the answer",
    ("chat/asyncio_bridge.py", "from_asyncio"): "it waits for the end of what it has cancelled, which may be an error",
    ("chat/agents/sse.py", "Client._connect"): "Unreachable says why, and the error in flight is its cause",
    ("chat/agents/sse.py", "Client._parse"): "Lost says why, and the error in flight is its cause",
    ("chat/agents/sse.py", "Client._receive"): "Lost says why, and the error in flight is its cause",
    ("chat/agents/sse.py", "Client.post"): "Lost says why, and the error in flight is its cause",
    ("chat/chat.py", "Chat.__aexit__"): "the nursery puts the error in flight into its group",
    ("chat/client/terminal.py", "websocket_url"): "SettingError says what is wrong with the text",
    ("chat/conversation/conversation.py", "Conversation.live"): "`_leave` raises nothing and has a deadline",
    ("chat/conversation/log_view.py", "LogView.append"): "the error in flight is a deadline's",
    ("chat/conversation/log_view.py", "patience"): "the error in flight is the deadline's",
    ("chat/execution.py", "Execution._json"): "the value is at fault, and its error is the cause",
    ("chat/execution.py", "Execution.ask"): "`_end_ask` makes a note of what the log raises",
    ("chat/execution.py", "Execution.end_call"): "`_complete` makes a note of what the log raises",
    ("chat/execution.py", "Execution.perform"): "the error in flight has been reported, and `_seal` raises nothing",
    ("chat/execution.py", "Execution._work"): "the KeyboardInterrupt is in the error, which has been reported",
    (
        "chat/function_tools.py",
        "FunctionTool.__init__",
    ): "TypeError says what is wrong with the function, and where it is",
    ("chat/function_tools.py", "FunctionTool.perform"): "ToolError says what is wrong with the arguments",
    ("chat/logs/__init__.py", "connect"): "SettingError says what to install",
    ("chat/logs/engine.py", "Engine.__aexit__"): "the nursery puts the error in flight into its group",
    ("chat/logs/memory.py", "MemoryLog.__aexit__"): "a checkpoint that cannot be cancelled",
    ("chat/logs/postgres.py", "PostgresLog._maintaining"): "Unavailable says why the store cannot be used",
    ("chat/logs/postgres.py", "PostgresLog._open_store"): "Unavailable says why the store cannot be used",
    ("chat/logs/postgres.py", "connect"): "SettingError says what is wrong with the URL",
    ("chat/logs/redis.py", "RedisLog.__aenter__"): "the engine's tasks are cancelled, and report what they raise",
    ("chat/logs/redis.py", "RedisLog._ask"): "Unavailable says what Redis answered",
    ("chat/logs/redis.py", "connect"): "SettingError says what is wrong with the URL",
    ("chat/logs/sqlite.py", "SQLiteLog._maintain"): "Unavailable says why the file cannot be used",
    ("chat/logs/sqlite.py", "SQLiteLog._open_store"): "Unavailable says why the file cannot be used",
    ("chat/mcp.py", "McpTool.perform"): "ToolError is what the server says against the call",
    ("chat/mcp.py", "mcp"): "OSError says why the server cannot be used",
    ("chat/model_tools.py", "_approval"): "the error in flight is NotAnswered, and this says so",
    ("chat/run.py", "RunningAgent.__aexit__"): "`end_child` makes a note of what the log raises",
    ("chat/run.py", "RunningTool.__aexit__"): "`end_call` makes a note of what the log raises",
    ("chat/session.py", "Session._authenticate"): "the error in flight is NotAdmitted, and this sends it",
    ("chat/session.py", "Session._serve"): "the error in flight is PastLost, and this sends it",
    ("chat/session.py", "Session.arrive"): "the error in flight is NotAdmitted, and this sends it",
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
    ("listening/capacity.py", "require_memory"): "the error is a lack of memory, and this says so as accepting does",
    ("listening/binds.py", "parse_bind"): "SettingError says what is wrong with the text",
    ("service/auth.py", "Tokens.admit"): "NotAdmitted answers the client; what is not its token's fault is reported",
    ("service/bind.py", "bind_or_explain"): "SettingError says why the address cannot be used",
    ("service/checks.py", "_make"): "CheckFailed says how the server's answer differs from the documented one",
    ("service/checks.py", "handshake"): "the same",
    ("service/deployment.py", "Deployment.open_stream"): "NoConnection says why, and the error in flight is its cause",
    ("service/deployment.py", "Visit.receive"): "CheckFailed says how the visit ended",
    ("service/commands/audit.py", "audit_targets"): "SettingError says why a file cannot be audited",
    ("service/commands/chat.py", "command"): "SettingError says what is wrong with the option",
    ("service/commands/token.py", "command"): "SettingError says what is wrong with the key",
    ("service/hypercorn_config.py", "_read"): "SettingError says why the file cannot be read",
    ("service/hypercorn_config.py", "load_config"): "SettingError says what is wrong with the certificate",
    ("service/jwt_keys.py", "_from_jwks"): "ValueError says what is wrong with the keys",
    ("service/jwt_keys.py", "_load_pem"): "ValueError says what is wrong with the key",
    ("service/jwt_keys.py", "_secret"): "ValueError says what is wrong with the secret",
    ("service/jwt_keys.py", "fetch"): "OSError says who did not answer, and the error in flight is its cause",
    ("service/lifespan.py", "living"): "`_leave` has a deadline, and raises nothing over what is in flight",
    ("service/lifespan.py", "_leave"): "the KeyboardInterrupt is in the error, which has been reported",
    ("service/loader.py", "_is_factory"): "SettingError says what is wrong with the factory",
    ("service/loader.py", "_check"): "SettingError says what is wrong with the agent",
    ("service/loader.py", "_import"): "SettingError says what importing the agent raised, and where",
    ("service/start_up.py", "_read_prompt"): "SettingError says why the file cannot be read",
    ("service/start_up.py", "make_agent"): "SettingError says what is wrong with the key",
    ("service/workers.py", "Supervisor._run_one"): "it waits in a shield with a deadline, and raises nothing",
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
