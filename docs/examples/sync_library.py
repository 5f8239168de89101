"""A library that is not async streams an answer, and Stop reaches it at once, where it reads."""

from contextlib import closing, suppress
from http.client import HTTPConnection
from socket import SHUT_RDWR
from urllib.parse import quote

import trio

from tricorn.chat import Run

HOST, PORT = "127.0.0.1", 8000


async def agent(run: Run) -> None:
    connection = HTTPConnection(HOST, PORT, timeout=30)
    await trio.to_thread.run_sync(connection.connect, abandon_on_cancel=True)
    sock = connection.sock
    try:
        await trio.to_thread.run_sync(relay, run, connection, abandon_on_cancel=True)
    finally:
        with suppress(OSError):
            sock.shutdown(SHUT_RDWR)  # the thread reads the end, and the model stops; closing would not wake the thread


def relay(run: Run, connection: HTTPConnection) -> None:
    """Say each line that the model sends. This runs in a thread, which waits wherever it reads."""
    with closing(connection):
        connection.request("GET", f"/?ask={quote(run.message)}")
        for line in connection.getresponse():
            trio.from_thread.run(run.say, line.decode())  # raises Cancelled if the run has been stopped
