import pytest
import sync_library
import trio

from tricorn.chat.testing import ask


async def model(stream: trio.SocketStream) -> None:
    """Stand in for the model: answer with two lines."""
    await stream.receive_some()
    await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\none line\nanother line\n")


async def test_each_line_of_the_model_is_said(monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, model, [listener])
    monkeypatch.setattr(sync_library, "PORT", listener.socket.getsockname()[1])
    result = await ask(sync_library.agent, "go")
    assert (result.outcome, result.answer) == ("success", "one line\nanother line\n")
