"""CUDA graphs: a pass over fixed tensors, recorded once and launched as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Pass:
    """A function that reads and writes tensors which stay where they are.

    Its first call runs it as it is, which also readies kernels and libraries; its second call
    records it. Every call runs it exactly once.

    Args:
        function: launches work on the device and returns nothing.
        pool: memory that recorded passes share, from `graph_pool`; None never records.
    """

    def __init__(self, function: Callable[[], None], pool: Any) -> None:
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
            self._graph = self._recorded()
        self._graph.replay()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads may do as they like meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._function()
        return graph


def graph_pool() -> Any:
    """Memory for the passes of one engine: they run one after the other, so they can share it."""
    return torch.cuda.graph_pool_handle()
