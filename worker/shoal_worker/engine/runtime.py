"""The means by which lanes run their passes: kernels, graphs and compilation, set up once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from shoal_worker.engine import native_ops
from shoal_worker.engine.graphs import GraphPool
from shoal_worker.engine.options import Choices
from shoal_worker.engine.packed import LiveRows
from shoal_worker.engine.params import RowParams

Forward = Callable[[Tensor, Tensor], Tensor]

# Each lane is one more shape of the same code; torch's own limit is 8.
_MAX_COMPILED_SHAPES = 64


class Runtime:
    """What `Choices` come to on a device.

    Attributes:
        graph_pool: for recorded passes; None where they are not recorded.
        kernels: whether decode attention is our kernel.
        draw: logits `[rows, vocab]`, parameters and positions to tokens `[rows]`, as a kernel
            within a pass; None where every row is drawn after it.
        max_top_k: the largest top-k that `draw` takes.
    """

    def __init__(
        self,
        choices: Choices,
        device: torch.device,
        vocab_size: int,
        live: LiveRows | None = None,
    ) -> None:
        self.device = device
        self.kernels = choices.kernels
        self.graph_pool = GraphPool(device) if choices.cuda_graphs else None
        self.draw: Callable[[Tensor, RowParams, Tensor], Tensor] | None = None
        self.max_top_k = 0
        self._compile = choices.compile
        self._live = live
        if choices.kernels and device.type == "cpu":
            self.draw, self.max_top_k = native_ops.draw, native_ops.MAX_TOP_K
        elif choices.kernels:
            # Imported here: where there is no GPU there is no Triton.
            from shoal_worker.engine import triton_attention, triton_draw  # noqa: F401, PLC0415

            if vocab_size <= triton_draw.MAX_VOCAB:
                self.draw, self.max_top_k = triton_draw.draw, triton_draw.MAX_TOP_K

    def reading(self, mask: Tensor) -> AbstractContextManager[None]:
        """A pass of which only some rows are read: `mask` is `[rows, length]`.

        The shape is the same; layers whose bits depend on no other row leave out the rest.
        """
        return nullcontext() if self._live is None else self._live.only(mask)

    def compiled(self, forward: Forward) -> Forward:
        """A decode step's forward pass, compiled if that is chosen."""
        if not self._compile:
            return forward
        torch._dynamo.config.recompile_limit = _MAX_COMPILED_SHAPES  # noqa: SLF001
        compiled: Forward = torch.compile(forward, fullgraph=True, dynamic=False)
        return compiled
