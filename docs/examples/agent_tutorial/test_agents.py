"""Test the agents of steps 1 and 2 without a server, and that of step 3 with a model that this file makes."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
import step1_agent
import step2_tools
from step2_tools import TOOLS
from trio.testing import MockClock

from tricorn.chat.agents.model import Model
from tricorn.chat.protocol import ToolCompleted, ToolExecuting
from tricorn.chat.testing import ask


@pytest.mark.parametrize(
    ("text", "answer"),
    [("tea", "We have 12 packets of tea."), ("Milk", "Sorry, we do not sell milk.")],
)
async def test_the_first_agent_knows_the_stock(text: str, answer: str) -> None:
    result = await ask(step1_agent.agent, text)
    assert (result.outcome, result.answer) == ("success", answer)
    assert any(isinstance(event, ToolExecuting) and event.tool == "stock" for event in result.events)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('stock {"item": "coffee"}', "0"),
        ('stock {"item": "milk"}', "Error: we do not sell milk, but tea, coffee"),
        ('order {"item": "tea", "packets": 2}', "ordered by ann"),
        ('order {"item": "coffee"}', "Error: there are only 0 packets of coffee"),
        ("help", "There are stock, order."),
    ],
)
async def test_the_tools_return_results_and_errors(text: str, answer: str, autojump_clock: MockClock) -> None:
    result = await ask(step2_tools.agent, text, user="ann")
    assert (result.outcome, result.answer) == ("success", answer)


class MadeModel(BaseHTTPRequestHandler):
    """An endpoint for chat completions. It looks up the stock of tea, and then repeats what the tool said."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        last = request["messages"][-1]
        if last["role"] == "tool":
            delta: dict[str, Any] = {"content": f"There are {last['content']} packets."}
        else:
            call = {"name": "stock", "arguments": '{"item": "tea"}'}
            delta = {"tool_calls": [{"index": 0, "id": "1", "type": "function", "function": call}]}
        end = "stop" if "content" in delta else "tool_calls"
        chunks = [
            {"index": 0, "delta": delta, "finish_reason": None},
            {"index": 0, "delta": {}, "finish_reason": end},
        ]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(f"data: {json.dumps({'choices': [chunk]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def model_url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), MadeModel) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


async def test_the_model_calls_a_tool_and_answers(model_url: str) -> None:
    result = await ask(Model("made", base_url=model_url, tools=TOOLS), "How much tea is there?")
    assert result.outcome == "success"
    [tool] = [event for event in result.events if isinstance(event, ToolCompleted)]
    assert f"There are {tool.result} packets." == result.answer
