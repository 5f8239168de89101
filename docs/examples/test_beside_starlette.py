from beside_starlette import app, room
from starlette.testclient import TestClient

from tricorn.testing import connect


async def test_everybody_in_the_room_hears_a_message() -> None:
    async with connect(room) as ann, connect(room) as bob:
        await ann.send("hello")
        assert [await client.receive() for client in (ann, bob)] == ["hello", "hello"]


def test_the_page_says_how_many_are_in_the_room() -> None:
    """Test the application's own pages and routes with its framework's client."""
    assert TestClient(app).get("/").text == "0 in the room\n"


def test_an_announcement_says_how_many_heard_it() -> None:
    with TestClient(app).websocket_connect("/announce") as speaker:
        speaker.send_text("news")
        assert speaker.receive_text() == "announced to 0"
