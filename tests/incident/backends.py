"""What the product's agents asked for first: who the user is, and a session of the database. Both failed in staging."""

from __future__ import annotations

import psycopg
from starlette.requests import HTTPConnection

from incident.faults import FAULTS, agent

__all__ = ["agent"]


class DatabaseFailed(Exception):
    """What the product's health check said."""


def session(_: str) -> object:
    """Ask for the session of a connection that went past the middleware."""
    return HTTPConnection({"type": "websocket", "headers": []}).session["user"]


def database(directory: str) -> object:
    """Ask the PostgreSQL that has its socket in a directory."""
    try:
        with psycopg.connect(host=directory, user="postgres", dbname="postgres") as connection:
            return connection.execute("select 6 * 7").fetchone()[0]
    except psycopg.OperationalError as error:
        raise DatabaseFailed("database: Failed (session factory and connectivity)") from error


FAULTS.update(session=session, database=database)
