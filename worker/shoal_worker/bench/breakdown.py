"""Where the time of a step goes: the profiler's kernels and operators, sorted into parts.

Owns the sorting. Knows nothing of what it measures but that it can be called again and again.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_NUM_LONGEST = 12
# The first pattern that is found in a kernel's or an operator's name decides.
_PARTS = (
    ("attention", r"fmha|flash|attention|attend"),
    (
        "selection and sampling",
        r"_draw|topk|TopK|sort|radix|select|argmax|ArgMax",
    ),
    ("matrix products", r"shoal::product|gemm|cutlass|nvjet|splitK|cublas|addmm|::mm|::bmm|linear"),
    ("copies and gathers", r"Memcpy|Memset|copy|index|scatter|gather|::cat|CatArray"),
    ("norms and reductions", r"norm|reduce|softmax|cumsum|scan"),
)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A call's time, on average.

    Attributes:
        wall_ms: from the first launch to the last result.
        device_ms: in which the device (on a CPU: torch's operators) worked.
        parts_ms: of device_ms, by part, longest first.
        longest: the names that took longest, with their milliseconds.
        launches: kernels, or operators, a call.
    """

    wall_ms: float
    device_ms: float
    parts_ms: dict[str, float]
    longest: dict[str, float]
    launches: float


def breakdown(call: Callable[[], object], device: torch.device, num_calls: int) -> Breakdown:
    """Time `call` without a profiler, then see with one what it consists of."""
    wall_ms = timed_ms(call, device, num_calls)
    by_name, launches = _profiled(call, device, num_calls)
    parts: dict[str, float] = defaultdict(float)
    for name, total_ms in by_name.items():
        parts[_part(name)] += total_ms / num_calls
    return Breakdown(
        wall_ms=wall_ms,
        device_ms=sum(parts.values()),
        parts_ms=dict(sorted(parts.items(), key=itemgetter(1), reverse=True)),
        longest={name: ms / num_calls for name, ms in islice(by_name.items(), _NUM_LONGEST)},
        launches=launches / num_calls,
    )


def timed_ms(call: Callable[[], object], device: torch.device, num_calls: int) -> float:
    """Milliseconds of a call, on average, all that it left on the device included."""
    synchronize(device)
    started_s = time.perf_counter()
    for _ in range(num_calls):
        call()
    synchronize(device)
    return (time.perf_counter() - started_s) * 1000 / num_calls


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profiled(
    call: Callable[[], object], device: torch.device, num_calls: int
) -> tuple[dict[str, float], int]:
    """Milliseconds by name, longest first, and how many kernels or operators there were."""
    # Else the profiler of torch 2.13 tells stderr when it begins and ends.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(num_calls):
            call()
        synchronize(device)
    by_name: dict[str, float] = defaultdict(float)
    launches = 0
    for event in profiler.key_averages():
        if on_gpu and event.device_type == DeviceType.CUDA:
            by_name[event.key] += event.self_device_time_total / 1000
            launches += event.count
        elif not on_gpu and event.self_cpu_time_total:
            by_name[event.key] += event.self_cpu_time_total / 1000
            launches += event.count
    longest_first = sorted(by_name.items(), key=itemgetter(1), reverse=True)
    return dict(longest_first), launches


def _part(name: str) -> str:
    return next((part for part, pattern in _PARTS if re.search(pattern, name)), "pointwise")
