"""A short name for everything that decides a token, so that two workers can tell they agree.

Owns what goes into it on the engine's side: files, hardware, dtype, versions and
process-wide settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from shoal_worker.engine.reproducible import MKL_MODE

_LENGTH = 24
_CPUINFO = Path("/proc/cpuinfo")


def fingerprint_of(settings: Mapping[str, str]) -> str:
    """A digest of settings by name: 24 hexadecimal digits."""
    canonical = json.dumps(dict(settings), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:_LENGTH]


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Settings of this machine and process that change a token's bits."""
    settings = {
        "hardware": hardware(device),
        "dtype": str(dtype),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shoal": version("shoal"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cpu":
        settings["threads"] = str(torch.get_num_threads())
        settings["mkl_mode"] = os.environ.get(MKL_MODE, "")
    else:
        settings["cuda"] = str(torch.version.cuda)
    return settings


def hardware(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the instructions that torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()} {torch.backends.cpu.get_cpu_capability()}"


def _cpu_model() -> str:
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    # The last processor's; all are alike.
    of = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    if "model name" not in of:
        return platform.processor() or platform.machine()
    # Virtual machines call processors of several generations by one name.
    numbers = [of[name] for name in ("cpu family", "model") if name in of]
    return " ".join([of["model name"], "/".join(numbers)]).strip()


def digest_of_files(files: list[Path]) -> str:
    """A digest of files' names and contents; their folders do not count."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.name}\0{_digest_of_file(file)}\0".encode())
    return digest.hexdigest()


def _digest_of_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
