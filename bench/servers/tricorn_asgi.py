"""Tricorn as an ASGI application, for Hypercorn on Trio."""

import tricorn

from .tricorn_native import BARE, handle

app = tricorn.asgi_app(handle, settings=BARE)
