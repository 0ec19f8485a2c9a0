"""How much memory is left for the lanes, on a GPU or within this process's container."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# What torch says of a CPU's memory, in an error that has no class of its own.
_CPU_TEXTS = ("can't allocate memory", "not enough memory")

log = logging.getLogger("shoal.engine")


def with_room(run: Callable[[], T]) -> T:
    """What `run` gives; should memory run out, what it gives once caches have been emptied.

    Args:
        run: changes nothing before it has all the memory that it needs.

    Raises:
        RuntimeError: there is no memory the second time either. The engine ends with it, and its
            parent runs the rows again in a new one.
    """
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        log.warning("out of memory in a step; trying it again with empty caches")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return run()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was what lacked."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_TEXTS)


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [number for number in (_of_machine(), _of_container()) if number is not None]
    return min(limits, default=None)


def total_bytes(gpu: torch.device) -> int:
    """All bytes that a GPU has, whoever uses them."""
    return torch.cuda.get_device_properties(gpu).total_memory


def _of_machine() -> int | None:
    if not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_container() -> int | None:
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not (limit.exists() and used.exists()):
        return None
    text = limit.read_text().strip()
    return None if text == "max" else max(0, int(text) - int(used.read_text()))


def readable(num_bytes: int) -> str:
    """Such as "1.5 GiB"."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
