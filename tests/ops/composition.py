"""docker-compose.yml as compose itself would read it: defaults filled in, services by name."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
_DEFAULTED = re.compile(r"\$\{(\w+):-([^}]*)\}")


@cache
def composition() -> dict[str, Any]:
    """The whole file."""
    text = (ROOT / "docker-compose.yml").read_text()
    filled = _DEFAULTED.sub(r"\2", text)
    assert "${" not in filled, "a variable has no default"
    loaded: dict[str, Any] = yaml.safe_load(filled)
    return loaded


@cache
def services() -> dict[str, dict[str, Any]]:
    """The services by name."""
    found: dict[str, dict[str, Any]] = composition()["services"]
    return found


def seconds(text: str) -> int:
    """A duration as this file writes them."""
    match = re.fullmatch(r"(\d+)s", text)
    assert match is not None, text
    return int(match[1])
