"""Tricorn as an ASGI application, for Hypercorn on Trio."""

import tricorn
from bench.servers.tricorn_native import BARE, handle

tricorn.send_records("stderr", "INFO")  # as every server of Tricorn here
app = tricorn.asgi_app(handle, settings=BARE)
