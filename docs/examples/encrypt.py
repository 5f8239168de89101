"""Encrypt connections: `python encrypt.py chain.pem key.pem` serves wss://localhost:8443."""

import ssl
import sys

import tricorn


async def echo(ws: tricorn.WebSocket) -> None:
    async for message in ws:
        await ws.send(message)


def server_context(certificate: str, key: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


if __name__ == "__main__":
    tricorn.run(echo, 8443, ssl_context=server_context(sys.argv[1], sys.argv[2]))
