"""MCP servers as tools: `async with mcp("command", "argument") as tools:`. Needs `pip install 'tricorn[mcp]'`.

https://modelcontextprotocol.io, over the standard input and output of a process.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from math import inf
from os import PathLike, fspath
from typing import Any

import anyio
import anyio._backends._trio  # else anyio imports it when it is first used, and mcp the following at the first call
import anyio.abc
import jsonschema.exceptions  # type: ignore[import-untyped]
import jsonschema.validators  # type: ignore[import-untyped]  # noqa: F401
import referencing.exceptions  # noqa: F401
from mcp import Client, MCPError, StdioServerParameters
from mcp_types import (
    CONNECTION_CLOSED,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ResourceLink,
    TextContent,
    TextResourceContents,
)
from mcp_types import Tool as Definition
from msgspec.json import Decoder
from trio import TooSlowError, fail_after

from tricorn.chat.model_tools import CHARACTERS, SECONDS, Tool
from tricorn.chat.run import Run
from tricorn.chat.tools import ToolError
from tricorn.errors.chain import is_any
from tricorn.errors.failures import leaves

START = 30.0  # seconds that a server has to say which tools it has
PAGES = 100  # of its list of tools

for _package in (anyio, anyio.abc):
    for _name in dir(_package):
        getattr(_package, _name)  # else anyio imports what a name stands for when that is first used

_decode = Decoder(dict[str, Any]).decode
_not_in_names = re.compile(r"[^A-Za-z0-9_-]").sub


class McpTool(Tool):
    """A tool of an MCP server. The server checks the arguments.

    Attributes:
        definition: what the server says about it. Its name there may have characters that models do not take.
    """

    def __init__(self, client: Client, definition: Definition, seconds: float, characters: int) -> None:
        name = _not_in_names("_", definition.name)[:64]
        description = definition.description or ""
        super().__init__(name, description, definition.input_schema, seconds=seconds, characters=characters)
        self.definition = definition
        self._client = client

    async def perform(self, run: Run, arguments: bytes) -> object:
        """Ask the server. Raises ToolError for what the server says against it."""
        try:
            result = await self._client.call_tool(self.definition.name, _decode(arguments))
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                raise
            raise ToolError(error.message) from None
        found = _found(result)
        if result.is_error:
            raise ToolError(str(found))
        return found


@asynccontextmanager
async def mcp(
    command: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: str | PathLike[str] | None = None,
    seconds: float = SECONDS,
    characters: int = CHARACTERS,
) -> AsyncGenerator[list[McpTool]]:
    """Start an MCP server, and yield the tools that it has. At the end of the block, also if cancelled, it ends.

    It gets little of the environment (PATH, HOME and the like) and what `env` adds. What it writes to stderr appears on
    ours. At the end its input is closed; if it then goes on for two seconds it gets SIGTERM, and two seconds later
    SIGKILL. As with a nursery, what the block raises comes out in an ExceptionGroup.

    Several tasks can call its tools at the same time. If it dies, each call fails and is reported; the block goes on.

    Args:
        command: the program, looked up in PATH.
        arguments: of the program.
        env: more variables for its environment, such as a key.
        cwd: its working directory, if not ours.
        seconds: that a call of a tool may take.
        characters: of a result that the model is given.

    Raises:
        OSError: it cannot be started, or has not listed its tools within `START` seconds.
    """
    server = StdioServerParameters(
        command=command, args=list(arguments), env=dict(env or {}), cwd=None if cwd is None else fspath(cwd)
    )
    client = Client(server)
    is_started = False
    try:
        with fail_after(START) as starting:
            async with client:
                definitions = await _definitions(client)
                starting.deadline, is_started = inf, True
                yield [McpTool(client, each, seconds, characters) for each in definitions]
    except Exception as error:
        if is_started or not all(is_any(leaf, (MCPError, TooSlowError)) for leaf in leaves(error)):
            raise
        reason = next(map(str, leaves(error))) or f"no answer within {START:g} s"
        raise OSError(f"{command!r} does not answer as an MCP server: {reason}") from error


async def _definitions(client: Client) -> list[Definition]:
    found: list[Definition] = []
    cursor: str | None = None
    for _ in range(PAGES):
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return found


def _found(result: CallToolResult) -> object:
    """Return the texts of a result, or if it has none its structured content."""
    if not result.content and result.structured_content is not None:
        return result.structured_content
    return "\n".join([_text(each) for each in result.content])


def _text(block: ContentBlock) -> str:
    """Return what a model that reads text can be given of a part of a result."""
    if isinstance(block, TextContent):
        return block.text
    if isinstance(block, EmbeddedResource):
        if isinstance(block.resource, TextResourceContents):
            return block.resource.text
        return f"({block.resource.mime_type or 'data'}, which is no text)"
    if isinstance(block, ResourceLink):
        return str(block.uri)
    return f"({block.mime_type}, which is no text)"
