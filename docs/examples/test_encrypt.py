"""Memory has no TLS: this test serves on a free port, with a certificate of its own."""

import ssl
from functools import partial
from pathlib import Path

import trio
import trustme
from encrypt import echo, server_context
from trio_websocket import open_websocket

import tricorn


async def test_a_client_that_trusts_the_certificate_is_served(tmp_path: Path, nursery: trio.Nursery) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(each.bytes() for each in certificate.cert_chain_pems))
    key.write_bytes(certificate.private_key_pem.bytes())
    context = server_context(str(chain), str(key))
    server: tricorn.Server = await nursery.start(partial(tricorn.serve, echo, 0, "localhost", ssl_context=context))

    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    port = int(server.addresses[0][1])
    async with open_websocket("localhost", port, "/", use_ssl=trusting) as client:
        await client.send_message("hello")
        assert await client.get_message() == "hello"
    await server.close()
