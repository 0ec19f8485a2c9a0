"""Operators that a call dispatches, counted one by one as torch runs them.

A recorded CUDA graph dispatches none when it is launched, and a compiled step few: that is the
difference which is looked for.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shoal_worker.engine.launched import Launched, LaunchQueue


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts by operator and its inputs' dtypes and shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inputs = [f"{arg.dtype}{list(arg.shape)}" for arg in args if isinstance(arg, Tensor)]
        self.counts[f"{operator} {' '.join(inputs)}".replace("torch.", "")] += 1
        return operator(*args, **(kwargs or {}))


def launched_by(call: Callable[[], object]) -> dict[str, int]:
    """Operators that a call dispatches, by name, dtypes and shapes."""
    with _Counting() as counting:
        call()
    return dict(counting.counts)


@contextmanager
def unread_counted() -> Iterator[list[int]]:
    """Within, how many of a lane's calls are launched and not read, after each launch."""
    counts: list[int] = []
    add = LaunchQueue.add

    def counting(queue: LaunchQueue, launched: Launched) -> None:
        add(queue, launched)
        counts.append(len(queue))

    with patch.object(LaunchQueue, "add", counting):
        yield counts


def num_compiled() -> int:
    """Graphs that torch has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]
