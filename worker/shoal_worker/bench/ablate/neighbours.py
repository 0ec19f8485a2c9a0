"""Whether other processes used the CPU during a run, which makes its time worthless."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
# user, nice, system, and after idle and iowait: irq, softirq, steal
_BUSY = (0, 1, 2, 5, 6, 7)


class Neighbours:
    """Watches from its making on."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._own_s = time.process_time()
        self._busy_s = _busy_s()

    def ratio(self) -> float:
        """Share of all cores that others used so far; 0 where the system does not say."""
        elapsed_s = time.perf_counter() - self._started_s
        own_s = time.process_time() - self._own_s
        others_s = _busy_s() - self._busy_s - own_s
        return max(0.0, others_s / (elapsed_s * (os.cpu_count() or 1)))


def _busy_s() -> float:
    if not _STAT.exists():
        return 0.0
    ticks = _STAT.read_text().split("\n", 1)[0].split()[1:]
    return sum(int(ticks[place]) for place in _BUSY) / os.sysconf("SC_CLK_TCK")
