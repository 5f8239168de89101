"""An MCP server, for mcp_agent.py."""

from mcp.server.mcpserver import MCPServer

server = MCPServer("weather", log_level="ERROR")


@server.tool()
def forecast(city: str) -> str:
    """Return the weather in a city."""
    return f"{city}: rain"


if __name__ == "__main__":
    server.run("stdio")
