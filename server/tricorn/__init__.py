"""Tricorn: a WebSocket server on Trio in which every connection is a nursery."""

import tricorn._command  # noqa: F401 (for what it does)
from tricorn.application import Application, asgi_app
from tricorn.asgi_handler import ASGIApp, AsgiHandler, asgi_handler
from tricorn.connection import Disconnected
from tricorn.errors.report import send_records
from tricorn.errors.sinks import Destination, Level, Record, Sink
from tricorn.listening.binds import Address
from tricorn.listening.site import Drain, Handlers
from tricorn.metrics import Counter, Histogram, Numbers, ServerMetrics
from tricorn.protocol.close import Close
from tricorn.protocol.receiver import Message
from tricorn.request import Accept, BeforeUpgrade, Refuse, Request
from tricorn.server import Server, run, serve
from tricorn.settings import SettingError, Settings
from tricorn.websocket import Handler, WebSocket, broadcast

__version__ = "0.1.0"

__all__ = [
    "ASGIApp",
    "Accept",
    "Address",
    "Application",
    "AsgiHandler",
    "BeforeUpgrade",
    "Close",
    "Counter",
    "Destination",
    "Disconnected",
    "Drain",
    "Handler",
    "Handlers",
    "Histogram",
    "Level",
    "Message",
    "Numbers",
    "Record",
    "Refuse",
    "Request",
    "Server",
    "ServerMetrics",
    "SettingError",
    "Settings",
    "Sink",
    "WebSocket",
    "__version__",
    "asgi_app",
    "asgi_handler",
    "broadcast",
    "run",
    "send_records",
    "serve",
]
