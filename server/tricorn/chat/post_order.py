"""The order of one client's posts: what was refused only for now comes before what the client said after it."""

from __future__ import annotations

from trio import current_time

KEPT_FREE = 10.0  # seconds for which a refused post may come again before others; then its client has given it up


class PostOrder:
    """Posts of a client that the log could not take, in the order in which they came.

    A client that does not wait for answers has said the next thing already when it learns that a post was refused. If
    the log took that, the two would change places for good.
    """

    def __init__(self) -> None:
        self._refused: dict[tuple[str, str], float] = {}  # conversation and post → until when, in Trio's time

    def must_wait(self, conversation: str, post: str) -> bool:
        """Return whether an earlier post in the same conversation is expected before this one."""
        now = current_time()
        for (its_conversation, earlier), until in self._refused.items():
            if its_conversation == conversation and until > now:
                return earlier != post
        return False

    def refuse(self, conversation: str, post: str) -> None:
        """Expect this post again, in its place."""
        now = current_time()
        self._refused[conversation, post] = now + KEPT_FREE
        self._refused = {each: until for each, until in self._refused.items() if until > now}

    def settle(self, conversation: str, post: str) -> None:
        """Expect this post no longer: it is in the log, or refused for good."""
        self._refused.pop((conversation, post), None)
