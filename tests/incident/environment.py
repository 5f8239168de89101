"""Where this runs, found out whenever somebody asks. Loads a library for it that nothing else needs."""

from __future__ import annotations

import os
from configparser import ConfigParser


def get_current_environment() -> str:
    config = ConfigParser()
    config.read_dict({"environment": {"name": "staging" if "K_SERVICE" in os.environ else "development"}})
    return config["environment"]["name"]
