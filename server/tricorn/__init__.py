"""Tricorn: a WebSocket server on Trio in which every connection is a nursery."""

from tricorn.application import asgi_app
from tricorn.connection import Disconnected, WebSocket
from tricorn.errors.report import send_records
from tricorn.server import run, serve
from tricorn.settings import Settings

__all__ = ["Disconnected", "Settings", "WebSocket", "asgi_app", "run", "send_records", "serve"]
