"""picows on uvloop: callbacks for frames, no backpressure of its own. Ended by SIGTERM as its example has it."""

import asyncio
import signal
import sys

import uvloop
from picows import WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

CONNECTIONS: set[WSTransport] = set()


class Echo(WSListener):
    def on_ws_connected(self, transport: WSTransport) -> None:
        CONNECTIONS.add(transport)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        CONNECTIONS.discard(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()
        else:
            transport.send(frame.msg_type, frame.get_payload_as_memoryview())


class Crash(Echo):
    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        raise RuntimeError("as it was asked to")


def route(request: WSUpgradeRequest) -> WSListener:
    return Crash() if request.path == b"/crash" else Echo()


async def main(host: str) -> None:
    server = await ws_create_server(route, host, 0)
    print(f"listening on http://{host}:{server.sockets[0].getsockname()[1]}", flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    server.close()
    for transport in tuple(CONNECTIONS):
        transport.send_close(WSCloseCode.GOING_AWAY)
        transport.disconnect()
    while CONNECTIONS:
        await next(iter(CONNECTIONS)).wait_disconnected()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1]))
