"""Tricorn: a WebSocket server on Trio in which every connection is a nursery."""

from tricorn.application import Application, asgi_app
from tricorn.asgi_handler import AsgiHandler, asgi_handler
from tricorn.connection import Disconnected, Message
from tricorn.errors.report import send_records
from tricorn.metrics import ServerMetrics
from tricorn.protocol.close import Close
from tricorn.request import Accept, Refuse, Request
from tricorn.server import Server, run, serve
from tricorn.settings import SettingError, Settings
from tricorn.websocket import WebSocket, broadcast

__all__ = [
    "Accept",
    "Application",
    "AsgiHandler",
    "Close",
    "Disconnected",
    "Message",
    "Refuse",
    "Request",
    "Server",
    "ServerMetrics",
    "SettingError",
    "Settings",
    "WebSocket",
    "asgi_app",
    "asgi_handler",
    "broadcast",
    "run",
    "send_records",
    "serve",
]
