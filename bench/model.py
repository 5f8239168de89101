"""What stands for a model: a server that streams the same answer to everybody, as OpenAI's does, at an even pace.

    python -m bench.model

It says its address in the first line. Only loopback can ask it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Any

TOKENS = 100  # of an answer
PAUSE = 0.01  # seconds between two: a fast model
ANSWER = "".join(f" tok{number:03}" for number in range(TOKENS))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(**fields: Any) -> bytes:
    """A chunk of HTTP with one event in it, with the fields that OpenAI's have."""
    about = {"id": "chatcmpl-abc123def456", "object": "chat.completion.chunk", "created": 1764500000, "model": "m"}
    data = b"data: " + json.dumps(about | {"system_fingerprint": "fp_44709d6fcb"} | fields).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def piece(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return event(choices=[choice], usage=None)


PIECES = [piece({"content": f" tok{number:03}"}) for number in range(TOKENS)]
USAGE = {"prompt_tokens": 9, "completion_tokens": TOKENS, "total_tokens": TOKENS + 9}
END = piece({}, "stop") + event(choices=[], usage=USAGE) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
            writer.write(HEAD)
            for data in PIECES:
                writer.write(data)
                await asyncio.sleep(PAUSE)
            writer.write(END)
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1000)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


@contextmanager
def streaming() -> Iterator[str]:
    """Have it as a process of its own, whose CPU is not that of the server that asks it. Gives the base URL."""
    with subprocess.Popen([sys.executable, "-m", "bench.model"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
