"""CUDA graphs: a pass over fixed tensors, recorded once and launched as one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Pass:
    """A function that reads and writes tensors which stay where they are.

    Its first call runs it as it is, which also readies kernels and libraries; its second call
    records it. Every call runs it exactly once.

    Args:
        function: launches work on the device and returns nothing.
        pool: what recorded passes share; None never records.
    """

    def __init__(self, function: Callable[[], None], pool: GraphPool | None) -> None:
        self._function = function
        self._pool = pool
        self._is_ready = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Launch it."""
        if self._pool is None or not self._is_ready:
            self._function()
            self._is_ready = True
            return
        if self._graph is None:
            self._graph = self._pool.record(self._function)
        self._graph.replay()


class GraphPool:
    """Memory for the passes of one engine: they run one after the other, so they can share it.

    Args:
        device: the engine's.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory: Any = torch.cuda.graph_pool_handle()
        # torch's own stream for recording is one for all devices, on that of the first graph.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """What the function launches on this device, not launched yet."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may do as they like meanwhile.
        with (
            _no_collection(),
            torch.cuda.graph(
                graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            function()
        return graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: to end an earlier engine's graphs would spoil a recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
