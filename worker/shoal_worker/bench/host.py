"""Where and with what something was measured, for the top of every report."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from shoal_worker.engine.fingerprint import hardware


def host(device: torch.device) -> dict[str, str]:
    """Hardware and versions, by name."""
    facts = {"hardware": hardware(device)}
    if device.type == "cpu":
        facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    else:
        facts["cuda"] = str(torch.version.cuda)
    return facts | {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "shoal": version("shoal"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def command_line() -> str:
    """What was typed, as it can be typed again."""
    return shlex.join(["shoal", *sys.argv[1:]])
