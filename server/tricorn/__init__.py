"""Tricorn: a WebSocket server on Trio in which every connection is a nursery."""

from .application import asgi_app
from .connection import Disconnected, WebSocket
from .server import run, serve
from .settings import Settings

__all__ = ["Disconnected", "Settings", "WebSocket", "asgi_app", "run", "serve"]
