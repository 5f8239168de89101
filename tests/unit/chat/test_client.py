"""`client.js` in Chromium, where the test is the server at the other end of the WebSocket and holds the clock."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, WebSocketRoute, expect

from tricorn.service import pages

MARKUP = "<img src=x onerror=\"document.title='broken in'\">"


class Server:
    """What the page talks to: it answers `open`, keeps what it is asked, and says what the test has it say."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.sockets: list[WebSocketRoute] = []
        self.requests: list[dict[str, Any]] = []
        self.epoch = "first"
        self.heartbeat = 20.0
        self.refusal: dict[str, Any] | None = None
        self.seqs = count(1)
        self.first = 1
        page.route("**/*", self.serve)
        page.route_web_socket(re.compile(r"/ws$"), self.accept)

    def serve(self, route: Route) -> None:
        content_type, body = pages.PAGES[route.request.url.removeprefix("http://tricorn.test").partition("#")[0]]
        policy = pages.CONTENT_SECURITY_POLICY.decode()
        headers = {"content-type": content_type.decode(), "content-security-policy": policy}
        route.fulfill(body=body, headers=headers)

    def accept(self, socket: WebSocketRoute) -> None:
        self.sockets.append(socket)
        socket.on_message(lambda message: self.receive(json.loads(message)))

    def receive(self, request: dict[str, Any]) -> None:
        self.requests.append(request)
        if request["type"] == "open":
            limits = {
                "message_bytes": 1 << 20,
                "event_bytes": 1 << 18,
                "text_characters": 100,
                "open_conversations": 100,
                "user_runs": 20,
                "posts_per_minute": 60,
            }
            self.say("welcome", connection="c", user="somebody", heartbeat=self.heartbeat, limits=limits)
            if self.refusal:
                self.say("error", **self.refusal)
            else:
                self.say("opened", conversation=request["conversation"], epoch=self.epoch, head=0, first=self.first)

    def say(self, type: str, **fields: Any) -> None:
        self.sockets[-1].send(json.dumps({"type": type, **fields}))

    def event(self, type: str, **fields: Any) -> None:
        stamp = {"conversation": "home", "seq": next(self.seqs), "at": 0.0}
        self.say(type, **stamp | ({} if type == "user_message" else {"run": "r"}) | fields)

    def close(self, code: int, reason: str = "") -> None:
        self.sockets[-1].close(code=code, reason=reason)

    def asked(self, type: str) -> list[dict[str, Any]]:
        """The requests of this type. The round trip to the page brings in what it has sent until now."""
        self.page.evaluate("0")
        return [request for request in self.requests if request["type"] == type]

    def wait(self, seconds: float) -> None:
        """Let this time pass for the page."""
        self.page.clock.run_for(int(seconds * 1000))


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page whose clock stands still, and in which no script may fail."""
    context = browser.new_context(viewport={"width": 800, "height": 600})
    page = context.new_page()
    page.clock.install(time=0)
    page.clock.pause_at(1000)
    failures: list[object] = []
    page.on("pageerror", lambda error: failures.append(error))
    yield page
    context.close()
    assert not failures


@pytest.fixture
def server(page: Page) -> Server:
    """The other end of a page that is connected to the conversation `home`."""
    server = Server(page)
    page.goto("http://tricorn.test/#home")
    state(page, "Connected")
    return server


def state(page: Page, text: str) -> None:
    expect(page.get_by_role("status")).to_have_text(text)


def write(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


def test_a_new_page_opens_its_conversation_from_the_beginning(server: Server) -> None:
    assert server.requests == [{"type": "open", "conversation": "home", "after": 0}]


def test_it_comes_back_to_where_it_was_and_shows_nothing_twice(page: Page, server: Server) -> None:
    server.event("user_message", id="p", text="hello")
    server.event("agent_started", agent="demo", post="p")
    server.event("agent_message", text="Good ")
    expect(page.locator(".answer")).to_have_text("Good ")
    server.close(1012)
    state(page, "Reconnecting…")
    server.wait(1)
    state(page, "Connected")
    assert server.asked("open")[1] == {"type": "open", "conversation": "home", "after": 3, "epoch": "first"}
    server.event("agent_message", seq=3, text="Good ")
    server.event("agent_message", text="day.")
    server.event("agent_completed", outcome="success", seconds=1.0, text="Good day.")
    expect(page.locator(".run")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".answer")).to_have_text("Good day.")


def test_another_epoch_starts_over(page: Page, server: Server) -> None:
    write(page, "of old")
    server.event("user_message", id=server.asked("post")[0]["id"], text="of old")
    expect(page.locator(".message[data-state=sent]")).to_have_count(1)
    server.close(1012)
    state(page, "Reconnecting…")
    write(page, "on its way")
    server.epoch, server.seqs = "second", count(1)
    server.wait(1)
    expect(page.locator(".note")).to_have_text("The server has lost what was said here before.")
    server.event("user_message", id="q", text="of new")
    expect(page.locator(".message > p")).to_have_text(["on its way", "of new"])
    server.event("user_message", id=server.asked("post")[-1]["id"], text="on its way")
    expect(page.locator(".message > p")).to_have_text(["of new", "on its way"])


def test_a_log_that_is_shorter_than_what_was_seen_starts_over(page: Page, server: Server) -> None:
    server.event("user_message", id="p", text="of old")
    expect(page.locator(".message")).to_have_count(1)
    server.close(1012)
    server.refusal = {"code": "not_found", "message": "there is no event 1", "ref": "home"}
    server.wait(1)
    expect(page.locator(".message")).to_have_count(0)
    state(page, "Reconnecting… (there is no event 1)")
    server.refusal = None
    server.wait(2)
    state(page, "Connected")
    assert server.asked("open")[-1] == {"type": "open", "conversation": "home", "after": 0}


def test_what_the_log_does_not_keep_is_not_shown_as_if_it_were_all(page: Page, server: Server) -> None:
    server.event("user_message", id="p", text="of old")
    expect(page.locator(".message")).to_have_count(1)
    server.close(1012)
    server.first, server.seqs = 7, count(7)
    server.wait(1)
    expect(page.locator(".note")).to_have_text("The server does not keep what was said here earlier.")
    expect(page.locator(".message")).to_have_count(0)
    server.event("tool_completed", seconds=0.1, call="r.1", tool="t", result=1)  # in the middle of a run
    server.event("agent_message", text="12")
    expect(page.locator(".answer")).to_have_text("12")
    server.event("agent_completed", outcome="success", seconds=1.0)
    expect(page.locator(".run")).to_have_attribute("aria-busy", "false")


def test_what_the_log_cannot_take_is_posted_again(page: Page, server: Server) -> None:
    write(page, "hello")
    (post,) = server.asked("post")
    server.say("error", code="unavailable", message="the log does not answer", ref=post["id"])
    assert server.asked("post") == [post]
    server.wait(2)
    assert server.asked("post") == [post, post]
    server.say("posted", id=post["id"], conversation="home", seq=1)
    expect(page.locator(".message .note")).to_have_count(0)


def test_a_post_that_came_too_fast_is_posted_again_when_the_server_says(page: Page, server: Server) -> None:
    write(page, "hello")
    [post] = server.asked("post")
    server.say("error", code="too_fast", message="too many posts", ref=post["id"], retry_after=7.5)
    server.wait(7.4)
    assert server.asked("post") == [post]
    server.wait(1.2)
    assert server.asked("post") == [post, post]
    server.say("posted", id=post["id"], conversation="home", seq=1)
    expect(page.locator(".message .note")).to_have_count(0)


def test_what_the_log_cannot_take_keeps_its_place_before_what_is_said_after_it(page: Page, server: Server) -> None:
    page.evaluate("Math.random = () => 0.5")
    write(page, "one")
    write(page, "two")
    one, two = server.asked("post")
    server.say("error", code="unavailable", message="the log does not answer", ref=one["id"], retry_after=1.0)
    server.wait(1)
    server.say("error", code="unavailable", message="an earlier post comes first", ref=two["id"], retry_after=1.0)
    write(page, "three")
    server.wait(1.4)
    assert server.asked("post") == [one, two]
    server.wait(0.2)
    assert [post["text"] for post in server.asked("post")] == ["one", "two", "one", "two", "three"]
    server.wait(10)
    assert len(server.asked("post")) == 5


def test_a_post_is_repeated_until_the_log_has_it(page: Page, server: Server) -> None:
    write(page, "first")
    server.close(1001)
    state(page, "Reconnecting…")
    write(page, "second")
    expect(page.locator(".message[data-state=sending]")).to_have_count(2)
    server.wait(1)
    state(page, "Connected")
    posts = server.asked("post")
    assert [post["text"] for post in posts] == ["first", "first", "second"]
    assert posts[0] == posts[1]
    server.event("user_message", id=posts[0]["id"], text="first")
    server.say("posted", id=posts[2]["id"], conversation="home", seq=2)
    expect(page.locator(".message[data-state=sent]")).to_have_count(1)
    server.close(1012)
    server.wait(2)
    state(page, "Connected")
    server.event("user_message", id=posts[2]["id"], text="second")
    expect(page.locator(".message[data-state=sent] > p")).to_have_text(["first", "second"])
    expect(page.locator(".message")).to_have_count(2)
    assert server.asked("post") == posts


def test_a_post_that_came_while_the_server_closes_is_kept(page: Page, server: Server) -> None:
    write(page, "hello")
    [post] = server.asked("post")
    server.say("error", code="closing", message="the server is shutting down", ref=post["id"])
    server.close(1012)
    state(page, "Reconnecting…")
    server.wait(1)
    state(page, "Connected")
    assert server.asked("post") == [post, post]


def test_a_post_that_is_refused_says_why(page: Page, server: Server) -> None:
    write(page, "hello")
    [post] = server.asked("post")
    server.say("error", code="internal", message="this did not work", ref=post["id"], error_id="e1")
    expect(page.locator(".message[data-state=refused] .note")).to_have_text("this did not work · error e1")
    server.event("user_message", id=post["id"], text="hello")  # it did after all
    expect(page.locator(".message[data-state=sent] > p")).to_have_text(["hello"])


def test_a_text_over_the_limit_is_not_sent(page: Page, server: Server) -> None:
    write(page, "🙂" * 100)
    write(page, "🙂" * 101)
    expect(page.locator(".message .note")).to_have_text("101 characters are too many: 100 at most")
    assert [post["text"] for post in server.asked("post")] == ["🙂" * 100]


def test_it_comes_back_when_the_server_says(page: Page, server: Server) -> None:
    server.say("closing", reason="the server is shutting down", retry_after=30.0)
    server.close(1012)
    state(page, "Reconnecting… (the server is shutting down)")
    server.wait(29.9)
    assert len(server.asked("open")) == 1
    server.wait(1.2)
    state(page, "Connected")
    server.close(1012)
    state(page, "Reconnecting…")
    server.wait(2)
    state(page, "Connected")


def test_it_waits_longer_from_one_attempt_to_the_next(page: Page, server: Server) -> None:
    page.evaluate("Math.random = () => 0.999")
    for seconds in (1, 2, 4, 8, 15, 15):
        server.close(1012)
        state(page, "Reconnecting…")
        attempts = len(server.asked("open"))
        server.wait(seconds * 0.9)
        assert len(server.asked("open")) == attempts
        server.wait(seconds * 0.2)
        state(page, "Connected")
    server.wait(16)
    server.close(1012)
    server.wait(1)
    state(page, "Connected")


@pytest.mark.parametrize("code", [4500, 4502])
def test_it_stays_away_when_told_to(page: Page, server: Server, code: int) -> None:
    server.close(code, "no entry")
    state(page, "Closed (no entry)")
    server.wait(600)
    page.evaluate("dispatchEvent(new Event('online'))")
    assert len(server.asked("open")) == 1


def test_it_does_not_wait_where_the_network_is_back(page: Page, server: Server) -> None:
    server.say("closing", reason="", retry_after=30.0)
    server.close(1012)
    state(page, "Reconnecting…")
    page.evaluate("dispatchEvent(new Event('online'))")
    state(page, "Connected")
    server.wait(35)
    assert len(server.asked("open")) == 2


def test_silence_is_a_lost_connection(page: Page, server: Server) -> None:
    server.wait(39)
    server.say("heartbeat")
    server.event("user_message", id="o", text="heard")
    expect(page.locator(".message > p")).to_have_text(["heard"])  # it has arrived
    server.wait(39)
    state(page, "Connected")
    server.wait(1.5)
    state(page, "Reconnecting… (no answer)")
    server.wait(1)
    state(page, "Connected")
    server.sockets[0].send(json.dumps({"type": "user_message", "seq": 2, "id": "p", "text": "a ghost"}))
    server.event("user_message", id="p", text="hello")
    expect(page.locator(".message > p")).to_have_text(["heard", "hello"])


def test_a_run_stands_under_the_message_that_it_answers(page: Page, server: Server) -> None:
    server.event("user_message", id="p", text="one")
    server.event("user_message", id="q", text="two")
    for post in ("p", "q"):
        server.event("agent_started", run=post, agent="demo", post=post)
        server.event("agent_message", run=post, text=f"to {post}")
        server.event("agent_completed", run=post, outcome="success", seconds=0.1)
    expect(page.locator("#log li > p")).to_have_text(["one", "to p", "two", "to q"])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"outcome": "cancelled", "seconds": 0.25}, "Stopped · 250 ms"),
        ({"outcome": "abandoned", "seconds": 600.0}, "Stopped, because nobody was here · 600.0 s"),
        ({"outcome": "timeout", "seconds": 300.0}, "The agent ran out of time · 300.0 s"),
        ({"outcome": "failed", "seconds": 1.0, "error_id": "e1"}, "The agent failed · 1.0 s · error e1"),
        (
            {"outcome": "failed", "seconds": 1.0, "error": "no model", "error_id": "e1"},
            "The agent failed: no model · 1.0 s · error e1",
        ),
        ({"outcome": "interrupted", "seconds": 2.0}, "The server stopped before the agent was done · 2.0 s"),
    ],
)
def test_an_outcome_that_is_no_success(page: Page, server: Server, fields: dict[str, Any], text: str) -> None:
    server.event("agent_started", agent="demo", post="p")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    server.event("agent_completed", **fields)
    expect(page.locator(".outcome")).to_have_text(text)
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_a_tool(page: Page, server: Server) -> None:
    server.event("agent_started", agent="demo", post="p")
    for call in ("1", "2", "3"):
        server.event("tool_executing", call=call, tool="look", arguments={"place": "Oslo", "days": [1, 2]})
    expect(page.locator(".tool .status")).to_have_text(["running"] * 3)
    server.event("tool_completed", call="2", tool="look", seconds=0.0123, error="no such place")
    server.event("tool_completed", call="1", tool="look", seconds=12.34, result={"sky": "grey"})
    server.event("tool_completed", call="3", tool="look", seconds=0.0, result=None)
    expect(page.locator(".tool .status")).to_have_text(["done · 12.3 s", "failed · 13 ms", "done · 0 ms"])
    expect(page.locator(".tool dt")).to_have_text(["place", "days", "sky", "place", "days", "place", "days"])
    expect(page.locator(".tool").first.locator("dd")).to_have_text(["Oslo", "[1,2]", "grey"])
    expect(page.locator(".tool .result")).to_have_text(["skygrey", "no such place"])


def asks(server: Server, **fields: Any) -> None:
    server.event("agent_started", agent="demo", post="p")
    server.event("agent_asking", ask="q", text="Send it?", until=1600.0, **fields)


def test_a_question_is_answered_by_a_choice(page: Page, server: Server) -> None:
    asks(server, choices=["yes", "no"])
    expect(page.locator(".run")).to_have_attribute("aria-busy", "false")
    page.get_by_role("button", name="no").click()
    assert server.asked("answer") == [{"type": "answer", "conversation": "home", "ask": "q", "text": "no"}]
    expect(page.get_by_role("button", name="yes")).to_be_disabled()
    server.event("agent_asked", ask="q", outcome="answered", answer="no", user="somebody")
    expect(page.locator(".ask > p")).to_have_text(["Send it?", "no"])
    expect(page.locator(".ask button")).to_have_count(0)
    expect(page.locator(".run")).to_have_attribute("aria-busy", "true")


def test_a_question_is_answered_by_a_text(page: Page, server: Server) -> None:
    asks(server)
    page.get_by_label("Send it?").fill("  maybe ")
    page.get_by_label("Send it?").press("Enter")
    assert [each["text"] for each in server.asked("answer")] == ["maybe"]


def test_an_answer_is_repeated_until_the_log_has_it(page: Page, server: Server) -> None:
    asks(server, choices=["yes", "no"])
    server.close(1012)
    state(page, "Reconnecting…")
    page.get_by_role("button", name="yes").click()
    server.wait(1)
    state(page, "Connected")
    assert len(server.asked("answer")) == 1
    server.say("error", code="unavailable", message="the log does not answer", ref="q")
    server.asked("answer")
    server.wait(2)
    assert len(server.asked("answer")) == 2
    server.event("agent_asked", ask="q", outcome="answered", answer="yes")
    expect(page.locator(".ask .reply")).to_have_text("yes")
    server.close(1012)
    state(page, "Reconnecting…")
    server.wait(2)
    state(page, "Connected")
    assert len(server.asked("answer")) == 2


def test_an_answer_that_is_refused_says_why(page: Page, server: Server) -> None:
    asks(server)
    page.get_by_label("Send it?").fill("maybe")
    page.get_by_role("button", name="Answer").click()
    server.say("error", code="malformed", message="nobody understands that", ref="q")
    expect(page.locator(".ask .note")).to_have_text("nobody understands that")
    page.get_by_label("Send it?").fill("x" * 101)
    page.get_by_role("button", name="Answer").click()
    expect(page.locator(".ask .note")).to_have_text("101 characters are too many: 100 at most")
    assert len(server.asked("answer")) == 1


@pytest.mark.parametrize(
    ("outcome", "text"), [("timeout", "No answer in time"), ("cancelled", "No longer asked"), ("later", "later")]
)
def test_a_question_that_nobody_answered(page: Page, server: Server, outcome: str, text: str) -> None:
    asks(server, choices=["yes"])
    server.event("agent_asked", ask="q", outcome=outcome)
    expect(page.locator(".ask > p")).to_have_text(["Send it?", text])


def test_what_anybody_says_is_text(page: Page, server: Server) -> None:
    server.event("user_message", id="p", text=MARKUP)
    server.event("agent_started", agent=MARKUP, post="p")
    server.event("agent_thinking", text=MARKUP)
    for call in ("1", "2"):
        server.event("tool_executing", call=call, tool=MARKUP, arguments={MARKUP: MARKUP, "more": [MARKUP]})
    server.event("tool_completed", call="1", tool=MARKUP, seconds=0.1, result={MARKUP: {MARKUP: MARKUP}})
    server.event("tool_completed", call="2", tool=MARKUP, seconds=0.1, error=MARKUP)
    server.event("agent_message", text=MARKUP)
    server.event("agent_completed", outcome=MARKUP, seconds=0.1, error=MARKUP, error_id=MARKUP)
    server.say("error", code="malformed", message=MARKUP)
    expect(page.locator(".note")).to_have_text(MARKUP)
    expect(page.locator(".answer")).to_have_text(MARKUP)
    expect(page.locator("body img")).to_have_count(0)
    expect(page).to_have_title("Tricorn chat")


def test_an_event_of_a_type_not_known_is_skipped(page: Page, server: Server) -> None:
    server.event("agent_danced", text="a waltz")
    server.event("__proto__", text="a trap")
    server.say("poem", text="a rose")
    server.event("user_message", id="p", text="hello")
    expect(page.locator("#log > li")).to_have_count(1)


def test_the_end_stays_in_view_unless_somebody_reads_further_up(page: Page, server: Server) -> None:
    for number in range(30):
        server.event("user_message", id=f"p{number}", text=f"message {number}")
    expect(page.get_by_text("message 29")).to_be_in_viewport()
    page.locator("#scroller").evaluate("scroller => scroller.scrollTo(0, 0)")
    expect(page.get_by_text("message 0", exact=True)).to_be_in_viewport()
    server.event("user_message", id="p30", text="message 30")
    expect(page.get_by_text("message 30")).to_be_attached()
    expect(page.get_by_text("message 0", exact=True)).to_be_in_viewport()
    write(page, "mine")
    expect(page.get_by_text("mine")).to_be_in_viewport()
    server.event("user_message", id="p31", text="message 31\n" * 9)
    expect(page.get_by_text("message 31")).to_be_in_viewport()


def test_the_keys(page: Page, server: Server) -> None:
    text = page.get_by_label("Your message")
    text.press_sequentially("one")
    text.press("Shift+Enter")
    text.press_sequentially("two")
    text.press("Enter")
    text.press_sequentially("  ")
    text.press("Enter")
    expect(text).to_have_value("")
    assert [post["text"] for post in server.asked("post")] == ["one\ntwo"]
    server.event("agent_started", agent="demo", post="p")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    text.press("Escape")
    assert server.asked("cancel") == [{"type": "cancel", "conversation": "home", "run": "r"}]


def test_an_example_is_put_where_it_can_be_finished(page: Page, server: Server) -> None:
    page.get_by_role("button", name="reverse …").click()
    expect(page.get_by_label("Your message")).to_have_value("reverse ")
    expect(page.get_by_label("Your message")).to_be_focused()
    assert server.asked("post") == []


def test_a_new_conversation_has_its_own_address(page: Page, server: Server) -> None:
    page.get_by_role("link", name="New conversation").click()
    expect(page).to_have_url(re.compile("#[0-9a-f]{24}$"))
    state(page, "Connected")
    assert server.asked("open")[1]["conversation"] == page.url.partition("#")[2]


def test_a_child_is_shown_in_its_parent(page: Page, server: Server) -> None:
    server.event("agent_started", agent="writer", post="p")
    server.event("agent_message", text="Well: ")
    for child in ("a", "b"):
        server.event("agent_started", run=child, agent=child.upper(), post="", post_seq=0, parent="r")
    server.event("agent_message", run="a", text="one ")
    server.event("agent_message", run="b", text="two ")
    server.event("agent_message", run="a", text="three")
    server.event("agent_asking", run="b", ask="q", text="Send it?", until=1600.0, choices=["yes", "no"])
    expect(page.locator("#log > .run")).to_have_attribute("aria-busy", "false")
    server.event("agent_asked", run="b", ask="q", outcome="answered", answer="yes")
    for child in ("a", "b"):
        server.event("agent_completed", run=child, outcome="success", seconds=0.1)
    expect(page.locator("#log > .run")).to_have_attribute("aria-busy", "true")
    server.event("agent_message", text="done.")
    expect(page.locator("#log > .run > .answer")).to_have_text(["Well: ", "done."])
    expect(page.locator(".child > h3")).to_have_text(["A", "B"])
    expect(page.locator(".child > .answer")).to_have_text(["one three", "two "])


def test_stop_cancels_the_run_and_not_its_children(page: Page, server: Server) -> None:
    server.event("agent_started", agent="writer", post="p")
    server.event("agent_started", run="a", agent="A", post="", post_seq=0, parent="r")
    page.get_by_role("button", name="Stop").click()
    assert [each["run"] for each in server.asked("cancel")] == ["r"]
